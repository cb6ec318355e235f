"""The lanes that a process takes requests from: fixed ones, and those of named tenants that have a consumer now.

There may be hundreds of the latter, so no pull stands open on most of them. A process asks them when a request was
announced, and when a look at all consumers shows that one waits there. Where one may be delivered after all, since it
was announced or returned just now, a pull stands open for a while, as on the fixed lanes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec

from pipeline.aio import Background
from pipeline.broker.connection import BusError, Delivery, Message, Subscription
from pipeline.config import Config
from pipeline.core.scheduler import ANNOUNCED_S, Scheduler
from pipeline.process.role import Role
from pipeline.wire.messages import EngineName, RequestEvent, WorkerStatus
from pipeline.wire.subjects import (
    EVENT,
    LANES,
    QUEUED_PREFIX,
    STREAM_OLLAMA,
    STREAM_REQUESTS,
    Lane,
    Priority,
    Task,
    lane_of_subject,
    ollama_consumer,
    split_name,
)

log = logging.getLogger(__name__)

# How often the consumers of tenants' lanes are listed: an announcement can be lost, and a request can be returned by a
# process that does not say so.
_LOOK_EVERY_S = 2.0
# How often the list is read, at least: the message that announces a change can be lost as well.
_READ_EVERY_S = 10.0
_ENGINES: tuple[EngineName, ...] = ("mlx", "ollama")
_event_decoder = msgspec.json.Decoder(RequestEvent)


@dataclass(frozen=True, slots=True)
class Source:
    """Where requests come from.

    Attributes:
        stream: the work queue.
        consumers: the durable consumers of the fixed lanes, the most urgent first.
        announcements: the prefix under which the stream announces stored requests; empty if it does not.
        mixed: whether each lane holds the requests of all tenants.
        tasks: of the lanes of named tenants that requests are taken from as well.
    """

    stream: str
    consumers: Mapping[Lane, str]
    announcements: str = ""
    mixed: bool = False
    tasks: frozenset[Task] = frozenset()


def source_of(tasks: frozenset[Task]) -> Source:
    """The lanes of `LLM` whose requests are of certain classes, of all tenants."""
    consumers = {lane: lane.consumer for lane in LANES if lane.task in tasks}
    return Source(STREAM_REQUESTS, consumers, QUEUED_PREFIX, tasks=tasks)


MLX_SOURCE = source_of(frozenset(Task))
OLLAMA_SOURCE = Source(STREAM_OLLAMA, {Lane(p, Task.SIMPLE): ollama_consumer(p) for p in Priority}, mixed=True)


@dataclass(slots=True)
class LaneSet:
    """The lanes of one `Taking`. One writer: the list of tenants' lanes.

    Args:
        me: the role's connection and peers.
        config: the settings.
        source: where the requests come from.
        scheduler: chooses among the lanes.
        on_left: called with the consumer of a lane that has left the list: no pull may stand open on it.
        on_gave_back: called after `given_back` has changed.

    Attributes:
        consumers: the durable consumer of each lane.
        given_back: the consumers of named tenants' lanes to which this process has returned requests. A user that tells
            other processes of them clears it.
        stirred: set when a request may have come to the lane of a named tenant.
    """

    me: Role
    config: Config
    source: Source
    scheduler: Scheduler
    on_left: Callable[[str], None]
    on_gave_back: Callable[[], None]
    given_back: set[str] = field(init=False, default_factory=set)
    consumers: dict[Lane, str] = field(init=False)
    stirred: asyncio.Event = field(init=False, default_factory=asyncio.Event)
    _lane_of: dict[str, Lane] = field(init=False)
    _listens: bool = field(init=False, default=False)
    _events: list[Subscription] = field(init=False, default_factory=list)
    _following: Background = field(init=False, default_factory=Background)
    _changed: asyncio.Event = field(init=False, default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.consumers = dict(self.source.consumers)
        self._lane_of = {consumer: lane for lane, consumer in self.consumers.items()}

    async def start(self) -> None:
        """Follow the list of tenants' lanes. Call once."""
        if self.source.tasks:
            self.me.peers.lanes.listen(self._on_lanes)
            self._on_lanes()
            self._following.start(self._look_around(), what="looking at the lanes of tenants")

    def close(self) -> None:
        """Follow nothing any more."""
        self._following.cancel()

    def listen(self, *, listens: bool) -> None:
        """Whether to look at the lanes of tenants, and to hear what these use elsewhere."""
        self._listens = listens
        self._changed.set()

    def standing(self, now: float) -> list[Lane]:
        """The lanes that a pull may stand open on, at monotonic seconds."""
        return [lane for lane in (*self.source.consumers, *self.scheduler.asked_again(now)) if lane in self.consumers]

    def lane_of(self, delivery: Delivery) -> Lane:
        """The lane of a request. It may come from a lane that has left the list."""
        lane = self._lane_of.get(delivery.consumer) or lane_of_subject(delivery.subject)
        if lane is None:
            raise ValueError(f"{delivery.subject} is no lane.")
        return lane

    def gave_back(self, lane: Lane, delay_s: float) -> None:
        """This process has returned a request of a lane, which is delivered again after delay_s."""
        if lane.tenant and lane in self.consumers:
            self.scheduler.gave_back(lane, self.me.bus.clock.now(), delay_s)
            self.given_back.add(self.consumers[lane])
            self.stirred.set()
            self.on_gave_back()

    def heard(self, status: WorkerStatus) -> None:
        """A worker reported its status."""
        if status.worker != self.me.name:
            for consumer in status.given_back:
                lane = self._lane_of.get(consumer)
                if lane is not None and lane.tenant:
                    self._returned(lane)

    def _returned(self, lane: Lane) -> None:
        self.scheduler.returned(lane, self.me.bus.clock.now())
        self.stirred.set()

    def announced(self, lane: Lane, sequence: int) -> bool:
        """A request was stored. Returns whether it is in one of these lanes."""
        if lane not in self.consumers:
            return False
        self.scheduler.arrived(lane, sequence)
        if lane.tenant:
            self.scheduler.returned(lane, self.me.bus.clock.now(), ANNOUNCED_S)
            self.stirred.set()
        return True

    # ---- the list

    @property
    def _tenants(self) -> list[Lane]:
        return [lane for lane in self.consumers if lane not in self.source.consumers]

    def _on_lanes(self) -> None:
        wanted = {lane for lane in self.me.peers.lanes.now if lane.task in self.source.tasks}
        for lane in self._tenants:
            if lane not in wanted:
                self.scheduler.remove(lane)
                consumer = self.consumers.pop(lane)
                del self._lane_of[consumer]
                self.on_left(consumer)
        for lane in wanted - self.consumers.keys():
            self.consumers[lane] = lane.consumer
            self._lane_of[lane.consumer] = lane
            self.scheduler.add(lane)
            self.stirred.set()
        self.scheduler.recheck(self.me.bus.clock.now())
        self._changed.set()

    # ---- what is heard

    async def _look_around(self) -> None:
        """Read the list now and then; hear events, and look at the consumers, while there are lanes of tenants."""
        while True:
            self._changed.clear()
            needed = self._listens and bool(self._tenants)
            try:
                await self.me.peers.lanes.read()
                await self._hear(needed=needed)
                if needed:
                    await self._look()
            except BusError as error:
                log.debug("The lanes of tenants were not looked at: %s", error)
            await self._pause(needed=needed)

    async def _pause(self, *, needed: bool) -> None:
        try:
            async with asyncio.timeout(_LOOK_EVERY_S if needed else _READ_EVERY_S):
                while (self._listens and bool(self._tenants)) is needed:
                    await self._changed.wait()
                    self._changed.clear()
        except TimeoutError:
            pass

    async def _hear(self, *, needed: bool) -> None:
        if needed and not self._events:
            self._events.append(await self.me.bus.subscribe(f"{EVENT}.*.done", self._on_event))
        elif not needed:
            while self._events:
                await self.me.bus.unsubscribe(self._events.pop())

    async def _look(self) -> None:
        """Ask the lanes in which a request waits, or was delivered and is in no worker's hands."""
        held: dict[str, int] = {}
        for status in (status for engine in _ENGINES for status in self.me.peers.workers(engine)):
            for consumer, count in status.held.items():
                held[consumer] = held.get(consumer, 0) + count
        for state in await self.me.bus.consumers(self.source.stream):
            lane = self._lane_of.get(state.name)
            if lane is None or not lane.tenant:
                continue
            if state.num_ack_pending > held.get(state.name, 0):
                self._returned(lane)
            elif state.num_pending:
                self.scheduler.arrived(lane)
                self.stirred.set()

    async def _on_event(self, message: Message) -> None:
        event = _event_decoder.decode(message.data)
        tenant, _ = split_name(event.id)
        if event.worker != self.me.name:
            cost = event.prompt_tokens * self.config.prompt_token_cost + event.completion_tokens
            self.scheduler.used(event.priority, tenant, cost)
