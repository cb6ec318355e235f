"""The backpressure monitor: publishes each engine's load, answers for the queue, cancels what waits.

It hears every stored request, every worker and every event, and asks the broker for the lanes' depths when one of them
says that something has changed: nothing is polled for but the passing of time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import msgspec

from pipeline.broker.connection import BusError, Message
from pipeline.broker.jetstream import to_stored
from pipeline.config import Config
from pipeline.core.admission import Admission, Waiting
from pipeline.core.envelope import read_envelope
from pipeline.core.index import QueueIndex, State
from pipeline.core.saturation import Capacity, SaturationMonitor
from pipeline.core.scheduler import shares
from pipeline.core.statistics import Statistics
from pipeline.delivery.withdraw import Withdrawals, withdraw
from pipeline.process.lifecycle import Lifecycle
from pipeline.process.role import Role
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import (
    Cancelled,
    EngineName,
    Load,
    Model,
    ModelList,
    Position,
    RequestEvent,
    decode_answer,
    encode,
    is_last,
)
from pipeline.wire.subjects import (
    CANCEL,
    EVENT,
    LANE_OF_SUBJECT,
    LANES,
    LOAD,
    MODELS,
    QUEUE_POSITION,
    QUEUE_STATS,
    QUEUED_PREFIX,
    RELAYED,
    STORED_SUBJECT,
    STREAM_DEAD,
    STREAM_OLLAMA,
    STREAM_REPLIES,
    STREAM_REQUESTS,
    Priority,
    Task,
    is_request_id,
    ollama_consumer,
    ollama_subject,
    reply_subject,
)

log = logging.getLogger(__name__)

ENGINES: tuple[EngineName, ...] = ("mlx", "ollama")
# Facts that come within this time are looked at together; well below the 100 ms that a change of level may take.
_GATHER_S = 0.02
_EVERY_S = 1.0
_EVERY_IDLE_S = 5.0
# What is spilled is decided by the predicted waits, which grow from nothing as an overload begins.
_EVERY_SATURATED_S = 0.1
_FORGET_EVERY_S = 60.0
# A request that is cancelled may be moving: it is looked for where it stands next.
_CANCEL_TRIES = 3

_event_decoder = msgspec.json.Decoder(RequestEvent)
_CONSUMERS: dict[EngineName, dict[str, Priority]] = {
    "mlx": {lane.consumer: lane.priority for lane in LANES},
    "ollama": {ollama_consumer(priority): priority for priority in Priority},
}
_STREAMS: dict[EngineName, str] = {"mlx": STREAM_REQUESTS, "ollama": STREAM_OLLAMA}
_SUBJECT_OF_CONSUMER = {lane.consumer: lane.subject for lane in LANES} | {
    ollama_consumer(priority): ollama_subject(priority) for priority in Priority
}
_NOTHING: Mapping[str, int] = {}
_ENGINE_OF: dict[str, EngineName] = {stream: engine for engine, stream in _STREAMS.items()}
_PLACE_OF_SUBJECT = {lane.subject: (STREAM_REQUESTS, lane.priority) for lane in LANES} | {
    ollama_subject(priority): (STREAM_OLLAMA, priority) for priority in Priority
}


class Arrival(NamedTuple):
    """A request with a deadline (UTC seconds), as it was stored: how many of its priority were queued before it."""

    id: str
    sequence: int
    deadline: float
    place: int
    may_spill: bool


@dataclass(slots=True)
class Monitor:
    """One is enough; its load events are retained by the broker, its counts begin anew when it does."""

    me: Role
    config: Config
    _saturation: dict[EngineName, SaturationMonitor] = field(init=False)
    _statistics: Statistics = field(init=False)
    _index: QueueIndex = field(init=False, default_factory=QueueIndex)
    _queued: dict[EngineName, dict[Priority, int]] = field(init=False)
    _counted_at: dict[EngineName, float] = field(init=False, default_factory=dict)
    _loads: dict[EngineName, Load] = field(init=False, default_factory=dict)
    _said_at: dict[EngineName, float] = field(init=False, default_factory=dict)
    _changed: asyncio.Event = field(init=False, default_factory=asyncio.Event)
    _admission: Admission = field(init=False)
    _arrived: list[Arrival] = field(init=False, default_factory=list)
    _withdrawals: Withdrawals = field(init=False)
    _missed: asyncio.Event = field(init=False, default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        config = self.config
        parts = shares(config.weights, config.floor_share)
        self._saturation = {
            engine: SaturationMonitor(engine, parts, config.target_wait_s, config.busy_at, config.saturated_at)
            for engine in ENGINES
        }
        self._admission = Admission(parts, config.target_wait_s)
        self._withdrawals = Withdrawals(self.me.bus, self._index)
        self._statistics = Statistics(time.monotonic())
        self._queued = {engine: dict.fromkeys(Priority, 0) for engine in ENGINES}

    async def run(self, lifecycle: Lifecycle) -> None:
        """Watch and answer until lifecycle asks to stop."""
        self.me.peers.on_change = self._changed.set
        self.me.bus.on_reconnect(self._missed.set)
        await self.me.bus.subscribe(f"{QUEUED_PREFIX}.>", self._on_stored)
        await self.me.bus.subscribe(f"{EVENT}.>", self._on_event)
        await self.me.bus.subscribe(f"{CANCEL}.*", self._on_cancel)
        await self._read_queue()
        await self.me.bus.serve(
            "headrace-queue",
            "Queue statistics, a request's position, and the models that answer",
            {QUEUE_STATS: self._answer_stats, QUEUE_POSITION: self._answer_position, MODELS: self._answer_models},
        )
        async with asyncio.TaskGroup() as group:
            work = (self._watch(lifecycle), self._forget_finished(), self._catch_up(), self._withdrawals.run())
            tasks = [group.create_task(one) for one in work]
            await lifecycle.stopping.wait()
            for task in tasks:
                task.cancel()

    # ---- load

    async def _watch(self, lifecycle: Lifecycle) -> None:
        told = False
        while True:
            self._changed.clear()
            try:
                await self._look()
            except BusError as error:
                log.warning("no load events: %s", error)
            else:
                if not told:
                    lifecycle.report("ready")
                told = True
            try:
                async with asyncio.timeout(self._pause_s()):
                    await self._changed.wait()
            except TimeoutError:
                pass
            await asyncio.sleep(_GATHER_S)

    async def _look(self) -> None:
        """Publish every load that has changed its level or is due."""
        for engine in ENGINES:
            await self._count(engine)
            await self._observe(engine)
        self._admit()

    async def _count(self, engine: EngineName) -> None:
        """Ask for the depths of an engine's lanes where something came or went, and else now and then."""
        now = time.monotonic()
        if now - self._counted_at.get(engine, -_EVERY_S) < _EVERY_S:
            return
        self._counted_at[engine] = now
        consumers = {state.name: state for state in await self.me.bus.consumers(_STREAMS[engine])}
        queued = dict.fromkeys(Priority, 0)
        for name, priority in _CONSUMERS[engine].items():
            if name in consumers:
                queued[priority] += consumers[name].num_pending
        self._queued[engine] = queued

    async def _observe(self, engine: EngineName) -> None:
        capacity = Capacity.of(self.me.peers.workers(engine))
        self._admission.observe(engine, capacity, time.monotonic())
        changed = True
        while changed:
            now = time.monotonic()
            load, changed = self._saturation[engine].observe(
                capacity, self._queued[engine], now=now, wall_now=self.me.bus.clock.wall()
            )
            self._loads[engine] = load
            if changed:
                log.info("%s is %s: %s", engine, load.level, load.reason)
            if changed or now - self._said_at.get(engine, -_EVERY_IDLE_S) >= self._every_s(engine):
                await self.me.bus.publish(f"{LOAD}.{engine}", encode(load))
                self._said_at[engine] = now

    def _every_s(self, engine: EngineName) -> float:
        load = self._loads[engine]
        if load.slots.used or any(self._queued[engine].values()):
            return _EVERY_SATURATED_S if load.level == "saturated" else _EVERY_S
        return _EVERY_IDLE_S

    def _pause_s(self) -> float:
        """Until the next load is due, or a level may be left."""
        now = time.monotonic()
        due = [self._said_at.get(engine, now) + self._every_s(engine) for engine in self._loads]
        leaving = [wake for s in self._saturation.values() if (wake := s.next_wake()) is not None]
        return max(0.0, min([*due, *leaving, now + _EVERY_S]) - now)

    # ---- listening

    async def _catch_up(self) -> None:
        """Learn after each reconnect what was stored while nobody listened."""
        while True:
            await self._missed.wait()
            self._missed.clear()
            try:
                await self._read_queue()
            except BusError as error:
                log.info("the queue is not read yet: %s", error)
                await asyncio.sleep(_EVERY_S)
                self._missed.set()

    async def _read_queue(self) -> None:
        """Learn what was stored, and what was begun, while this monitor did not listen."""
        for engine in ENGINES:
            states = await self.me.bus.consumers(_STREAMS[engine])
            begun = {_SUBJECT_OF_CONSUMER.get(state.name, ""): state.delivered.stream_seq for state in states}
            async for message in self.me.bus.scan(_STREAMS[engine], ">"):
                self._note_stored(message, begun)

    async def _on_stored(self, message: Message) -> None:
        if (arrival := self._note_stored(message)) is not None:
            self._arrived.append(arrival)
        self._changed.set()

    def _note_stored(self, message: Message, begun: Mapping[str, int] = _NOTHING) -> Arrival | None:
        """Enter a request in the index.

        Args:
            message: the request's headers, with those of the stream.
            begun: up to which sequence the requests on a subject have been handed to a worker.

        Returns:
            What admission wants to know of one that has a deadline.
        """
        # Not by `Nats-Stream`: it stands first, and is damaged where the publisher's headers had no proper end.
        where = _PLACE_OF_SUBJECT.get(message.headers.get(STORED_SUBJECT, ""))
        if where is None:
            return None
        (stream, priority), stored = where, to_stored(message)
        self._counted_at.pop(_ENGINE_OF[stream], None)
        lane = LANE_OF_SUBJECT.get(stored.subject)
        envelope = read_envelope(stored, priority, default_timeout_s=self.config.default_timeout_s)
        state: State = "running" if stored.sequence <= begun.get(stored.subject, 0) else "queued"
        place = self._index.stored(envelope.id, stream, priority, stored.sequence, envelope.deadline, state)
        if envelope.deadline is None or envelope.fault is not None:
            return None
        self._withdrawals.expect(envelope.deadline)
        may_spill = lane is not None and lane.task is not Task.COMPLEX
        return Arrival(envelope.id, stored.sequence, envelope.deadline, place, may_spill)

    async def _on_event(self, message: Message) -> None:
        event = _event_decoder.decode(message.data)
        self._statistics.record(event)
        self._index.record(event)
        if event.kind == "done":
            return
        for engine in ENGINES if event.engine is None else (event.engine,):
            self._counted_at.pop(engine, None)

    async def _forget_finished(self) -> None:
        while True:
            await asyncio.sleep(_FORGET_EVERY_S)
            if len(self._index):
                try:
                    for stream in _STREAMS.values():
                        self._index.forget_before(stream, (await self.me.bus.stream_state(stream)).first_seq)
                except BusError as error:
                    log.debug("the queue's index was not tidied: %s", error)

    # ---- answering

    async def _answer_stats(self, _: bytes) -> bytes:
        running = dict.fromkeys(Priority, 0)
        for engine in ENGINES:
            for status in self.me.peers.workers(engine):
                for priority in Priority:
                    running[priority] += getattr(status.running, priority)
        return msgspec.json.encode(
            self._statistics.report(
                queued={p: sum(self._queued[engine][p] for engine in ENGINES) for p in Priority},
                running=running,
                loads=self._loads,
                dead=(await self.me.bus.stream_state(STREAM_DEAD)).messages,
                now=time.monotonic(),
            )
        )

    async def _answer_models(self, _: bytes) -> bytes:
        return msgspec.json.encode(ModelList([Model(name) for name in self.me.peers.catalogue(self.config).listed()]))

    async def _answer_position(self, body: bytes) -> bytes:
        request_id = body.decode(errors="replace").strip().strip('"')
        entry = self._index.find(request_id)
        if entry is None or entry.state == "running":
            # The record is closed before the event says so, and whoever has read it may ask at once.
            on_record = await self._state_on_record(request_id)
            state = "running" if entry is not None and on_record == "unknown" else on_record
            return msgspec.json.encode(Position(request_id, state))
        position = self._index.position(request_id)
        load = self._loads.get("ollama" if entry.stream == STREAM_OLLAMA else "mlx")
        eta_ms = 0.0
        if load is not None:
            share = (position + 1) / self._index.depth(entry.stream, entry.priority)
            eta_ms = round(load.predicted_wait_ms.of(entry.priority) * share, 1)
        return msgspec.json.encode(Position(request_id, entry.state, position, eta_ms))

    async def _state_on_record(self, request_id: str) -> str:
        """`finished` where an answer is kept, `running` where one is being written, else `unknown`."""
        if not is_request_id(request_id):
            return "unknown"
        found = await self.me.bus.last_message(STREAM_REPLIES, reply_subject(request_id))
        if found is None:
            return "unknown"
        return "finished" if is_last(decode_answer(found[1])) else "running"

    # ---- ending what waits

    def _admit(self) -> None:
        """Refuse what arrived since the last look and would begin only after its deadline."""
        now, wall_now = time.monotonic(), self.me.bus.clock.wall()
        refused: Counter[tuple[str, Priority]] = Counter()
        arrived, self._arrived = self._arrived, []
        for arrival in arrived:
            entry = self._index.find(arrival.id)
            if entry is None or entry.sequence != arrival.sequence or entry.state != "queued":
                continue
            engine, lane = _ENGINE_OF[entry.stream], (entry.stream, entry.priority)
            queued = self._queued[engine]
            waiting = Waiting(
                priority=entry.priority,
                # Whatever the index has missed, no more can be before it than the broker has.
                place=max(0, min(arrival.place - refused[lane], queued[entry.priority] - 1)),
                left_s=arrival.deadline - wall_now,
                may_spill=arrival.may_spill,
            )
            if (error := self._admission.decide(engine, waiting, queued, now)) is not None:
                refused[lane] += 1
                self._withdrawals.end(arrival.id, error, untouched=True)

    async def _on_cancel(self, message: Message) -> None:
        if RELAYED not in message.headers:
            request_id = message.subject.removeprefix(f"{CANCEL}.")
            entry = self._index.find(request_id)
            waits = entry is not None and entry.state == "queued"
            self._withdrawals.soon(partial(self._answer_cancel, request_id, message.reply, waits=waits), urgent=True)

    async def _answer_cancel(self, request_id: str, reply: str, *, waits: bool) -> None:
        try:
            state = await self._cancel(request_id, waits=waits)
            if reply:
                await self.me.bus.publish(reply, msgspec.json.encode(Cancelled(request_id, state)))
        except BusError as error:
            log.warning("%s: not cancelled: %s", request_id, error)

    async def _cancel(self, request_id: str, *, waits: bool) -> str:
        """Cancel a request that waits; one that runs is cancelled by its worker, which hears of it as well.

        Args:
            request_id: its id.
            waits: whether it waited when the cancel came. A worker that has begun it since did not feel meant.
        """
        known = self._index.find(request_id) is not None
        error = HeadraceError(ErrorCode.CANCELLED, f"request {request_id} was cancelled while it waited")
        ended = False
        for _ in range(_CANCEL_TRIES):
            entry = self._index.find(request_id)
            if ended or entry is None or entry.state != "queued":
                break
            ended = await withdraw(self.me.bus, entry, error)
        if waits:
            await self.me.bus.publish(f"{CANCEL}.{request_id}", b"", headers={RELAYED: "monitor"})
        if ended:
            return "cancelled"
        # A worker that has died hears of no cancel, and whoever goes on with the request has not heard of it either.
        worker_is_dead_s = self.config.lease_s + _EVERY_S
        asyncio.get_running_loop().call_later(worker_is_dead_s, self._withdrawals.end, request_id, error)
        state = await self._state_on_record(request_id)
        return state if state == "finished" or (not known and state == "unknown") else "cancelled"
