"""A worker: pulls requests as its engine has room, serves them side by side, says how it is, and drains."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.broker.connection import Delivery, Message, Unreachable
from pipeline.config import Config
from pipeline.core.ending import Failed, Returned
from pipeline.core.envelope import Envelope, read_envelope
from pipeline.core.scheduler import Scheduler
from pipeline.delivery.held import Held
from pipeline.delivery.lease import LeaseKeeper
from pipeline.delivery.puller import Puller
from pipeline.engine import Engine
from pipeline.process.lifecycle import Lifecycle
from pipeline.process.role import Role
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import PerPriorityCount, Slots, WorkerState, WorkerStatus, encode
from pipeline.wire.subjects import CANCEL, LANE_OF_SUBJECT, STORED_SEQUENCE, STORED_SUBJECT, WORKER, Lane, Priority
from pipeline.worker.rescue import Rescue
from pipeline.worker.serving import PATIENCE_S, Serving, ServingContext

log = logging.getLogger(__name__)

STATUS_EVERY_S = 1.0
# Changes within this time share one status.
_STATUS_GATHER_S = 0.02
# With more free slots than these, pulls stand on when one of them is answered: one is for the request that came, one
# for the pull loop's next, the third for what races with it.
_KEEP_STANDING = 2
# What was begun elsewhere is gone on with beyond the slots, up to so many times their number.
_MOST_FULL = 2
# Between two rounds of pulls where the broker refuses them.
_REFUSED_PAUSE_S = 0.2


@dataclass(frozen=True, slots=True)
class Source:
    """Where a worker's requests come from.

    Attributes:
        stream: the work queue.
        consumers: the durable consumer of each lane.
        announcements: where the stream announces what it stores, or empty where it does not.
    """

    stream: str
    consumers: Mapping[Lane, str]
    announcements: str = ""


@dataclass(slots=True)
class Worker:
    """Runs one engine's requests until it is told to stop.

    Args:
        me: the role's connection and name.
        engine: entered by the caller, and left after `run`.
        config: the settings.
        source: what to pull.
        patience_s: how long Ollama's workers have to say which models they have.
    """

    me: Role
    engine: Engine
    config: Config
    source: Source
    patience_s: float = PATIENCE_S
    _scheduler: Scheduler = field(init=False)
    _leases: LeaseKeeper = field(init=False)
    _context: ServingContext = field(init=False)
    _puller: Puller = field(init=False)
    _rescue: Rescue = field(init=False)
    _lane_of: dict[str, Lane] = field(init=False)
    _servings: dict[str, Serving] = field(init=False, default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(init=False, default_factory=set)
    _changed: asyncio.Event = field(init=False, default_factory=asyncio.Event)
    _room: asyncio.Event = field(init=False, default_factory=asyncio.Event)
    _draining: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        config = self.config
        self._scheduler = Scheduler(config.weights, config.floor_share, config.max_wait_s, tuple(self.source.consumers))
        self._leases = LeaseKeeper(config.lease_s, self._changed.set, self.me.bus.clock)
        self._context = ServingContext(self.me, self.engine, config, self._leases, self._note_change, self.patience_s)
        self._puller = Puller(self.me.bus, self.source.stream, self._on_surplus, config.lease_s)
        self._rescue = Rescue(
            self.me,
            self.engine.name,
            self.source.stream,
            tuple(self.source.consumers.values()),
            self._leases,
            held=self._held,
            room=self._room_beyond,
            begin=self._begin,
            on_surplus=self._on_surplus,
        )
        self._lane_of = {consumer: lane for lane, consumer in self.source.consumers.items()}

    async def run(self, lifecycle: Lifecycle) -> None:
        """Serve until lifecycle asks to stop; then finish what runs, or hand it back at the drain deadline."""
        self.engine.on_change(self._note_change)
        self.me.bus.on_reconnect(self._scheduler.forget)
        await self._puller.start()
        await self._rescue.start()
        await self.me.bus.subscribe(f"{CANCEL}.*", self._on_cancel)
        if self.source.announcements:
            await self.me.bus.subscribe(f"{self.source.announcements}.>", self._on_announcement)
        async with asyncio.TaskGroup() as group:
            background = [group.create_task(self._leases.run()), group.create_task(self._report_status(lifecycle))]
            taking = [group.create_task(self._pull()), group.create_task(self._rescue.run())]
            await lifecycle.stopping.wait()
            self._draining = True
            self._note_change()
            for task in taking:
                task.cancel()
            await asyncio.wait(taking)
            await self._finish(lifecycle)
            for task in background:
                task.cancel()
        await self._say_status("gone")

    # ---- pulling

    async def _pull(self) -> None:
        while True:
            await self._leases.until_certain()
            await self._until_there_is_room()
            if (delivery := await self._next_delivery()) is not None:
                self._begin(delivery)
            elif self._puller.refused:
                await asyncio.sleep(_REFUSED_PAUSE_S)

    async def _next_delivery(self) -> Delivery | None:
        """The next request by the scheduler's order; stands on all lanes when none is known to hold one."""
        now = asyncio.get_running_loop().time()
        for lane in self._scheduler.order(now, wall_now=self.me.bus.clock.wall(), saturated=self._saturated):
            consumer, announced = self.source.consumers[lane], self._scheduler.announced(lane)
            if self._puller.stands_on(consumer):
                continue
            if delivery := await self._puller.take(consumer):
                return delivery
            self._scheduler.empty(lane, asyncio.get_running_loop().time(), announced=announced)
        return await self._puller.wait(
            list(self.source.consumers.values()),
            self._until_there_is_no_room(),
            keep=lambda: self._free_slots > _KEEP_STANDING,
        )

    @property
    def _in_slots(self) -> list[Serving]:
        return [serving for serving in self._servings.values() if serving.in_slot]

    @property
    def _free_slots(self) -> int:
        status = self.engine.status()
        return status.slots_total - max(len(self._in_slots), status.slots_used) if status.state == "ready" else 0

    def _room_beyond(self) -> int:
        """How many more requests may be begun that others had begun; none while slots are free for them."""
        status, running = self.engine.status(), len(self._in_slots)
        if status.state != "ready" or status.slots_used > running or self._free_slots > 0:
            return 0
        return _MOST_FULL * status.slots_total - running

    def _held(self) -> Counter[str]:
        return Counter(serving.delivery.consumer for serving in self._servings.values())

    @property
    def _has_room(self) -> bool:
        return self._free_slots > 0

    async def _until_there_is_room(self) -> None:
        while not self._has_room:
            self._puller.withdraw()
            self._room.clear()
            await self._room.wait()

    async def _until_there_is_no_room(self) -> None:
        """Ends when the engine goes away while pulls stand: they are withdrawn, so that others get the requests."""
        while self._has_room:
            self._room.clear()
            await self._room.wait()

    async def _on_surplus(self, delivery: Delivery) -> None:
        # One slot is the pull loop's, which may have a request in its hands already.
        if self._free_slots > 1 and not self._draining:
            self._begin(delivery)
            return
        envelope, tracing = self._envelope(delivery), self.me.tracing
        await Held.taken(self.me.bus, delivery, envelope, self._leases, tracing=tracing).end(Returned())

    def _envelope(self, delivery: Delivery) -> Envelope:
        lane = self._lane_of[delivery.consumer]
        return read_envelope(delivery, lane.priority, lane.task, default_timeout_s=self.config.default_timeout_s)

    # ---- serving

    def _begin(self, delivery: Delivery) -> None:
        envelope = self._envelope(delivery)
        lane = self._lane_of[delivery.consumer]
        key = f"{delivery.consumer}:{delivery.sequence}:{delivery.delivered}"
        self._scheduler.start(
            key,
            lane,
            stored_at=envelope.stored_at,
            pending=delivery.pending,
            now=asyncio.get_running_loop().time(),
            wall_now=self.me.bus.clock.wall(),
            saturated=self._saturated,
            sequence=delivery.sequence,
        )
        serving = Serving(self._context, delivery, envelope, self._reason(envelope))
        self._servings[key] = serving
        self._keep(self._serve(key, serving))
        self._note_change()

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, key: str, serving: Serving) -> None:
        try:
            await serving.run()
        except Exception:
            # Whatever one request does, the others go on; its lease runs out and it counts as an attempt.
            log.exception("%s: could not be served", serving.envelope.id)
        finally:
            prompt_tokens, output_tokens = serving.cost_tokens
            self._scheduler.finish(key, prompt_tokens * self.config.prompt_token_cost + output_tokens)
            del self._servings[key]
            self._note_change()

    def _reason(self, envelope: Envelope) -> str:
        if envelope.move_reason:
            return envelope.move_reason
        return f"{self.engine.name} had a free slot" if not self._saturated else f"{self.engine.name}, in its turn"

    async def _finish(self, lifecycle: Lifecycle) -> None:
        """Let what runs finish until the drain deadline, then hand the rest back."""
        await self._puller.close()
        await self._rescue.close()
        loop = asyncio.get_running_loop()
        while self._tasks:
            left_s = (lifecycle.drain_deadline or loop.time()) - loop.time()
            if left_s <= 0:
                break
            await asyncio.wait(self._tasks, timeout=left_s)
        for serving in list(self._servings.values()):
            serving.interrupt(Returned())
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=2.0)

    async def _on_cancel(self, message: Message) -> None:
        request_id = message.subject.removeprefix(f"{CANCEL}.")
        for serving in list(self._servings.values()):
            if serving.envelope.id == request_id:
                error = HeadraceError(ErrorCode.CANCELLED, f"Request {request_id} was cancelled.")
                serving.interrupt(Failed(error))

    # ---- knowing and saying

    @property
    def _saturated(self) -> bool:
        load = self.me.peers.load(self.engine.name)
        return load is not None and load.level == "saturated"

    async def _on_announcement(self, message: Message) -> None:
        lane = LANE_OF_SUBJECT.get(message.headers.get(STORED_SUBJECT, ""))
        if lane is not None and lane in self.source.consumers:
            self._scheduler.arrived(lane, int(message.headers.get(STORED_SEQUENCE, 0)))

    def _note_change(self) -> None:
        self._changed.set()
        self._room.set()

    async def _report_status(self, lifecycle: Lifecycle) -> None:
        """A status at every change and every second; a change of the engine's state is told to the parent as well."""
        told: tuple[str, str] | None = None
        while True:
            status = self.engine.status()
            # First: whoever acts on the report finds that the others know.
            await self._say_status(status.state)
            if (status.state, status.reason) != told and status.state in ("loading", "ready", "down"):
                told = (status.state, status.reason)
                lifecycle.report(status.state, status.reason, models=status.models, simulated=self.engine.simulated)
            try:
                async with asyncio.timeout(STATUS_EVERY_S):
                    await self._changed.wait()
                    await asyncio.sleep(_STATUS_GATHER_S)
            except TimeoutError:
                pass
            self._changed.clear()

    async def _say_status(self, state: WorkerState) -> None:
        status = self.engine.status()
        running = dict.fromkeys(Priority, 0)
        for serving in self._in_slots:
            running[serving.envelope.priority] += 1
        message = WorkerStatus(
            worker=self.me.name,
            engine=self.engine.name,
            state="draining" if self._draining and state != "gone" else state,
            models=status.models,
            slots=Slots(max(status.slots_used, len(self._in_slots)), status.slots_total),
            running=PerPriorityCount(**{priority.value: count for priority, count in running.items()}),
            pending_tokens=status.pending_tokens,
            tokens_per_s=status.tokens_per_s,
            tokens_per_request=status.tokens_per_request,
            kv_bytes=status.kv_bytes,
            kv_bytes_limit=status.kv_bytes_limit,
            at=self.me.bus.clock.wall(),
            reason=status.reason,
            simulated=self.engine.simulated,
            standin=status.standin,
            tool_models=status.tool_models,
            embedding_models=status.embedding_models,
            held=self._held(),
        )
        try:
            await self.me.bus.publish(f"{WORKER}.{self.me.name}", encode(message))
        except Unreachable:
            log.debug("status not sent: the broker is away")
