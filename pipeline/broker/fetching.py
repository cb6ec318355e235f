"""Calls that ask a worker to fetch a model."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator
from typing import Self

import msgspec

from pipeline.broker.connection import Unreachable
from pipeline.broker.jetstream import Bus
from pipeline.wire.answers import ErrorAnswer
from pipeline.wire.errors import ErrorCode, HeadraceError, quoted
from pipeline.wire.fetches import FetchCall, FetchReport
from pipeline.wire.subjects import FETCH
from pipeline.wire.validation import UNREADABLE

# How often a worker is asked how far it is.
_ASK_EVERY_S = 0.2
# A worker that has been silent for so long has died.
_SILENCE_S = 8.0

_decoder: msgspec.json.Decoder[FetchReport | ErrorAnswer] = msgspec.json.Decoder(FetchReport | ErrorAnswer)


class WorkerFetch:
    """One caller's fetch of a model, by one worker. Leaving it as a context takes the caller's part in the fetch back.

    Args:
        bus: the connection.
        worker: its name.
        model: as the client names it.
    """

    def __init__(self, bus: Bus, worker: str, model: str) -> None:
        self._bus = bus
        self._worker = worker
        self._subject = f"{FETCH}.{worker}"
        self._call = FetchCall(model, secrets.token_hex(8))
        self._ended = False

    async def __aenter__(self) -> Self:
        """The fetch itself; `ask` begins it."""
        return self

    async def __aexit__(self, *exc: object) -> None:
        if not self._ended:
            await self.leave()

    async def ask(self) -> FetchReport | ErrorAnswer:
        """Begin, or ask what is new. The worker's error if it does not fetch this model.

        Raises:
            Unreachable: the worker does not answer.
        """
        answer = await self._bus.request(self._subject, msgspec.json.encode(self._call))
        try:
            said = _decoder.decode(answer.data)
        except UNREADABLE as error:
            raise Unreachable(f"{self._worker} sent no report: {error}") from None
        if isinstance(said, FetchReport):
            self._call.after, self._ended = said.revision, said.ended
        return said

    async def reports(self) -> AsyncGenerator[FetchReport, None]:
        """What is new after the first reply, as it comes, to the end.

        Raises:
            HeadraceError: `unavailable` if the worker has died or lost the fetch.
        """
        loop = asyncio.get_running_loop()
        heard_at = loop.time()
        while not self._ended:
            await asyncio.sleep(_ASK_EVERY_S)
            try:
                said = await self.ask()
            except Unreachable:
                if loop.time() - heard_at > _SILENCE_S:
                    raise self._lost() from None
                continue
            if isinstance(said, ErrorAnswer):
                raise self._lost()
            heard_at = loop.time()
            yield said

    async def leave(self) -> None:
        """Tell the worker that the caller is gone. A worker that does not hear it finds out."""
        with contextlib.suppress(Unreachable):
            await self._bus.publish(
                self._subject, msgspec.json.encode(msgspec.structs.replace(self._call, leaves=True))
            )

    def _lost(self) -> HeadraceError:
        return HeadraceError(
            ErrorCode.UNAVAILABLE,
            f"Worker {self._worker}, which fetched {quoted(self._call.model)}, does not answer any more. Pull again.",
        )
