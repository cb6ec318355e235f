"""Taking requests from the lanes of one stream: which lane first, the pull, the lease, the charge, and surplus.

A worker, the router and the evacuation of Ollama's lanes all take requests here, each as a `Held` under a lease.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pipeline.aio import Background, wait_set
from pipeline.broker.connection import Delivery, Message, Subscription
from pipeline.config import Config
from pipeline.core.coming import Coming
from pipeline.core.ending import Abandoned, Returned, Settled
from pipeline.core.envelope import Envelope, read_envelope
from pipeline.core.handback import HandBacks
from pipeline.core.scheduler import Scheduler
from pipeline.delivery.held import Held, Resumed
from pipeline.delivery.lanes import LaneSet, Source
from pipeline.delivery.lease import LeaseKeeper
from pipeline.delivery.puller import Puller
from pipeline.process.role import Role
from pipeline.wire.messages import EngineName, WorkerStatus
from pipeline.wire.subjects import (
    ANY_TENANT,
    BATCH,
    STORED_SEQUENCE,
    STORED_SUBJECT,
    Lane,
    Priority,
    lane_of_subject,
)

Surplus = Callable[[Delivery], Coroutine[Any, Any, None]]


@dataclass(slots=True, eq=False)
class Taken:
    """A request in hand, and what the scheduler charged for it; `Taking.finish` corrects the charge."""

    held: Held
    lane: Lane
    consumer: str
    key: str

    @property
    def envelope(self) -> Envelope:
        """The request's."""
        return self.held.envelope


