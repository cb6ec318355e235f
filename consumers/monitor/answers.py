"""The monitor's services: statistics of the queue, the position of a request, the list of models."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import msgspec

from consumers.monitor.load import ENGINE_OF, ENGINES, LoadReporter
from consumers.monitor.view import QueueView
from pipeline.broker.connection import Unreachable
from pipeline.config import Config
from pipeline.core.envelope import read_envelope
from pipeline.core.index import Place
from pipeline.core.pauses import shown_pauses
from pipeline.core.statistics import Statistics, Unknown, servers_of
from pipeline.core.turns import requests_before
from pipeline.process.role import Role
from pipeline.wire.answers import Answer, decode_answer, is_last
from pipeline.wire.messages import Model, ModelList, Position, RequestEvent
from pipeline.wire.subjects import (
    MODELS,
    QUEUE_POSITION,
    QUEUE_POSITION_OF_TENANT,
    QUEUE_STATS,
    STREAM_DEAD,
    Priority,
    is_request_id,
    is_request_name,
    position_tenant,
    reply_subject,
    request_name,
)

# Each worker publishes its status every second, so all of them have been heard after this time.
_WORKERS_HEARD_AFTER_S = 1.5


@dataclass(slots=True)
class QueueAnswers:
    """The monitor's services. The one writer of the statistics.

    Args:
        me: the role.
        config: the settings.
        view: the unfinished requests.
        load: the lanes' depths and the engines' loads.
    """

    me: Role
    config: Config
    view: QueueView
    load: LoadReporter
    _statistics: Statistics = field(init=False)
    _dead: int = field(init=False, default=0)
    _stop: Callable[[], Awaitable[None]] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._statistics = Statistics(self.me.bus.clock.now())

    async def start(self) -> None:
        """Begin to reply; twice is harmless.

        Each monitor replies in a queue group of its own. A shared group would give some requests to a frozen member.
        """
        if self._stop is None:
            self._stop = await self.me.bus.serve(
                "headrace-queue",
                "Queue statistics, a request's position, and the models that answer",
                {
                    QUEUE_STATS: self._stats,
                    QUEUE_POSITION: self._position,
                    QUEUE_POSITION_OF_TENANT: self._position,
                    MODELS: self._models,
                },
                queue=self.me.bus.new_inbox(),
            )

    async def stop(self) -> None:
        """Stop replying; twice is harmless."""
        stop, self._stop = self._stop, None
        if stop is not None:
            await stop()

    def record(self, event: RequestEvent) -> None:
        """Count what happened to a request."""
        self._statistics.record(event, self.me.bus.clock.now())

    async def newest_on_record(self, name: str) -> Answer | None:
        """Return the newest message of a request's record, or None if there is none.

        Raises:
            Unreachable: the broker does not answer.
        """
        if not is_request_name(name):
            return None
        found = await self.me.bus.last_answer(reply_subject(name))
        return None if found is None or found[1] is None else decode_answer(found[1])

    async def _stats(self, _subject: str, _body: bytes) -> bytes:
        queued, running = self.load.queued, dict.fromkeys(Priority, 0)
        workers = [status for engine in ENGINES for status in self.me.peers.workers(engine)]
        for status in workers:
            for priority in Priority:
                running[priority] += getattr(status.running, priority)
        # Statistics are wanted most while the broker has a fault.
        with contextlib.suppress(Unreachable):
            self._dead = (await self.me.bus.stream_state(STREAM_DEAD)).messages
        report = self._statistics.report(
            queued={p: sum(queued[engine][p] for engine in ENGINES) for p in Priority},
            running=running,
            loads=self.load.loads,
            dead=self._dead,
            now=self.me.bus.clock.now(),
            unknown=self._unknown(),
            filled=self.view.filled,
            store=self.me.peers.store(),
        )
        report.servers, report.cannot_load = servers_of(workers), self.me.peers.cannot_load()
        report.paused, report.paused_tenants = shown_pauses(self.me.peers.pauses.state)
        return msgspec.json.encode(report)

    def _unknown(self) -> list[Unknown]:
        unknown: list[Unknown] = []
        if not self.load.is_known:
            unknown.append("queued")
        if self.me.bus.clock.now() - self._statistics.started_at < _WORKERS_HEARD_AFTER_S:
            unknown.append("running")
        if self.view.filling:
            unknown.append("positions")
        return unknown

    async def _models(self, _subject: str, _body: bytes) -> bytes:
        return msgspec.json.encode(ModelList([Model(name) for name in self.me.peers.catalogue(self.config).listed()]))

    async def _position(self, subject: str, body: bytes) -> bytes:
        request_id = body.decode(errors="replace").strip().strip('"')
        if not is_request_id(request_id):
            return msgspec.json.encode(Position(request_id, "unknown"))
        name = request_name(position_tenant(subject), request_id)
        place = self.view.find(name)
        if place is not None and self.view.state(place) == "queued":
            return msgspec.json.encode(self._queued(request_id, place, position_tenant(subject)))
        # The record is closed before the event is published, and a reader of the record may ask at once.
        newest = await self.newest_on_record(name)
        if newest is not None and not (place is not None and is_last(newest) and await self._is_older(newest, place)):
            return msgspec.json.encode(Position(request_id, "finished" if is_last(newest) else "running"))
        if place is not None:
            return msgspec.json.encode(Position(request_id, "running"))
        if self.view.filling:
            return msgspec.json.encode(Position(request_id, "filling", msgspec.UNSET, msgspec.UNSET))
        return msgspec.json.encode(Position(request_id, "unknown"))

    async def _is_older(self, newest: Answer, place: Place) -> bool:
        """Whether a record's end is that of an earlier request of the same id, and the one at place still runs."""
        stored = await self.me.bus.stored(place.stream, place.sequence)
        if stored is None:
            return False
        envelope = read_envelope(stored, place.priority, moves=self.me.bus.moves)
        return (envelope.id, envelope.created) != (newest.id, newest.created)

    def _queued(self, request_id: str, place: Place, tenant: str) -> Position:
        engine = ENGINE_OF[place.stream]
        depth = self.load.queued[engine][place.priority]
        position, estimated = self.view.position(place, depth)
        if engine == "mlx":
            in_turn = requests_before(position, tenant, self.load.tenants[place.priority])
            position, estimated = in_turn, estimated or in_turn != position
        if self.me.peers.pauses.now.holds(place.priority, tenant):
            return Position(request_id, "queued", position, None, estimated or msgspec.UNSET, paused=True)
        eta_ms = round(1000 * self.load.wait_s(engine, place.priority, position), 1)
        return Position(request_id, "queued", position, eta_ms, estimated or msgspec.UNSET)
