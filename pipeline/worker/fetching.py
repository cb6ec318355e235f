"""A worker's replies to calls for a model that is not here: on `llm.fetch.<worker>`, beside the queue."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import msgspec

from pipeline.aio import Background
from pipeline.broker.connection import Message
from pipeline.config import Config
from pipeline.core.fetches import Fetch, Fetches
from pipeline.engine import Fetcher
from pipeline.process.role import Role
from pipeline.wire.answers import ErrorAnswer, ErrorBody
from pipeline.wire.errors import ErrorCode, HeadraceError, quoted
from pipeline.wire.fetches import FetchCall, FetchReport
from pipeline.wire.messages import encode
from pipeline.wire.subjects import FETCH, is_inbox
from pipeline.wire.validation import UNREADABLE

# How often a fetch is looked at whether a caller is left.
_LOOK_EVERY_S = 0.5

_decoder = msgspec.json.Decoder(FetchCall)


@dataclass(slots=True)
class Fetching:
    """Fetches models while they are asked for, each once for all its callers.

    Args:
        me: the role.
        config: the settings.
        fetcher: of the worker's engine; None if it fetches nothing.
    """

    me: Role
    config: Config
    fetcher: Fetcher | None
    _fetches: Fetches = field(init=False, default_factory=Fetches)
    _tasks: Background = field(init=False, default_factory=Background)
    _stopping: bool = field(init=False, default=False)

    async def start(self) -> None:
        """Begin to reply. Call once."""
        if self.fetcher is not None:
            await self.me.bus.subscribe(f"{FETCH}.{self.me.name}", self._on_call)

    async def stop(self) -> None:
        """End all fetches. What they have got is used by the next ones."""
        self._stopping = True
        self._tasks.cancel()
        await self._tasks.join()

    async def _on_call(self, message: Message) -> None:
        try:
            call = _decoder.decode(message.data)
        except UNREADABLE as error:
            await self._reply(message, HeadraceError(ErrorCode.INVALID_REQUEST, f"The call is malformed: {error}."))
            return
        if call.leaves:
            self._fetches.leave(call)
            return
        try:
            await self._reply(message, self._asked(call))
        except HeadraceError as error:
            await self._reply(message, error)

    def _asked(self, call: FetchCall) -> FetchReport:
        assert self.fetcher is not None  # noqa: S101 - else nothing is subscribed
        model, now = self.fetcher.fetchable(call.model), self.me.bus.clock.now()
        if self.config.offline:
            message = (
                f"Model {quoted(call.model)} is not stored here, and --offline forbids fetching it. Start headrace "
                "without --offline."
            )
            raise HeadraceError(ErrorCode.INVALID_REQUEST, message, param="model")
        fetch, begins = self._fetches.ask(call, model, now)
        if begins and self._stopping:
            fetch.end(now, error=_stopped(fetch))
        elif begins:
            self._tasks.start(self._carry_out(fetch, self.fetcher), what=f"fetching {fetch.model}")
        return fetch.report(call.after)

    async def _reply(self, message: Message, reply: FetchReport | HeadraceError) -> None:
        if not is_inbox(message.reply):
            return
        if isinstance(reply, HeadraceError):
            answer = ErrorAnswer(id="", created=int(self.me.bus.clock.wall()), error=ErrorBody.of(reply))
            await self.me.bus.publish(message.reply, encode(answer))
        else:
            await self.me.bus.publish(message.reply, encode(reply))

    async def _carry_out(self, fetch: Fetch, fetcher: Fetcher) -> None:
        """Fetch until the model is here or no caller is left."""
        now = self.me.bus.clock.now
        error: ErrorBody | None = _stopped(fetch)
        served = ""
        fetching = asyncio.ensure_future(fetcher.fetch(fetch.model, fetch.note))
        try:
            while not fetching.done() and not fetch.is_abandoned(now()):
                await asyncio.wait([fetching], timeout=_LOOK_EVERY_S)
            if fetching.done():
                served, error = await fetching, None
        except HeadraceError as failed:
            error = ErrorBody.of(failed)
        except Exception as failed:
            error = ErrorBody.of(HeadraceError(ErrorCode.ENGINE_FAILED, f"The fetch failed ({failed!r})."))
            raise
        finally:
            # First, so that a new caller begins anew.
            fetch.end(now(), served=served, error=error)
            fetching.cancel()
            await asyncio.wait([fetching])


def _stopped(fetch: Fetch) -> ErrorBody:
    message = f"The fetch of {quoted(fetch.model)} was stopped. Pull again."
    return ErrorBody.of(HeadraceError(ErrorCode.UNAVAILABLE, message))
