"""The dashboard's data as server-sent events: lanes, loads, workers, requests and moves, first whole, then changes."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace
from starlette.requests import Request
from starlette.types import Send

from pipeline.aio import wait_set
from pipeline.broker.connection import Message
from pipeline.broker.jetstream import to_stored
from pipeline.config import Config
from pipeline.core.envelope import read_envelope
from pipeline.core.models import is_internal
from pipeline.core.recent import WINDOW_S, MoveSeen, Recent, Seen
from pipeline.core.statistics import QueueStatistics
from pipeline.gateway.identity import Caller, own_name
from pipeline.gateway.operating import seen_pause
from pipeline.gateway.queue import StatisticsCache
from pipeline.gateway.responses import KEEP_ALIVE_S, SSE_HEADERS, Live, Registry, more
from pipeline.process.role import Role
from pipeline.wire.messages import EngineName, Load, RequestEvent, StoreReport, WorkerStatus
from pipeline.wire.subjects import EVENT, QUEUED_PREFIX, STORED_SUBJECT, Priority, lane_of_subject, ollama_subject
from pipeline.wire.validation import UNREADABLE

log = logging.getLogger(__name__)

_ENGINES: tuple[EngineName, ...] = ("mlx", "ollama")
# Changes within this time are sent together. A slower client gets the newest state.
_GATHER_S = 0.2
_WAITING = b": waiting\n\n"
_OLLAMA_LANES = {ollama_subject(priority): priority for priority in Priority}

_Said = TypeVar("_Said", Load, WorkerStatus, Seen, MoveSeen)

_event_decoder = msgspec.json.Decoder(RequestEvent)


@dataclass(slots=True)
class Watch:
    """Collects the pipeline's events and keeps the recent ones. It asks for statistics only while a client reads."""

    me: Role
    config: Config
    statistics: StatisticsCache
    registry: Registry
    recent: Recent = field(init=False, default_factory=Recent)
    times_lost: int = field(init=False, default=0)
    _lookers: set[asyncio.Event] = field(init=False, default_factory=set)

    async def start(self) -> None:
        """Subscribe to the pipeline's events. Call once."""
        await self.me.bus.subscribe(f"{QUEUED_PREFIX}.>", self._on_stored)
        await self.me.bus.subscribe(f"{EVENT}.>", self._on_event)
        self.me.peers.pauses.listen(self._tell)
        self.me.bus.on_reconnect(self._on_reconnect)

    async def live(self, request: Request) -> Views:
        """`GET /queue/live`."""
        return Views(self, request.state.caller, self._lookers, self.registry)

    def on_change(self) -> None:
        """Called when a status or a load of a worker arrives."""
        for engine in _ENGINES:
            load = self.me.peers.load(engine)
            if load is not None:
                self.recent.load(load)
        self._tell()

    async def _on_stored(self, message: Message) -> None:
        subject = message.headers.get(STORED_SUBJECT, "")
        lane = lane_of_subject(subject)
        priority = _OLLAMA_LANES.get(subject) if lane is None else lane.priority
        if priority is None:
            return
        stored = to_stored(message)
        self.recent.stored(read_envelope(stored, priority, moves=self.me.bus.moves), stored.stored_at)
        self._tell()

    async def _on_event(self, message: Message) -> None:
        try:
            event = _event_decoder.decode(message.data)
        except UNREADABLE as error:
            log.warning("Ignoring a malformed event on %s: %s", message.subject, error)
            return
        self.recent.event(event, self.me.bus.clock.wall())
        self._tell()

    def _on_reconnect(self) -> None:
        self.recent.forget_unfinished()
        self.times_lost += 1
        self._tell()

    def _tell(self) -> None:
        for changed in self._lookers:
            changed.set()

    # ---- what is shown

    def sections(self, caller: Caller, since: int, statistics: QueueStatistics | None) -> dict[str, Any]:
        """The data that the caller can see: history after the change `since`, the rest as it is now."""
        internal = self.config.internal_models
        peers, recent = self.me.peers, self.recent
        # From the statistics: without work a load event is so rare that it would count as stale.
        loads = {} if statistics is None else statistics.engines
        shown = {
            "lanes": None if statistics is None else _lanes(statistics),
            "loads": {engine: _load(load, internal) for engine, load in loads.items()},
            "store": _store(peers.store()),
            "pauses": [visible for pause in peers.pauses.state.pauses if (visible := seen_pause(caller, pause))],
            "workers": [_worker(status, internal) for engine in _ENGINES for status in peers.workers(engine)],
        }
        history = {
            "points": recent.points(since),
            "requests": [_without(r, internal) for r in recent.requests(since, caller.may_see)],
            "moves": [_without(m, internal) for m in recent.moves(since, caller.may_see)],
        }
        return shown | {name: items for name, items in history.items() if items}

    def about(self, caller: Caller) -> dict[str, Any]:
        """The data that does not change while a caller reads."""
        config, key = self.config, caller.key
        return {
            "tenant": caller.tenant,
            "name_prefix": own_name(caller, ""),
            "sees_all": caller.sees_all,
            "highest": Priority.HIGH if key is None else key.highest,
            "busy_at": config.busy_at,
            "saturated_at": config.saturated_at,
            "window_s": WINDOW_S,
        }