@dataclass(slots=True)
class Taking:
    """Takes requests, one or several at a time. One user: the pull loop of one process.

    Args:
        me: the role's connection.
        config: the settings.
        source: where the requests come from.
        engine: whose worker takes them; None for a process without an engine.
        on_surplus: called with a request that arrives when none is awaited; by default it is returned.
        on_begun: called with a paused request that an attempt has begun: it goes on. By default it is returned.
        on_renewed: called after each round of renewals.
        on_gave_back: called after `given_back` has more to tell.
        saturated: whether the engine is.

    Attributes:
        leases: of the requests in hand. The user runs `leases.run` as long as it holds any.
    """

    me: Role
    config: Config
    source: Source
    engine: EngineName | None = None
    on_surplus: Surplus | None = None
    on_begun: Surplus | None = None
    on_renewed: Callable[[], None] = lambda: None
    on_gave_back: Callable[[], None] = lambda: None
    saturated: Callable[[], bool] = lambda: False
    leases: LeaseKeeper = field(init=False)
    _scheduler: Scheduler = field(init=False)
    _lanes: LaneSet = field(init=False)
    _puller: Puller = field(init=False)
    _hand_backs: HandBacks = field(init=False, default_factory=HandBacks)
    _returning: Background = field(init=False, default_factory=Background)
    _announcements: Subscription | None = field(init=False, default=None)
    _coming: dict[Priority, Coming] = field(init=False, default_factory=lambda: {p: Coming() for p in Priority})

    def __post_init__(self) -> None:
        config, lanes = self.config, tuple(self.source.consumers)
        self.leases = LeaseKeeper(config.lease_s, self.on_renewed, self.me.bus.clock)
        self._scheduler = Scheduler(config.weights, config.floor_share, config.max_wait_s, lanes, self.is_paused)
        self._lanes = LaneSet(self.me, config, self.source, self._scheduler, self._on_left, self.on_gave_back)
        self._puller = self.puller()

    @property
    def consumers(self) -> Mapping[Lane, str]:
        """The durable consumer of each lane, those of named tenants included."""
        return self._lanes.consumers

    def puller(self) -> Puller:
        """A puller of the same stream, not started, with the same surplus: `Puller` has one user at a time."""
        return Puller(self.me.bus, self.source.stream, self.on_surplus or self.give_back, self.config.lease_s)

    async def start(self) -> None:
        """Listen for deliveries. Call once, before `next`."""
        self.me.bus.on_reconnect(self._scheduler.forget)
        await self._puller.start()
        await self._lanes.start()
        self.me.peers.pauses.listen(self._on_pauses)
        self._scheduler.recheck(self.me.bus.clock.now())

    async def listen(self) -> None:
        """Listen to the announcements of stored requests, which make an empty lane worth asking again."""
        if self.source.announcements and self._announcements is None:
            self._announcements = await self.me.bus.subscribe(f"{self.source.announcements}.>", self._on_announcement)
            self._scheduler.forget()
            self._lanes.listen(listens=True)

    def is_paused(self, lane: Lane) -> bool:
        """Whether an operator has paused all requests of a lane."""
        return self.me.peers.pauses.now.holds_lane(lane._replace(tenant=ANY_TENANT) if self.source.mixed else lane)

    def held_back(self, delivery: Delivery) -> bool:
        """Whether a request is paused. It is then returned after a delay, or passed to `on_begun` if it was begun.

        It arrived on a pull that was open when the pause began, on a lane of several tenants, or was delivered again.
        """
        pauses = self.me.peers.pauses.now
        if not pauses.scopes:
            return False
        held = self.hold(delivery)
        if not pauses.holds(held.envelope.priority, held.envelope.owner):
            held.release()
            return False
        what = f"returning the paused request {held.envelope.name}"
        self._returning.start(self._hold_back(delivery, held), what=what)
        return True

    async def _hold_back(self, delivery: Delivery, held: Held) -> None:
        opened = await held.open()
        if isinstance(opened, Settled | Abandoned):
            await held.end(opened)
        elif isinstance(opened, Resumed) and self.on_begun is not None:
            held.release()
            await self.on_begun(delivery)
        else:
            delay_s = self._hand_backs.delay_s(
                self.me.bus.clock.now(), held.envelope.name, delivered=delivery.delivered, room=False
            )
            await held.end(Returned(delay_s))

    def _on_pauses(self) -> None:
        """The broker must deliver nothing to pulls that were opened before a pause, or without what was resumed."""
        self._scheduler.recheck(self.me.bus.clock.now())
        self._puller.interrupt()

    def heard(self, status: WorkerStatus) -> None:
        """A worker reported its status."""
        self._lanes.heard(status)

    def given_back(self) -> list[str]:
        """The consumers of tenants' lanes to which requests were returned since the last call."""
        consumers = sorted(self._lanes.given_back)
        self._lanes.given_back.clear()
        return consumers

    def _on_left(self, consumer: str) -> None:
        if self._puller.stands_on(consumer):
            self._puller.interrupt()

    async def ignore(self) -> None:
        """Listen to the announcements no longer."""
        announcements, self._announcements = self._announcements, None
        if announcements is not None:
            self._lanes.listen(listens=False)
            await self.me.bus.unsubscribe(announcements)

    async def close(self) -> None:
        """Wait until the broker has cancelled all pulls, and each request that still arrived was passed on."""
        self._lanes.close()
        await self._puller.close()
        await self._returning.join()

    # ---- taking

    async def next(
        self,
        unless: Callable[[], Coroutine[Any, Any, None]],
        *,
        lanes: Sequence[Lane] | None = None,
        keep: Callable[[], bool] = lambda: False,
    ) -> Taken | None:
        """The next request in the scheduler's order; waits on all fixed lanes if none is known to hold one.

        After a standstill this waits until deliveries are no longer in doubt. Cancelling is safe: a request that still
        arrives is surplus.

        Args:
            unless: its coroutine ends the wait when it ends.
            lanes: only these, in any order.
            keep: whether pulls stay open when one of them has been answered; see `Puller.wait`.

        Returns:
            The request; None if a pull expired or was refused, `unless` ended, or there is something to ask for anew.
        """
        await self.leases.until_certain()
        every = self.consumers if lanes is None else lanes
        wanted = {lane for lane in every if not self.is_paused(lane)}
        self._lanes.stirred.clear()
        delivery = await self._first(wanted)
        if delivery is None:
            standing = [lane for lane in self._lanes.standing(self.me.bus.clock.now()) if lane in wanted]
            consumers = [self.consumers[lane] for lane in standing]
            delivery = await self._puller.wait(consumers, unless(), self._stirs(), keep=keep)
        return None if delivery is None or self.held_back(delivery) else self.receive(delivery)

    async def _stirs(self) -> None:
        """Ends when the lanes of named tenants are to be asked: no pull stands open on them."""
        await wait_set(self._lanes.stirred, self._scheduler.asked_again_in(self.me.bus.clock.now()))

    async def several(self, most: int, on_taken: Callable[[Taken], None]) -> None:
        """Take requests that are there now, each lane's part in the scheduler's order, with one pull a lane.

        Cancelling is safe, as in `next`.

        Args:
            most: how many.
            on_taken: called with each request as it arrives.
        """
        await self.leases.until_certain()
        clock, consumers = self.me.bus.clock, self.consumers
        lanes = [lane for lane, consumer in consumers.items() if not self._puller.stands_on(consumer)]
        planned = self._scheduler.plan(most, lanes, clock.now(), wall_now=clock.wall(), saturated=self.saturated())
        announced = {lane: self._scheduler.announced(lane) for lane in planned}
        if not planned:
            return

        def pass_on(delivery: Delivery) -> None:
            if not self.held_back(delivery):
                on_taken(self.receive(delivery))

        asked = {lane: (consumers[lane], count) for lane, count in planned.items()}
        empty = await self._puller.gather(dict(asked.values()), pass_on)
        for lane, sequence in announced.items():
            if asked[lane][0] in empty:
                self._scheduler.empty(lane, clock.now(), announced=sequence)

    async def _first(self, lanes: Collection[Lane]) -> Delivery | None:
        """A request that is there now, from the lanes without an open pull."""
        clock = self.me.bus.clock
        for lane in self._scheduler.choices(clock.now(), wall_now=clock.wall(), saturated=self.saturated()):
            consumer, announced = self.consumers.get(lane), self._scheduler.announced(lane)
            if consumer is None or lane not in lanes or self._puller.stands_on(consumer):
                continue
            if delivery := await self._puller.take(consumer):
                return delivery
            self._scheduler.empty(lane, clock.now(), announced=announced)
        return None

    async def take(self, lane: Lane) -> Taken | None:
        """The first request of one lane, if it is there now. Cancelling is safe."""
        await self.leases.until_certain()
        delivery = await self._puller.take(self.consumers[lane])
        return None if delivery is None or self.held_back(delivery) else self.receive(delivery)

    def most_urgent(self) -> Priority | None:
        """The priority whose turn it is, of those that may have a request waiting; None if none may."""
        clock = self.me.bus.clock
        first = next(self._scheduler.choices(clock.now(), wall_now=clock.wall(), saturated=self.saturated()), None)
        return None if first is None else first.priority

    def may_preempt(self, priority: Priority, victim: Priority) -> bool:
        """Whether a request of a priority may take the place of one of the victim's, by the shares of both."""
        return self._scheduler.may_preempt(priority, victim)

    def coming(self, priority: Priority) -> int:
        """How many requests of a priority were announced lately and not taken here."""
        return self._coming[priority].count(self.me.bus.clock.now())

    @property
    def refused(self) -> bool:
        """Whether the broker refused the latest pull, or was not reached: pause before the next one."""
        return self._puller.refused

    def withdraw(self) -> None:
        """Cancel the open pulls."""
        self._puller.withdraw()

    # ---- in hand

    def receive(self, delivery: Delivery) -> Taken:
        """Hold a delivered request, and charge its lane for it."""
        held, lane, clock = self.hold(delivery), self._lanes.lane_of(delivery), self.me.bus.clock
        self._coming[lane.priority].taken(delivery.sequence, clock.now())
        key = f"{delivery.consumer}:{delivery.sequence}:{delivery.delivered}"
        self._scheduler.start(
            key,
            lane,
            # However long the lines of a batch wait, LOW gets no more than its share for them.
            stored_at=None if BATCH in delivery.headers else held.envelope.stored_at,
            pending=delivery.pending,
            now=clock.now(),
            wall_now=clock.wall(),
            saturated=self.saturated(),
            sequence=delivery.sequence,
        )
        if lane not in self.consumers:
            self._scheduler.remove(lane)
        return Taken(held, lane, delivery.consumer, key)

    def progress(self, taken: Taken, cost: float) -> None:
        """Record what a request in hand has cost so far, weighted tokens."""
        self._scheduler.progress(taken.key, cost)

    def finish(self, taken: Taken, cost: float) -> None:
        """Correct the charge for a request to its real cost, weighted tokens."""
        self._scheduler.finish(taken.key, cost)

    def hold(self, delivery: Delivery) -> Held:
        """Hold a delivered request under a lease, without a charge."""
        lane = self._lanes.lane_of(delivery)
        envelope = read_envelope(
            delivery,
            lane.priority,
            lane.task,
            moves=self.me.bus.moves,
            default_timeout_s=self.config.default_timeout_s,
        )
        return Held.taken(
            self.me.bus,
            delivery,
            envelope,
            self.leases,
            tracing=self.me.tracing,
            engine=self.engine,
            worker=self.me.name,
            on_returned=partial(self._lanes.gave_back, lane),
        )

    async def give_back(self, delivery: Delivery) -> None:
        """Return a request at once, without using up an attempt."""
        await self.hold(delivery).end(Returned())

    async def _on_announcement(self, message: Message) -> None:
        stored_in = lane_of_subject(message.headers.get(STORED_SUBJECT, ""))
        if stored_in is None or self.me.peers.pauses.now.holds(stored_in.priority, stored_in.tenant):
            return
        sequence = int(message.headers.get(STORED_SEQUENCE, 0))
        if self._lanes.announced(stored_in, sequence):
            self._coming[stored_in.priority].announced(sequence, self.me.bus.clock.now())
