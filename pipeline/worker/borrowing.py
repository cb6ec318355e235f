"""Taking requests from Ollama's lanes into MLX's worker, where MLX begins or continues them sooner.

A request that was spilled is older than those of its priority that still wait for MLX. So where MLX would begin it
sooner, it is taken directly from Ollama's lane, and not sent to the end of another one. An answer that Ollama has begun
and cannot end is the first of its lane again. It is taken at once, beyond the slots: its reader has half of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal

from pipeline.aio import Background
from pipeline.broker.connection import Delivery
from pipeline.config import Config
from pipeline.core.ending import Returned
from pipeline.core.placement import is_on
from pipeline.core.spilling import wanted_back
from pipeline.core.waits import Capacity
from pipeline.delivery.lanes import OLLAMA_SOURCE
from pipeline.delivery.lease import LeaseKeeper
from pipeline.delivery.puller import Puller
from pipeline.delivery.taking import Taken, Taking
from pipeline.process.role import Role
from pipeline.wire.decoding import decode_request
from pipeline.wire.errors import HeadraceError
from pipeline.wire.subjects import Lane, Priority

# An empty lane is not asked again until it has probably been counted again.
_COUNT_IS_OLD_S = 0.3
# Between looks for a request that a worker has announced as returned.
_PAUSES_S = (0.02, 0.05, 0.1, 0.2)
# A request that MLX cannot answer stays at the head of its lane until Ollama takes it.
_FOR_OLLAMA_ALONE_S = 2.0


@dataclass(slots=True)
class Borrowing:
    """The requests of Ollama's lanes, for one MLX worker.

    Args:
        me: the role's connection and peers.
        config: the settings.
        leases: the worker's: it renews those of borrowed requests as well.
        on_begun: called with the consumer of a request that Ollama had begun and returned; whether to look no more.
    """

    me: Role
    config: Config
    leases: LeaseKeeper
    on_begun: Callable[[str], Awaitable[bool]]
    _taking: Taking = field(init=False)
    _begun: Puller = field(init=False)
    _lent: dict[str, dict[str, int]] = field(init=False, default_factory=dict)
    _lock: asyncio.Lock = field(init=False, default_factory=asyncio.Lock)
    _tasks: Background = field(init=False, default_factory=Background)
    _rests_until: dict[Lane, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._taking = Taking(self.me, self.config, OLLAMA_SOURCE, engine="mlx")
        self._taking.leases = self.leases
        self._begun = self._taking.puller()

    async def start(self) -> None:
        """Listen. Call once."""
        await self._taking.start()
        await self._begun.start()

    def heard(self) -> None:
        """Look for requests that Ollama's workers have returned since they were last heard."""
        for status in self.me.peers.workers("ollama"):
            known = self._lent.get(status.worker, status.lent)
            for consumer, count in status.lent.items():
                if count > known.get(consumer, 0):
                    self._tasks.start(self._continue(consumer), what=f"a returned request of {consumer}")
            self._lent[status.worker] = status.lent

    async def _continue(self, consumer: str) -> None:
        """The request may still be on its way back to its lane."""
        for pause_s in _PAUSES_S:
            async with self._lock:
                if await self.on_begun(consumer):
                    return
            await asyncio.sleep(pause_s)

    async def close(self) -> None:
        """Take nothing more, and wait until each request that still arrives was passed on."""
        self._tasks.cancel()
        await self._taking.close()
        await self._begun.close()

    def wanted(self) -> list[Lane]:
        """The lanes whose first request MLX would begin sooner than Ollama if it had a slot, the most urgent first."""
        peers, now = self.me.peers, self.me.bus.clock.now()
        load = peers.load("ollama")
        if load is None:
            return []
        queued = {priority: load.queued.of(priority) for priority in Priority}
        priorities = wanted_back(Capacity.of(peers.workers("ollama")), queued)
        return [
            lane
            for lane in OLLAMA_SOURCE.consumers
            if lane.priority in priorities
            and self._rests_until.get(lane, 0.0) <= now
            and not self._taking.is_paused(lane)
        ]

    async def take(self, upto: Priority | None) -> Taken | None:
        """The first request of a wanted lane that MLX can answer, if it is there now.

        Args:
            upto: a request of this priority may wait for MLX, so no less urgent one is taken; None if none waits.
        """
        order = list(Priority)
        for lane in self.wanted():
            if upto is not None and order.index(lane.priority) > order.index(upto):
                continue
            taken = await self._taking.take(lane)
            if taken is not None and self._may_answer(taken):
                return taken
            rest_s = _COUNT_IS_OLD_S if taken is None else _FOR_OLLAMA_ALONE_S
            self._rests_until[lane] = self.me.bus.clock.now() + rest_s
            if taken is not None:
                await taken.held.end(Returned())
                self.finish(taken, 0.0)
        return None

    async def take_begun(self, consumer: str) -> Taken | Literal["none", "another"]:
        """The first request of a lane if it has been delivered before. It is charged like any other.

        `none`: the lane is empty, and the request may be on its way. `another`: another worker has taken it.
        """
        delivery: Delivery | None = await self._begun.take(consumer)
        if delivery is None:
            return "none"
        if delivery.delivered == 1:
            await self._taking.give_back(delivery)
            return "another"
        taken = self._taking.receive(delivery)
        if self._may_answer(taken):
            return taken
        await taken.held.end(Returned())
        self.finish(taken, 0.0)
        return "another"

    def finish(self, taken: Taken, cost: float) -> None:
        """As `Taking.finish`."""
        self._taking.finish(taken, cost)

    def _may_answer(self, taken: Taken) -> bool:
        try:
            request = decode_request(taken.held.body, max_body_bytes=self.config.max_body_bytes)
        except HeadraceError:
            return False
        return is_on(self.me.peers.catalogue(self.config), "mlx", request)
