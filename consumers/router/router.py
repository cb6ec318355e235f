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
from pipeline.broker.connection import BusError, Delivery, Message, Subscription
from pipeline.config import Config
from pipeline.core.envelope import Envelope, read_envelope
from pipeline.core.models import is_internal
from pipeline.core.saturation import Capacity
from pipeline.core.scheduler import Scheduler
from pipeline.core.triage import Decision, Outcome, Room, Verdict, Waiting, classify, saturated, spill
from pipeline.delivery.lease import Lease, LeaseKeeper
from pipeline.delivery.move import count_as_given_back, give_back, move
from pipeline.delivery.puller import Puller
from pipeline.delivery.record import LeaseLost, RecordWriter
from pipeline.process.lifecycle import Lifecycle
from pipeline.process.role import Role
from pipeline.wire.errors import HeadraceError
from pipeline.wire.messages import EventKind, RequestEvent, encode
from pipeline.wire.requests import ChatRequest, EmbeddingRequest, Request, decode_request
from pipeline.wire.subjects import (
    EVENT,
    LANE_OF_SUBJECT,
    LANES,
    QUEUED_PREFIX,
    STORED_SEQUENCE,
    STORED_SUBJECT,
    STREAM_REPLIES,
    STREAM_REQUESTS,
    Lane,
    Move,
    Priority,
    Task,
    ollama_subject,
    reply_subject,
)
from pipeline.worker.serving import refuse

log = logging.getLogger(__name__)

_event_decoder = msgspec.json.Decoder(RequestEvent)

# A spilled request counts as being on its way to Ollama until it has started there, or for this long.
UNDERWAY_S = 10.0
# Nothing opens the gate without an event, but facts go stale without one.
_LOOK_AGAIN_S = 0.5
_PAUSE_S = 0.2
# A begun answer at the head of a lane is left to MLX, with its lane, for this long.
_LEAVE_S = 2.0
_LANES = tuple(lane for lane in LANES if lane.task is not Task.COMPLEX)
_QUESTION = "Could a very small language model answer the following request well? Reply with yes or no only.\n\n{}"
_QUESTION_CHARS = 600


