"""A worker: takes requests as its engine has room, and drains."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from pipeline.aio import wait_set
from pipeline.broker.connection import Delivery, Message
from pipeline.config import Config
from pipeline.core.ending import Returned
from pipeline.core.permits import Permit
from pipeline.delivery.lanes import Source
from pipeline.delivery.puller import Puller
from pipeline.delivery.taking import Taken, Taking
from pipeline.engine import Engine, Fetcher
from pipeline.process.lifecycle import Lifecycle
from pipeline.process.role import Role
from pipeline.wire.messages import Slots, WorkerState, WorkerStatus
from pipeline.wire.subjects import CANCEL, Lane, Priority, ollama_consumer
from pipeline.worker.borrowing import Borrowing
from pipeline.worker.counting import Counting
from pipeline.worker.fetching import Fetching
from pipeline.worker.handover import Handover
from pipeline.worker.jobs import Jobs
from pipeline.worker.rescue import Rescue
from pipeline.worker.serving import PATIENCE_S, ServingContext
from pipeline.worker.status import Reporting, worker_status

log = logging.getLogger(__name__)

# With so many answers that the broker has not stored yet, no further request is taken. A request leaves its slot before
# its answer is stored, so an engine that is faster than the broker's disk would pile them up, each under its lease.
_UNSTORED_MOST = 64
# With at least this many free slots besides that of the request that arrived, the other pulls stay open: one slot is
# for the next request, one for a request that races with it.
_KEEP_STANDING = 2
# How often a full worker looks whether it may preempt, beside every change of its own and of other workers.
_LOOK_AGAIN_S = 0.5
# A request that was returned for MLX is taken by one of its workers within this time.
_ABSTAINS_S = 1.0
# Pause after the broker has refused a pull.
_REFUSED_PAUSE_S = 0.2


@dataclass(slots=True)
class Worker:
    """Serves one engine's requests until it is told to stop.

    Args:
        me: the role's connection and name.
        engine: entered by the caller, and left after `run`.
        config: the settings.
        source: where the requests come from.
        patience_s: how long the other engine's workers have to report their models.
        fetcher: fetches models for the engine; None if nothing does.
    """

    me: Role
    engine: Engine
    config: Config
    source: Source
    patience_s: float = PATIENCE_S
    fetcher: Fetcher | None = None
    _context: ServingContext = field(init=False)
    _jobs: Jobs = field(init=False)
    _taking: Taking = field(init=False)
    _orphans: Puller = field(init=False)
    _rescue: Rescue = field(init=False)
    _borrowing: Borrowing | None = field(init=False, default=None)
    _reporting: Reporting = field(init=False)
    _room: asyncio.Event = field(init=False, default_factory=asyncio.Event)
    _draining: bool = field(init=False, default=False)
    # Until then nothing is pulled, monotonic seconds: MLX is about to take the first request of a lane.
    _abstains_until: float = field(init=False, default=0.0)
    _lent: Counter[str] = field(init=False, default_factory=Counter)

    def __post_init__(self) -> None:
        self._context = ServingContext(
            self.me,
            self.engine,
            self.config,
            self.patience_s,
            coming=self._coming,
            on_lending=self._abstain,
            on_lent=self._lend,
        )
        self._jobs = Jobs(self._context, self._note_change, self._finish_charge)
        self._reporting = Reporting(self.me, self.engine, self._status)
        self._taking = Taking(
            self.me,
            self.config,
            self.source,
            engine=self.engine.name,
            on_surplus=self._on_surplus,
            on_begun=self._on_begun,
            on_renewed=self._reporting.note_change,
            on_gave_back=self._reporting.note_change,
            saturated=lambda: self._saturated,
        )
        self._orphans = self._taking.puller()
        self._rescue = Rescue(
            self.me,
            self.engine.name,
            self.source.stream,
            self._consumers,
            self._taking.leases,
            held=self._jobs.held,
            room=self._rescue_room,
            take=self._take_orphan,
        )
        if self.engine.name == "mlx":
            self._borrowing = Borrowing(self.me, self.config, self._taking.leases, self._continue_begun)

    async def run(self, lifecycle: Lifecycle) -> None:
        """Serve until lifecycle asks to stop; then finish what runs, or return it at the drain deadline."""
        self.engine.on_change(self._note_change)
        await self._taking.start()
        await self._orphans.start()
        if self._borrowing is not None:
            await self._borrowing.start()
        self._rescue.start()
        self.me.peers.on_status = self._on_status
        self.me.peers.on_change = self._on_peers
        await self.me.bus.subscribe(f"{CANCEL}.>", self._on_cancel)
        await Counting(self.me, self.engine, self.config).start()
        fetching = Fetching(self.me, self.config, self.fetcher)
        await fetching.start()
        await self._taking.listen()
        async with asyncio.TaskGroup() as group:
            beside = [group.create_task(self._taking.leases.run()), group.create_task(self._reporting.run(lifecycle))]
            if self.engine.name == "ollama":
                handover = Handover(self.me, self.engine, self._jobs.servings)
                beside.append(group.create_task(handover.run()))
            taking = [group.create_task(self._pull()), group.create_task(self._rescue.run())]
            await lifecycle.stopping.wait()
            self._draining = True
            self._jobs.close()
            self._note_change()
            for task in taking:
                task.cancel()
            await asyncio.wait(taking)
            await fetching.stop()
            await self._finish(lifecycle)
            for task in beside:
                task.cancel()
        await self._reporting.publish("gone")

    # ---- taking

    async def _pull(self) -> None:
        while True:
            permit, lanes = await self._reserved()
            if lanes is None and not self._may_borrow() and await self._took_several(permit):
                continue
            taken = None
            try:
                if lanes is None:
                    taken = await self._borrowed() or await self._taking.next(
                        self._until_no_slot, keep=lambda: self._jobs.permits().free >= _KEEP_STANDING
                    )
                else:
                    taken = await self._taking.next(partial(self._while_preempting, lanes), lanes=lanes)
            finally:
                if taken is None:
                    self._jobs.release(permit)
            if taken is not None and self._abstains:
                # It arrived on a pull that was open when a request was returned for MLX, and may be that request.
                self._jobs.release(permit)
                await taken.held.end(Returned())
                self._finish_charge(taken, 0.0)
            elif taken is not None:
                self._begin(taken, permit)
                # The request reaches the engine before the next one is looked for.
                await asyncio.sleep(0)
            elif self._taking.refused:
                await asyncio.sleep(_REFUSED_PAUSE_S)

    def _on_peers(self) -> None:
        self._room.set()
        if self._borrowing is not None and not self._draining:
            self._borrowing.heard()

    def _on_status(self, status: WorkerStatus) -> None:
        self._rescue.heard(status)
        self._taking.heard(status)

    def _lend(self, priority: Priority) -> None:
        """Tell MLX's workers that a request of Ollama's lane is returned for one of them, and do not take it again."""
        self._lent[ollama_consumer(priority)] += 1
        self._abstain()

    def _abstain(self) -> None:
        self._abstains_until = self.me.bus.clock.now() + _ABSTAINS_S
        self._note_change()

    @property
    def _abstains(self) -> bool:
        return self.me.bus.clock.now() < self._abstains_until

    async def _reserved(self) -> tuple[Permit, Sequence[Lane] | None]:
        """A permit once a slot is free, for any lane; or else for lanes whose requests take the place of others.

        Until then the open pulls are cancelled. There is no permit while the broker stores nothing, because the answer
        could not be written, while many answers are not stored yet, and just after a request was returned for MLX.
        """
        jobs = self._jobs
        while True:
            may_take = not (self._store_failed or self._abstains or jobs.unstored >= _UNSTORED_MOST)
            if may_take and (permit := jobs.permits().reserve()) is not None:
                return permit, None
            self._taking.withdraw()
            lanes = self._preempting() if may_take else []
            if lanes and (permit := jobs.permits().preempt(jobs.as_urgent(lanes[0].priority))) is not None:
                return permit, lanes
            abstains_s = self._abstains_until - self.me.bus.clock.now()
            self._room.clear()
            await wait_set(self._room, abstains_s if abstains_s > 0 else _LOOK_AGAIN_S)

    async def _took_several(self, permit: Permit) -> bool:
        """Take requests that wait now into half of the free slots. Returns whether there were enough to use permit.

        The other half is for what arrives meanwhile, and for other workers, so that a short queue is spread over them.
        """
        permits = self._jobs.permits()
        reserved = [permits.reserve() for _ in range(permits.free // 2)]
        unused = [permit, *filter(None, reserved)]
        if len(unused) == 1:
            return False
        keeps = 0
        try:
            await self._taking.several(len(unused), lambda taken: self._begin(taken, unused.pop()))
            keeps = 1
        finally:
            for each in unused[keeps:]:
                self._jobs.release(each)
        return permit.state == "used"

    def _preempting(self, *, mine: int = 0) -> list[Lane]:
        """The lanes whose requests may take the place of the least urgent one that runs, the most urgent first.

        None, while another worker of this engine has a free slot.
        """
        permits, running = self._jobs.permits(), self._jobs.running()
        if not running or self._others_have_room():
            return []
        for job in self._jobs:
            self._taking.progress(job.taken, self._jobs.cost(job))
        *_, victim = (priority for priority in Priority if running[priority])
        above = list(Priority)[: list(Priority).index(victim)]
        allowed = [
            priority
            for priority in above
            if permits.preempt_room(self._jobs.as_urgent(priority), mine=mine) > 0
            and self._taking.may_preempt(priority, victim)
        ]
        return [lane for lane in self._taking.consumers if lane.priority in allowed]

    async def _while_preempting(self, lanes: Sequence[Lane]) -> None:
        """Ends when other lanes than these may preempt, or a slot falls free."""
        while self._preempting(mine=1) == lanes:
            self._room.clear()
            await wait_set(self._room, _LOOK_AGAIN_S)

    def _others_have_room(self) -> bool:
        return any(
            status.state == "ready" and status.slots.used < status.slots.total
            for status in self.me.peers.workers(self.engine.name)
            if status.worker != self.me.name
        )

    async def _until_no_slot(self) -> None:
        """Ends when the engine goes away, withholds its slots, or cannot have its answers stored, while pulls are open.

        Others get the requests.
        """
        while self._jobs.permits().holds and not (self._store_failed or self._abstains or self._may_borrow()):
            self._room.clear()
            await self._room.wait()

    def _may_borrow(self) -> bool:
        """Whether a request of Ollama's lanes would begin sooner here. It is older than those of its priority here."""
        return self._borrowing is not None and bool(self._borrowing.wanted())

    async def _borrowed(self) -> Taken | None:
        """A request of Ollama's lanes, if this worker would begin it sooner and none of its own is more urgent."""
        if self._borrowing is None or not self._may_borrow():
            return None
        return await self._borrowing.take(self._taking.most_urgent())

    async def _continue_begun(self, consumer: str) -> bool:
        """Go on at once with an answer that Ollama has begun and returned. Returns whether to look for it no more."""
        if self._borrowing is None:
            return False
        # The pulls that free slots are reserved for do not find it: they are of MLX's own lanes.
        permit = self._jobs.permits().reserve() or self._jobs.permits().overflow(unpulled=True)
        if permit is None:
            return False
        found: Taken | str = "none"
        try:
            found = await self._borrowing.take_begun(consumer)
        finally:
            if isinstance(found, str):
                self._jobs.release(permit)
        if isinstance(found, str):
            return found == "another"
        self._begin(found, permit, extra=True)
        return True

    def _consumers(self) -> list[str]:
        """The durable consumers of all lanes, the most urgent first."""
        order, consumers = list(Priority), self._taking.consumers
        return [consumers[lane] for lane in sorted(consumers, key=lambda lane: order.index(lane.priority))]

    def _rescue_room(self) -> int:
        return self._jobs.permits().overflow_room(unpulled=any(map(self._taking.is_paused, self._taking.consumers)))

    async def _take_orphan(self, consumer: str) -> bool:
        """Take one request beyond the slots. Returns whether more of the lane's requests may be orphaned."""
        unpulled = any(
            self._taking.is_paused(lane) for lane, name in self._taking.consumers.items() if name == consumer
        )
        permit = self._jobs.permits().overflow(unpulled=unpulled)
        if permit is None:
            return False
        delivery, paused = None, False
        try:
            delivery = await self._orphans.take(consumer)
            paused = delivery is not None and delivery.delivered > 1 and self._taking.held_back(delivery)
        finally:
            if delivery is None or delivery.delivered == 1 or paused:
                self._jobs.release(permit)
        if delivery is None:
            return False
        if paused:
            return True
        if delivery.delivered == 1:
            # No worker has begun it: the orphans of the lane have been taken, or their leases still hold.
            await self._on_surplus(delivery)
            return False
        log.info("Taking over request %d of %s.", delivery.sequence, consumer)
        self._begin(self._taking.receive(delivery), permit, extra=True)
        return True

    async def _on_surplus(self, delivery: Delivery) -> None:
        """Serve a request that was not awaited if a slot is free; else return it."""
        if self._taking.held_back(delivery):
            return
        permit = None if self._abstains else self._jobs.permits().reserve()
        if permit is None:
            await self._taking.give_back(delivery)
        else:
            self._begin(self._taking.receive(delivery), permit)

    async def _on_begun(self, delivery: Delivery) -> None:
        """Go on with a paused request that an attempt has begun, in a slot or beyond them; else return it."""
        permit = self._jobs.permits().reserve() or self._jobs.permits().overflow(unpulled=True)
        if permit is None:
            await self._taking.give_back(delivery)
        else:
            self._begin(self._taking.receive(delivery), permit, extra=True)

    def _coming(self, priority: Priority) -> int:
        """How many requests of a priority are on their way to the engine: taken, or announced and not taken yet."""
        return self._context.entering[priority] + self._taking.coming(priority)

    # ---- serving

    def _begin(self, taken: Taken, permit: Permit, *, extra: bool = False) -> None:
        self._jobs.begin(taken, permit, reason=self._reason(taken), extra=extra)

    def _finish_charge(self, taken: Taken, cost: float) -> None:
        self._taking.finish(taken, cost)
        if self._borrowing is not None:
            self._borrowing.finish(taken, cost)

    def _reason(self, taken: Taken) -> str:
        if self._borrowing is not None and taken.consumer != taken.lane.consumer:
            return "back from ollama: mlx begins it sooner"
        if taken.envelope.move_reason:
            return taken.envelope.move_reason
        if not self._saturated:
            return f"{self.engine.name} had a free slot"
        load = self.me.peers.load(self.engine.name)
        return f"{self.engine.name}, in its turn" + (f": {load.keeps}" if load is not None and load.keeps else "")

    async def _finish(self, lifecycle: Lifecycle) -> None:
        """Let what runs finish until the drain deadline, then return the rest."""
        await self._taking.close()
        await self._orphans.close()
        if self._borrowing is not None:
            await self._borrowing.close()
        await self._jobs.drain(lifecycle.drain_left_s())

    async def _on_cancel(self, message: Message) -> None:
        self._jobs.cancel(message.subject.removeprefix(f"{CANCEL}."))

    # ---- status

    @property
    def _store_failed(self) -> bool:
        store = self.me.peers.store()
        return store is not None and store.state == "failed"

    @property
    def _saturated(self) -> bool:
        load = self.me.peers.load(self.engine.name)
        return load is not None and load.level == "saturated"

    def _note_change(self) -> None:
        self._reporting.note_change()
        self._room.set()

    def _status(self, state: WorkerState) -> WorkerStatus:
        permits = self._jobs.permits()
        return worker_status(
            self.engine,
            self._jobs.running(),
            worker=self.me.name,
            state="draining" if self._draining and state != "gone" else state,
            slots=Slots(permits.used, permits.total),
            at=self.me.bus.clock.wall(),
            held=self._jobs.held(),
            borrows=self._borrowing is not None,
            lent=dict(self._lent),
            given_back=self._taking.given_back(),
            fetches=self.fetcher is not None,
        )
