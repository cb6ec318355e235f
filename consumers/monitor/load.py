"""The engines' load: counts the lanes, watches the workers, and publishes a load event for each engine."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from consumers.monitor.view import STREAMS
from pipeline.aio import wait_set
from pipeline.broker import topology
from pipeline.broker.api import ConsumerState
from pipeline.broker.connection import BusError
from pipeline.config import Config
from pipeline.core.saturation import SaturationMonitor
from pipeline.core.scheduler import shares
from pipeline.core.sharing import SharedMachine
from pipeline.core.waits import Capacity, Inflow, predicted_wait_s
from pipeline.process.role import Role
from pipeline.wire.messages import EngineName, Load, PerPriorityCount, encode
from pipeline.wire.subjects import (
    ANY_TENANT,
    GUARD_LANE,
    LANES,
    LOAD,
    STREAM_OLLAMA,
    STREAM_REQUESTS,
    Lane,
    Priority,
    Task,
    lane_of_consumer,
    ollama_consumer,
)

log = logging.getLogger(__name__)

ENGINES: tuple[EngineName, ...] = ("mlx", "ollama")
STREAM_OF: dict[EngineName, str] = {"mlx": STREAM_REQUESTS, "ollama": STREAM_OLLAMA}
ENGINE_OF: dict[str, EngineName] = dict(zip(STREAMS, ENGINES, strict=True))
# Messages within this time are handled together. A change of level must be published within 100 ms.
_GATHER_S = 0.02
_EVERY_S = 1.0
_EVERY_IDLE_S = 5.0
# Spilling depends on the predicted waits, which grow from 0 when an overload begins.
_EVERY_SATURATED_S = 0.1

# Those that always exist.
_CONSUMERS: dict[EngineName, dict[str, Lane]] = {
    "mlx": {lane.consumer: lane for lane in (*LANES, GUARD_LANE)},
    # These hold the requests of all tenants.
    "ollama": {ollama_consumer(priority): Lane(priority, Task.SIMPLE, ANY_TENANT) for priority in Priority},
}


@dataclass(slots=True)
class LoadReporter:
    """Publishes load events while this monitor leads. The one writer of the depths, the levels and the loads.

    Args:
        me: the role.
        config: the settings.
        leads: whether this monitor acts.
        on_capacity: called with each engine's workers and monotonic seconds, before its load is published.
        on_count: called before the lanes are counted.
        on_look: called after each observation of both engines.
        unserved: how many requests wait in lanes of named tenants that have no consumer.

    Attributes:
        queued: how many requests wait in each lane.
        waiting: the same without those that are paused. Levels, loads and predicted waits count only these.
        tenants: how many requests of each tenant wait for MLX in each lane, without those that are paused.
        loads: the latest load of each engine.
    """

    me: Role
    config: Config
    leads: Callable[[], bool]
    on_capacity: Callable[[EngineName, Capacity, float], None]
    on_count: Callable[[], None]
    on_look: Callable[[], None]
    unserved: Callable[[], Mapping[Lane, int]]
    queued: dict[EngineName, dict[Priority, int]] = field(init=False)
    waiting: dict[EngineName, dict[Priority, int]] = field(init=False)
    tenants: dict[Priority, Counter[str]] = field(init=False)
    loads: dict[EngineName, Load] = field(init=False, default_factory=dict)
    _of_tenants: Counter[Priority] = field(init=False, default_factory=Counter)
    _parts: dict[Priority, float] = field(init=False)
    _capacities: dict[EngineName, Capacity] = field(init=False, default_factory=dict)
    _inflow: dict[EngineName, Inflow] = field(init=False)
    _saturation: dict[EngineName, SaturationMonitor] = field(init=False)
    _sharing: SharedMachine = field(init=False, default_factory=SharedMachine)
    _took_back: bool = field(init=False, default=False)
    _counted_at: dict[EngineName, float] = field(init=False, default_factory=dict)
    _published_at: dict[EngineName, float] = field(init=False, default_factory=dict)
    _changed: asyncio.Event = field(init=False, default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        config = self.config
        self._parts = shares(config.weights, config.floor_share)
        self._inflow = {engine: Inflow() for engine in ENGINES}
        self._saturation = {
            engine: SaturationMonitor(engine, self._parts, config.target_wait_s, config.busy_at, config.saturated_at)
            for engine in ENGINES
        }
        self.queued = {engine: dict.fromkeys(Priority, 0) for engine in ENGINES}
        self.waiting = {engine: dict.fromkeys(Priority, 0) for engine in ENGINES}
        self.tenants = {priority: Counter() for priority in Priority}

    @property
    def is_known(self) -> bool:
        """Whether the lanes have been counted and each engine has a load."""
        return len(self.loads) == len(ENGINES)

    def wake(self) -> None:
        """Something has changed: observe the engines soon."""
        self._changed.set()

    def recount(self, engine: EngineName) -> None:
        """The depths of the engine's lanes have changed."""
        self._counted_at.pop(engine, None)

    def wait_s(self, engine: EngineName, priority: Priority, position: int) -> float:
        """The predicted wait of the request at a position of a lane, in seconds; 0 before the first observation."""
        capacity = self._capacities.get(engine)
        if capacity is None:
            return 0.0
        waiting = self.waiting[engine]
        ahead = {**waiting, priority: min(position, waiting[priority])}
        inflow = self._inflow[engine].per_s(self.me.bus.clock.now())
        return predicted_wait_s(capacity, ahead, priority, self._parts, self.config.target_wait_s, inflow)

    def arrived(self, engine: EngineName, priority: Priority) -> None:
        """A request was stored in a lane of the engine."""
        self._inflow[engine].arrived(priority, self.me.bus.clock.now())

    async def run(self) -> None:
        """Observe and publish until cancelled."""
        while True:
            self._changed.clear()
            if self.leads():
                try:
                    await self._look()
                except BusError as error:
                    log.warning("No load event was published: %s", error)
            await wait_set(self._changed, self._pause_s())
            await asyncio.sleep(_GATHER_S)

    async def _look(self) -> None:
        """Publish each load whose level has changed or that is due."""
        self.on_count()
        for engine in ENGINES:
            await self._count(engine)
            await self._observe(engine)
        self.on_look()

    async def _count(self, engine: EngineName) -> None:
        """Ask the broker for the depths of an engine's lanes, if they have changed or are a second old."""
        now = self.me.bus.clock.now()
        if now - self._counted_at.get(engine, -_EVERY_S) < _EVERY_S:
            return
        self._counted_at[engine] = now
        consumers = {state.name: state for state in await self.me.bus.consumers(STREAM_OF[engine])}
        if missing := sorted(_CONSUMERS[engine].keys() - consumers.keys()):
            await self._restore(STREAM_OF[engine], missing)
        queued, waiting, pauses = dict.fromkeys(Priority, 0), dict.fromkeys(Priority, 0), self.me.peers.pauses.now
        tenants = {priority: Counter[str]() for priority in Priority}
        of_tenants = Counter[Priority]()
        for lane, held, pending in self._depths(engine, consumers.values()):
            queued[lane.priority] += held + pending
            of_tenants[lane.priority] += held + pending if lane.tenant else 0
            if not pauses.holds_lane(lane):
                waiting[lane.priority] += pending
                tenants[lane.priority][lane.tenant] += pending
        self.queued[engine], self.waiting[engine] = queued, waiting
        if engine == "mlx":
            self.tenants, self._of_tenants = tenants, of_tenants

    def _depths(self, engine: EngineName, consumers: Iterable[ConsumerState]) -> Iterator[tuple[Lane, int, int]]:
        """Each lane, how many of its requests are held back by a pause, and how many were not delivered yet."""
        paused = bool(self.me.peers.pauses.now.scopes)
        for state in consumers:
            lane = _CONSUMERS[engine].get(state.name) or (lane_of_consumer(state.name) if engine == "mlx" else None)
            if lane is not None:
                yield lane, self._held_back(engine, state) if paused else 0, state.num_pending
        for lane, count in self.unserved().items() if engine == "mlx" else ():
            yield lane, 0, count

    def _held_back(self, engine: EngineName, consumer: ConsumerState) -> int:
        """How many requests of a lane were delivered, and returned because they are paused."""
        in_hand = sum(status.held.get(consumer.name, 0) for status in self.me.peers.workers(engine))
        return max(0, consumer.num_ack_pending - in_hand)

    async def _restore(self, stream: str, missing: list[str]) -> None:
        """Create consumers again that were deleted: their lanes would hang."""
        log.warning("The consumers %s of %s are missing; creating them again.", ", ".join(missing), stream)
        try:
            await topology.apply(self.me.bus.js, self.config)
        except topology.TopologyError as error:
            log.error("They were not created: %s", error)  # noqa: TRY400 - the message says all

    async def _observe(self, engine: EngineName) -> None:
        clock = self.me.bus.clock
        capacity = Capacity.of(self.me.peers.workers(engine))
        self._capacities[engine] = capacity
        self.on_capacity(engine, capacity, clock.now())
        changed = True
        while changed and self.leads():
            now = clock.now()
            load, changed = self._saturation[engine].observe(
                capacity,
                self.waiting[engine],
                now=now,
                wall_now=clock.wall(),
                inflow=self._inflow[engine].per_s(now),
            )
            if engine == "mlx":
                load.keeps, load.takes_back = self._verdict(now)
                load.queued_tenants = PerPriorityCount(*(self._of_tenants[priority] for priority in Priority))
            self.loads[engine] = load
            if changed:
                log.info("%s is %s: %s", engine, load.level if load.available else "away", load.reason)
            if changed or now - self._published_at.get(engine, -_EVERY_IDLE_S) >= self._every_s(engine):
                await self.me.bus.publish(f"{LOAD}.{engine}", encode(load))
                self._published_at[engine] = now

    def _verdict(self, now: float) -> tuple[str, bool]:
        """Why MLX keeps its work, and whether it takes back what was spilled; said once in the log.

        A simulated MLX uses no part of the machine, so there is nothing to share and to measure.
        """
        if any(status.simulated for status in self.me.peers.workers("mlx")):
            return "", False
        mlx, second = self._capacities["mlx"], self._capacities.get("ollama", Capacity())
        models = (self.me.peers.models("mlx"), self.me.peers.models("ollama"))
        loaded = any(self.waiting["mlx"].values())
        self._sharing.observe(mlx, second, now, loaded=loaded, models=models)
        high = self.waiting["mlx"][Priority.HIGH] + mlx.running.get(Priority.HIGH, 0)
        verdict = self._sharing.judge(now, high=high)
        if verdict.takes_back and not self._took_back:
            log.warning("No request spills: %s", verdict.keeps)
        self._took_back = verdict.takes_back
        return verdict.keeps, verdict.takes_back

    def _every_s(self, engine: EngineName) -> float:
        load = self.loads[engine]
        if load.slots.used or any(self.waiting[engine].values()):
            return _EVERY_SATURATED_S if load.level == "saturated" else _EVERY_S
        return _EVERY_IDLE_S

    def _pause_s(self) -> float:
        """Seconds until the next load is due or a level can be left."""
        now = self.me.bus.clock.now()
        if not self.leads():
            return _EVERY_S
        due = [self._published_at.get(engine, now) + self._every_s(engine) for engine in self.loads]
        leaving = [wake for s in self._saturation.values() if (wake := s.next_wake()) is not None]
        return max(0.0, min([*due, *leaving, now + _EVERY_S]) - now)