class Views(Live):
    """The stream of one caller. Nothing is kept for a slow client: it gets the newest state."""

    endless = True

    def __init__(self, source: Watch, caller: Caller, lookers: set[asyncio.Event], registry: Registry) -> None:
        super().__init__(registry)
        self._source = source
        self._caller = caller
        self._lookers = lookers
        self._times_lost = source.times_lost
        self._since = 0
        self._sent: dict[str, bytes] = {}

    async def write(self, send: Send) -> None:
        """Send until the client disconnects."""
        changed = asyncio.Event()
        self._lookers.add(changed)
        try:
            await self._all(send)
            while True:
                # After a silence too: it can mean that the monitor or the broker is gone.
                await wait_set(changed, KEEP_ALIVE_S)
                await asyncio.sleep(_GATHER_S)
                changed.clear()
                if self._times_lost != self._source.times_lost:
                    await self._all(send)
                else:
                    news = await self._news()
                    await more(send, self._event(b"changes", news) if news else _WAITING)
        finally:
            self._lookers.discard(changed)

    async def _all(self, send: Send) -> None:
        self._times_lost = self._source.times_lost
        self._since = 0
        self._sent.clear()
        news = await self._news()
        await self.begin(send, SSE_HEADERS)
        await more(send, self._event(b"all", {"about": self._source.about(self._caller), **news}))

    async def _news(self) -> dict[str, Any]:
        """The sections that have changed since they were last sent."""
        statistics = await self._source.statistics.decoded()
        sections = self._source.sections(self._caller, self._since, statistics)
        self._since = self._source.recent.change
        news: dict[str, Any] = {}
        for name, value in sections.items():
            encoded = msgspec.json.encode(value)
            if name in ("points", "requests", "moves") or encoded != self._sent.get(name):
                self._sent[name] = encoded
                news[name] = msgspec.Raw(encoded)
        return news

    def _event(self, name: bytes, news: dict[str, Any]) -> bytes:
        at = round(self._source.me.bus.clock.wall(), 3)
        view = msgspec.json.encode({"object": "headrace.view", "at": at, **news})
        return b"event: " + name + b"\ndata: " + view + b"\n\n"


def _lanes(statistics: QueueStatistics) -> dict[str, Any]:
    """The statistics without the sections that the view has itself, and without the uptime, which always changes."""
    fields: dict[str, Any] = msgspec.to_builtins(statistics)
    return {name: value for name, value in fields.items() if name not in ("engines", "uptime_s", "store")}


def _store(store: StoreReport | None) -> dict[str, str] | None:
    """What is wrong with the broker's store; None if nothing."""
    return None if store is None or store.state == "ok" else {"state": store.state, "reason": store.reason}


def _load(load: Load, internal: list[str]) -> Load:
    return replace(_without(load, internal), at=0)


def _worker(status: WorkerStatus, internal: list[str]) -> WorkerStatus:
    models = [name for name in status.models if not is_internal(name, internal)]
    return replace(_without(status, internal), models=models, at=0)


def _without(said: _Said, internal: list[str]) -> _Said:
    """The same, without a reason that names an internal model."""
    return replace(said, reason="") if is_internal(said.reason, internal) else said