@dataclass(slots=True)
class Router:
    """Triage under saturation. One per broker is enough; several share the lanes."""

    me: Role
    config: Config
    client: OllamaClient
    _scheduler: Scheduler = field(init=False)
    _puller: Puller = field(init=False)
    _leases: LeaseKeeper = field(init=False)
    _classifies: bool = field(init=False)
    _underway: dict[str, float] = field(init=False, default_factory=dict)
    _left_until: dict[Lane, float] = field(init=False, default_factory=dict)
    _handling: asyncio.Future[None] | None = field(init=False, default=None)
    _announcements: Subscription | None = field(init=False, default=None)
    _changed: asyncio.Event = field(init=False, default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        config = self.config
        # Only an internal model works for the pipeline; any other one answers users.
        self._classifies = is_internal(config.classifier_model, config.internal_models)
        self._scheduler = Scheduler(config.weights, config.floor_share, config.max_wait_s, _LANES)
        self._puller = Puller(self.me.bus, STREAM_REQUESTS, self._on_surplus, config.lease_s)
        self._leases = LeaseKeeper(config.lease_s)

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
            except LeaseLost:
                log.info("another has the request; dropped")
                continue
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
        return [lane for lane in _LANES if lane.priority in priorities and self._left_until.get(lane, 0.0) <= now]

    async def _until_shut(self, priorities: set[Priority], lanes: list[Lane]) -> None:
        """Ends when what is being pulled is no longer what the gate is open for."""
        while self._open_for() == priorities and self._lanes_of(priorities) == lanes:
            await self._until_changed()

    async def _on_surplus(self, delivery: Delivery) -> None:
        if self._leases.stood_still():
            await count_as_given_back(self.me.bus, delivery, self._envelope(delivery))
        else:
            await give_back(self.me.bus, delivery, self._envelope(delivery))

    def _envelope(self, delivery: Delivery) -> Envelope:
        return read_envelope(delivery, *LANE_OF_SUBJECT[delivery.message.subject])

    # ---- triage

    async def _handle(self, delivery: Delivery) -> None:
        envelope = self._envelope(delivery)
        if self._leases.stood_still():
            await count_as_given_back(self.me.bus, delivery, envelope)
            raise LeaseLost
        lane = LANE_OF_SUBJECT[delivery.message.subject]
        now = asyncio.get_running_loop().time()
        self._scheduler.start(
            envelope.id,
            lane,
            stored_at=envelope.stored_at,
            pending=delivery.pending,
            now=now,
            wall_now=self.me.bus.clock.wall(),
            sequence=delivery.sequence,
        )
        lease = self._leases.hold(delivery, lambda: None)
        try:
            with self.me.tracing.process(
                delivery.message.subject,
                delivery.message.headers,
                request_id=envelope.id,
                priority=envelope.priority,
                task=envelope.task,
                attempt=envelope.delivered,
            ) as span:
                span.queue_wait(envelope.stored_at, self.me.bus.clock.wall())
                await self._triage(delivery, envelope, lease)
        finally:
            self._leases.release(lease)
            self._scheduler.finish(envelope.id, 1.0)

    async def _triage(self, delivery: Delivery, envelope: Envelope, lease: Lease) -> None:
        waited_ms = max(0.0, (self.me.bus.clock.wall() - envelope.stored_at) * 1000)
        if envelope.delivered > 1 and await self.me.bus.last_message(STREAM_REPLIES, reply_subject(envelope.id)):
            # Its reader has a part of the answer, which MLX alone can go on with; in another lane it would wait again.
            lane = LANE_OF_SUBJECT[delivery.message.subject]
            self._left_until[lane] = asyncio.get_running_loop().time() + _LEAVE_S
            await give_back(self.me.bus, delivery, envelope)
            return
        try:
            request = self._read(delivery, envelope)
        except HeadraceError as error:
            # Moving it would lose what was wrong with its headers.
            writer = RecordWriter(self.me.bus, envelope, lease.holds)
            await refuse(self.me.bus, writer, delivery, error)
            return
        with self.me.tracing.triage() as span:
            verdict = await self._verdict(request, envelope)
            load, room = self.me.peers.load("mlx"), self._room()
            waiting = Waiting(
                verdict=verdict,
                priority=envelope.priority,
                ollama_may=self._ollama_may(request),
                mlx_may=self._mlx_may(request),
                moved=envelope.move not in (None, Move.REPLAYED),
            )
            decision = spill(waiting, load, room)
            span.decision(
                verdict.task,
                decision.reason,
                move={Outcome.SPILL: Move.SPILLED, Outcome.COMPLEX: Move.COMPLEX}.get(decision.outcome),
                saturation=load.saturation if load else None,
                mlx_wait_ms=load.predicted_wait_ms.of(envelope.priority) if load else None,
                ollama_ms=room.answer_ms,
            )
            if not lease.holds():
                raise LeaseLost
            await self._carry_out(delivery, envelope, verdict, decision, waited_ms)

    def _read(self, delivery: Delivery, envelope: Envelope) -> Request:
        if envelope.fault is not None:
            raise envelope.fault
        return decode_request(delivery.message.data, max_body_bytes=self.config.max_body_bytes)

    async def _verdict(self, request: Request, envelope: Envelope) -> Verdict:
        """What kind of work it is."""
        verdict = classify(request, None if envelope.task is Task.UNTRIAGED else envelope.task)
        if isinstance(request, ChatRequest) and not verdict.certain and self._classifies:
            return await self._second_opinion(request, verdict)
        return verdict

    async def _second_opinion(self, request: ChatRequest, verdict: Verdict) -> Verdict:
        """Ask an internal model about a doubtful case; without an answer in time the doubt stands."""
        question = _QUESTION.format(request.chat[-1].text()[:_QUESTION_CHARS])
        said = await self.client.ask_internal(
            self.config.classifier_model, question, timeout_s=self.config.classifier_timeout_s
        )
        if said is None or not said.lower().startswith("yes"):
            return verdict
        return verdict._replace(task=Task.SIMPLE, certain=True, reason="an internal model says it is simple")

    def _ollama_may(self, request: Request) -> bool:
        wanted, catalogue = request.wanted_model, self.me.peers.catalogue(self.config)
        if isinstance(request, EmbeddingRequest):
            return catalogue.embedder_on_ollama(wanted) is not None
        return catalogue.model_on("ollama", wanted) is not None

    def _mlx_may(self, request: Request) -> bool:
        """Whether MLX has the model; while no worker says what it has, it may have any."""
        if isinstance(request, EmbeddingRequest):
            return False
        catalogue = self.me.peers.catalogue(self.config)
        return not catalogue.mlx or catalogue.model_on("mlx", request.wanted_model) is not None

    async def _carry_out(
        self,
        delivery: Delivery,
        envelope: Envelope,
        verdict: Verdict,
        decision: Decision,
        waited_ms: float,
    ) -> None:
        if decision.outcome is Outcome.LEAVE:
            await give_back(self.me.bus, delivery, envelope, delay_s=_PAUSE_S)
            return
        spills = decision.outcome is Outcome.SPILL
        priority = envelope.priority
        to = ollama_subject(priority) if spills else Lane(priority, Task.COMPLEX).subject
        how = Move.SPILLED if spills else Move.COMPLEX
        if spills:
            self._underway[envelope.id] = self.me.bus.clock.now()
        moved = await move(
            self.me.bus, self.me.tracing, delivery, envelope, to=to, how=how, task=verdict.task, reason=decision.reason
        )
        if not moved:
            self._underway.pop(envelope.id, None)
            await give_back(self.me.bus, delivery, envelope, delay_s=_PAUSE_S)
            return
        kind: EventKind = "spilled" if spills else "triaged"
        event = RequestEvent(
            envelope.id,
            kind,
            envelope.priority,
            wait_ms=round(waited_ms, 3),
            reason=decision.reason,
            tenant=envelope.tenant,
        )
        await self.me.bus.publish(f"{EVENT}.{envelope.priority}.{kind}", encode(event))

    # ---- listening

    async def _on_announcement(self, message: Message) -> None:
        lane = LANE_OF_SUBJECT.get(message.headers.get(STORED_SUBJECT, ""))
        if lane is not None and lane in _LANES:
            self._scheduler.arrived(lane, int(message.headers.get(STORED_SEQUENCE, 0)))

    async def _on_started(self, message: Message) -> None:
        self._underway.pop(_event_decoder.decode(message.data).id, None)
        self._changed.set()
