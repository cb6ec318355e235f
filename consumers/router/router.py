"""Triage: while MLX is saturated, simple requests go to Ollama, and the others are marked as MLX's own.

It pulls only while the gate is open: a fresh load event says that MLX is saturated, Ollama works and has room, and
would answer sooner than MLX begins. Each request is looked at once: what is not spilled moves to the lane that only
MLX serves.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

import msgspec

from consumers.engines.ollama import OllamaClient
from consumers.router.triage import Triage
from pipeline.broker.connection import BusError, Delivery, Message, Subscription
from pipeline.config import Config
from pipeline.core.ending import Abandoned, Moved, Outcome, Returned, Settled
from pipeline.core.envelope import read_envelope
from pipeline.core.rests import LaneRests
from pipeline.core.saturation import Capacity
from pipeline.core.scheduler import Scheduler
from pipeline.core.triage import Room, saturated
from pipeline.delivery.held import Fresh, Held, Resumed
from pipeline.delivery.lease import LeaseKeeper
from pipeline.delivery.puller import Puller
from pipeline.process.lifecycle import Lifecycle
from pipeline.process.role import Role
from pipeline.wire.messages import RequestEvent
from pipeline.wire.subjects import (
    EVENT,
    LANE_OF_SUBJECT,
    LANES,
    QUEUED_PREFIX,
    STORED_SEQUENCE,
    STORED_SUBJECT,
    STREAM_REQUESTS,
    Lane,
    Move,
    Priority,
    Task,
)

log = logging.getLogger(__name__)

_event_decoder = msgspec.json.Decoder(RequestEvent)

# A spilled request counts as being on its way to Ollama until it has started there, or for this long.
UNDERWAY_S = 10.0
# Nothing opens the gate without an event, but facts go stale without one.
_LOOK_AGAIN_S = 0.5
_PAUSE_S = 0.2
_LANES = tuple(lane for lane in LANES if lane.task is not Task.COMPLEX)


@dataclass(slots=True)
class Router:
    """Triage under saturation. One per broker is enough; several share the lanes."""

    me: Role
    config: Config
    client: OllamaClient
    _scheduler: Scheduler = field(init=False)
    _puller: Puller = field(init=False)
    _leases: LeaseKeeper = field(init=False)
    _triage: Triage = field(init=False)
    _underway: dict[str, float] = field(init=False, default_factory=dict)
    _rests: LaneRests = field(init=False, default_factory=LaneRests)
    _handling: asyncio.Future[None] | None = field(init=False, default=None)
    _announcements: Subscription | None = field(init=False, default=None)
    _changed: asyncio.Event = field(init=False, default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        config = self.config
        self._triage = Triage(self.me, config, self.client)
        self._scheduler = Scheduler(config.weights, config.floor_share, config.max_wait_s, _LANES)
        self._puller = Puller(self.me.bus, STREAM_REQUESTS, self._on_surplus, config.lease_s)
        self._leases = LeaseKeeper(config.lease_s, clock=self.me.bus.clock)

    async def run(self, lifecycle: Lifecycle) -> None:
        """Route until lifecycle asks to stop."""
        self.me.peers.on_change = self._changed.set
        self.me.bus.on_reconnect(self._scheduler.forget)
        await self._puller.start()
        await self.me.bus.subscribe(f"{EVENT}.*.started", self._on_started)
        lifecycle.report("ready")
        async with asyncio.TaskGroup() as group:
            renewing, routing = group.create_task(self._leases.run()), group.create_task(self._route())
            await lifecycle.stopping.wait()
            routing.cancel()
            # Between the two steps of a move a request is in two places: it is not left there.
            await asyncio.wait({routing, *filter(None, [self._handling])})
            await self._puller.close()
            renewing.cancel()

    # ---- the gate

    def _open_for(self) -> set[Priority]:
        """The priorities whose requests Ollama would answer before MLX begins them; none while the gate is shut."""
        load = self.me.peers.load("mlx")
        if load is None or not saturated(load):
            return set()
        room = self._room()
        if not room.healthy or room.free <= 0:
            return set()
        return {priority for priority in Priority if room.answer_ms < load.predicted_wait_ms.of(priority)}

    def _room(self) -> Room:
        capacity = Capacity.of(self.me.peers.workers("ollama"))
        load = self.me.peers.load("ollama")
        oldest = self.me.bus.clock.now() - UNDERWAY_S
        self._underway = {request: since for request, since in self._underway.items() if since > oldest}
        queued = load.queued.high + load.queued.medium + load.queued.low if load is not None else 0
        waiting = max(queued, len(self._underway))
        answer_s = 0.0
        if capacity.tokens_per_s > 0:
            own_s = capacity.tokens_per_request * max(capacity.slots_used, 1) / capacity.tokens_per_s
            ahead = max(0, capacity.slots_used + waiting + 1 - capacity.slots_total)
            answer_s = own_s * (1 + ahead / max(capacity.slots_total, 1))
        return Room(
            healthy=capacity.slots_total > 0,
            free=capacity.slots_total + self.config.ollama_queue - capacity.slots_used - waiting,
            answer_ms=answer_s * 1000,
        )

    # ---- pulling

    async def _route(self) -> None:
        while True:
            priorities = self._open_for()
            await self._listen(for_work=bool(priorities))
            if not priorities:
                await self._until_changed()
                continue
            await self._leases.until_certain()
            began_at = asyncio.get_running_loop().time()
            try:
                delivery = await self._next_delivery(priorities)
                if delivery is not None:
                    self._handling = asyncio.ensure_future(self._handle(delivery))
                    await asyncio.shield(self._handling)
            except BusError as error:
                log.warning("routing waits for the broker: %s", error)
                delivery = None
            if delivery is None and asyncio.get_running_loop().time() - began_at < _PAUSE_S:
                await asyncio.sleep(_PAUSE_S)

    async def _listen(self, *, for_work: bool) -> None:
        """Hear what is stored, while anything is pulled."""
        if for_work and self._announcements is None:
            self._announcements = await self.me.bus.subscribe(f"{QUEUED_PREFIX}.>", self._on_announcement)
            self._scheduler.forget()
        elif not for_work and self._announcements is not None:
            await self.me.bus.unsubscribe(self._announcements)
            self._announcements = None

    async def _until_changed(self) -> None:
        try:
            async with asyncio.timeout(_LOOK_AGAIN_S):
                await self._changed.wait()
        except TimeoutError:
            pass
        self._changed.clear()

    async def _next_delivery(self, priorities: set[Priority]) -> Delivery | None:
        loop = asyncio.get_running_loop()
        lanes = self._lanes_of(priorities)
        for lane in self._scheduler.order(loop.time(), wall_now=self.me.bus.clock.wall()):
            if lane not in lanes:
                continue
            announced = self._scheduler.announced(lane)
            if delivery := await self._puller.take(lane.consumer):
                return delivery
            self._scheduler.empty(lane, loop.time(), announced=announced)
        if not lanes:
            await self._until_changed()
            return None
        return await self._puller.wait([lane.consumer for lane in lanes], self._until_shut(priorities, lanes))

    def _lanes_of(self, priorities: set[Priority]) -> list[Lane]:
        """What may be pulled now."""
        now = asyncio.get_running_loop().time()
        return [lane for lane in _LANES if lane.priority in priorities and not self._rests.has_left(lane, now)]

    async def _until_shut(self, priorities: set[Priority], lanes: list[Lane]) -> None:
        """Ends when what is being pulled is no longer what the gate is open for."""
        while self._open_for() == priorities and self._lanes_of(priorities) == lanes:
            await self._until_changed()

    async def _on_surplus(self, delivery: Delivery) -> None:
        await self._hold(delivery).end(Returned())

    def _hold(self, delivery: Delivery) -> Held:
        envelope = read_envelope(delivery, *LANE_OF_SUBJECT[delivery.message.subject])
        return Held.taken(self.me.bus, delivery, envelope, self._leases, tracing=self.me.tracing)

    # ---- one request

    async def _handle(self, delivery: Delivery) -> None:
        held = self._hold(delivery)
        envelope, lane = held.envelope, LANE_OF_SUBJECT[delivery.message.subject]
        self._scheduler.start(
            envelope.id,
            lane,
            stored_at=envelope.stored_at,
            pending=delivery.pending,
            now=asyncio.get_running_loop().time(),
            wall_now=self.me.bus.clock.wall(),
            sequence=delivery.sequence,
        )
        try:
            await self._end(held, lane)
        finally:
            held.release()
            self._scheduler.finish(envelope.id, 1.0)

    async def _end(self, held: Held, lane: Lane) -> None:
        match await held.open():
            case Settled() | Abandoned() as outcome:
                await held.end(outcome)
            case Resumed():
                # MLX alone can go on with the answer; in another lane the request would wait again.
                self._rests.leave(lane, asyncio.get_running_loop().time())
                await held.end(Returned())
            case Fresh():
                with held.process() as span:
                    span.queue_wait(held.envelope.stored_at, self.me.bus.clock.wall())
                    await self._carry_out(held, await self._triage.outcome(held, self._room))

    async def _carry_out(self, held: Held, outcome: Outcome) -> None:
        spills = isinstance(outcome, Moved) and outcome.how is Move.SPILLED
        if spills:
            # Before it is stored: Ollama's worker may have begun it by the time that `end` returns.
            self._underway[held.envelope.id] = self.me.bus.clock.now()
        if await held.end(outcome) is not outcome and spills:
            self._underway.pop(held.envelope.id, None)

    # ---- listening

    async def _on_announcement(self, message: Message) -> None:
        lane = LANE_OF_SUBJECT.get(message.headers.get(STORED_SUBJECT, ""))
        if lane is not None and lane in _LANES:
            self._scheduler.arrived(lane, int(message.headers.get(STORED_SEQUENCE, 0)))

    async def _on_started(self, message: Message) -> None:
        self._underway.pop(_event_decoder.decode(message.data).id, None)
        self._changed.set()
