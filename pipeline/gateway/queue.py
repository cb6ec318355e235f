"""The queue over HTTP: statistics, a request's position and its messages as server-sent events, the engines' load."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from pipeline.aio import wait_set
from pipeline.broker.asker import Asker, RecordReader
from pipeline.broker.connection import BusError, Unreachable
from pipeline.broker.jetstream import Bus
from pipeline.broker.peers import Peers
from pipeline.core.statistics import QueueStatistics
from pipeline.gateway.identity import meant_name
from pipeline.gateway.responses import KEEP_ALIVE_S, SSE_HEADERS, Live, Registry, finish, json_response, more
from pipeline.gateway.statuses import HttpError
from pipeline.wire.answers import is_last
from pipeline.wire.errors import ErrorCode, quoted
from pipeline.wire.messages import EngineName, encode
from pipeline.wire.subjects import QUEUE_STATS, is_request_name, split_name
from pipeline.wire.validation import UNREADABLE

_T = TypeVar("_T")

_ENGINES: tuple[EngineName, ...] = ("mlx", "ollama")
# Statistics are reused for this long: many readers cost no more than one.
_STATISTICS_KEPT_S = 0.1
# How soon the monitor is asked again whether a request has ended whose record seems to be an earlier one's.
_ASK_AGAIN_S = 1.0
_WAITING = b": waiting\n\n"


@dataclass(slots=True)
class StatisticsCache:
    """The queue's statistics. The monitor is asked at most ten times a second, however many readers there are."""

    bus: Bus
    _body: bytes = field(init=False, default=b"")
    _at: float = field(init=False, default=float("-inf"))
    _asking: asyncio.Task[bytes] | None = field(init=False, default=None)

    async def body(self) -> bytes:
        """The JSON as the monitor sends it; raises HttpError 503 if no monitor answers."""
        if asyncio.get_running_loop().time() - self._at <= _STATISTICS_KEPT_S:
            return self._body
        if self._asking is None or self._asking.done():
            self._asking = asyncio.get_running_loop().create_task(self._ask())
        try:
            # Shielded: a reader that disconnects must not cancel it for the others.
            return await asyncio.shield(self._asking)
        except Unreachable as error:
            raise _away(error) from error

    async def decoded(self) -> QueueStatistics | None:
        """The statistics decoded, None if no monitor answers."""
        try:
            return msgspec.json.decode(await self.body(), type=QueueStatistics)
        except (HttpError, *UNREADABLE):
            return None

    async def _ask(self) -> bytes:
        answer = await self.bus.request(QUEUE_STATS)
        self._body, self._at = answer.data, asyncio.get_running_loop().time()
        return answer.data


@dataclass(slots=True)
class Queue:
    """The handlers of `/queue/stats`, `/queue/requests` and `/load`."""

    client: Asker
    peers: Peers
    statistics: StatisticsCache
    registry: Registry
    _changed: set[asyncio.Event] = field(init=False, default_factory=set)

    async def stats(self, _: Request) -> Response:
        """`GET /queue/stats`."""
        return Response(await self.statistics.body(), media_type="application/json")

    async def show(self, request: Request) -> Response:
        """`GET /queue/requests/{id}`: its state and position, and its last message once it has ended."""
        name = _asked_name(request)
        position = await answered(self.client.position(name))
        fields = msgspec.to_builtins(position) | {"object": "headrace.request", "events_url": events_url(name)}
        if position.state == "unknown":
            raise _unknown(name)
        if position.state == "finished":
            last = await answered(self.client.last(name))
            fields["answer"] = msgspec.Raw(last.data) if last else None
        return json_response(fields)

    async def cancel(self, request: Request) -> Response:
        """`DELETE /queue/requests/{id}`."""
        name = _asked_name(request)
        cancelled = await answered(self.client.cancelled(name))
        if cancelled.state == "unknown":
            raise _unknown(name)
        return json_response(msgspec.to_builtins(cancelled))

    async def events(self, request: Request) -> Response | Events:
        """`GET /queue/requests/{id}/events`: the record from its start, or after `Last-Event-ID`."""
        name = _asked_name(request)
        given = request.headers.get("last-event-id", "0").strip() or "0"
        if not (given.isascii() and given.isdecimal() and len(given) < 19):
            raise HttpError(
                400, ErrorCode.INVALID_REQUEST, "Last-Event-ID must be the id of an event.", param="Last-Event-ID"
            )
        last = await answered(self.client.last(name))
        ended_at = last.sequence if last is not None and is_last(last.answer) else 0
        position = await answered(self.client.position(name))
        if position.state == "unknown":
            raise _unknown(name)
        after = int(given)
        if ended_at and position.state != "finished":
            return Events(self.client, name, after, self.registry, skipped=ended_at)
        if 0 < ended_at <= after:
            return Response(status_code=204)  # on which an EventSource does not reconnect
        return Events(self.client, name, after, self.registry)

    async def load(self, _: Request) -> Loads:
        """`GET /load`: each engine's load, now and at every change."""
        return Loads(self.peers, self._changed, self.registry)

    def on_change(self) -> None:
        """Called when a status or a load of a worker arrives."""
        for event in self._changed:
            event.set()


