"""Requests whose clients have disconnected: when they are cancelled, and what a client that comes back finds."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator

from pipeline.aio import Background
from pipeline.broker.asker import Asker
from pipeline.broker.connection import BusError

log = logging.getLogger(__name__)


class HangUps:
    """Counts the responses that follow each request, and cancels a request that no response follows any more.

    A request under an id that its client chose can be asked for again, so it is kept for a grace. One that was
    cancelled begins anew when it is sent again (`Asker.submit`).

    Args:
        client: cancels requests.
        grace_s: how long a request is kept, seconds.
    """

    def __init__(self, client: Asker, grace_s: float) -> None:
        self._client = client
        self._grace_s = grace_s
        self._readers: Counter[str] = Counter()
        self._kept: dict[str, asyncio.TimerHandle] = {}
        self._ending: dict[str, asyncio.Task[None]] = {}
        self._tasks = Background()

    @contextlib.asynccontextmanager
    async def following(self, name: str) -> AsyncIterator[None]:
        """A response follows a request. If the request is being cancelled, it begins when that is done."""
        self._readers[name] += 1
        if kept := self._kept.pop(name, None):
            kept.cancel()
        try:
            if ending := self._ending.get(name):
                await asyncio.wait({ending})
            yield
        finally:
            self._readers[name] -= 1
            if not self._readers[name]:
                del self._readers[name]

    async def gone(self, name: str, *, keep: bool) -> None:
        """The client of a request has disconnected. Cancel the request, unless another response follows it.

        Args:
            name: the request's.
            keep: cancel it after the grace, unless a response follows it by then.
        """
        if self._readers[name]:
            return
        if not keep:
            with contextlib.suppress(BusError):
                await self._client.cancel(name)
            return
        if kept := self._kept.pop(name, None):
            kept.cancel()
        self._kept[name] = asyncio.get_running_loop().call_later(self._grace_s, self._end, name)

    async def stop(self) -> None:
        """Cancel the requests that are kept: their clients cannot come back to this gateway."""
        for name, kept in list(self._kept.items()):
            kept.cancel()
            self._end(name)
        await self._tasks.join()

    def _end(self, name: str) -> None:
        del self._kept[name]
        self._ending[name] = self._tasks.start(self._cancel(name), what=f"cancelling request {name}")

    async def _cancel(self, name: str) -> None:
        try:
            await self._client.cancelled(name)
        except BusError as error:
            log.debug("%s: its cancel was not confirmed: %s", name, error)
        finally:
            del self._ending[name]