class Events(Live):
    """A record as server-sent events; each event's id is its sequence in the stream.

    Args:
        client: reads the record.
        name: the request's name.
        after: the sequence after which to begin.
        registry: holds the open responses.
        skipped: the sequence of a last message that is taken for that of an earlier request under the id, since the
            monitor says that this one has not ended. The monitor may be a moment behind.
    """

    endless = True

    def __init__(self, client: Asker, name: str, after: int, registry: Registry, *, skipped: int = 0) -> None:
        super().__init__(registry)
        self._client = client
        self._name = name
        self._after = after
        self._skipped = skipped

    async def write(self, send: Send) -> None:
        """Send the events up to the last message."""
        async with await self._client.read(self._name, after=max(self._after, self._skipped)) as record:
            await self.begin(send, {**SSE_HEADERS, "x-request-id": split_name(self._name)[1]})
            while not await self._one(record, send):
                pass
        await finish(send)

    async def _one(self, record: RecordReader, send: Send) -> bool:
        """Send one event, or a keep-alive. Returns whether it was the last event."""
        try:
            async with asyncio.timeout(_ASK_AGAIN_S if self._skipped else KEEP_ALIVE_S):
                entry = await record.next()
        except TimeoutError:
            await more(send, _WAITING)
            if self._skipped and await self._has_ended():
                self._skipped = 0
                record.reread(self._after)
            return False
        self._skipped = 0
        await more(send, b"id: %d\ndata: %s\n\n" % (entry.sequence, entry.data))
        return is_last(entry.answer)

    async def _has_ended(self) -> bool:
        """Whether the monitor says by now that the request has ended."""
        try:
            return (await self._client.position(self._name)).state == "finished"
        except BusError:
            return False


class Loads(Live):
    """The engines' loads as server-sent events. A slow client misses some, and always gets the newest."""

    endless = True

    def __init__(self, peers: Peers, changed: set[asyncio.Event], registry: Registry) -> None:
        super().__init__(registry)
        self._peers = peers
        self._changed = changed

    async def write(self, send: Send) -> None:
        """Send until the client disconnects."""
        changed = asyncio.Event()
        changed.set()
        self._changed.add(changed)
        sent: dict[EngineName, float] = {}
        try:
            await self.begin(send, SSE_HEADERS)
            while True:
                if not await wait_set(changed, KEEP_ALIVE_S):
                    await more(send, _WAITING)
                changed.clear()
                for engine in _ENGINES:
                    load = self._peers.load(engine)
                    if load is not None and load.at != sent.get(engine):
                        sent[engine] = load.at
                        await more(send, b"data: " + encode(load) + b"\n\n")
        finally:
            self._changed.discard(changed)


def events_url(request: str) -> str:
    """The URL of a request's messages, by its id or its name."""
    return f"/queue/requests/{request}/events"


def _asked_name(request: Request) -> str:
    given = request.path_params["id"]
    chosen = meant_name(request.state.caller, given)
    if not is_request_name(chosen):
        raise _unknown(given[:128])
    return chosen


def _unknown(name: str) -> HttpError:
    return HttpError(
        404,
        ErrorCode.INVALID_REQUEST,
        f"No request has the id {quoted(split_name(name)[1], 128)}, or its answer has expired.",
        param="id",
    )


def _away(error: BusError) -> HttpError:
    return HttpError(503, ErrorCode.UNAVAILABLE, f"The pipeline is unavailable: {error}. Retry later.", retry_after_s=1)


async def answered(answer: Awaitable[_T]) -> _T:
    """The answer of the pipeline; raises HttpError 503 if it does not come."""
    try:
        return await answer
    except BusError as error:
        raise _away(error) from error
