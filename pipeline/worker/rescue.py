"""Taking over, beyond the slots, requests that a worker had begun before it died or left; see `core.takeover`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field

from pipeline.aio import wait_set
from pipeline.broker.connection import BusError
from pipeline.core.takeover import AGAIN_S, Takeover
from pipeline.delivery.lease import LeaseKeeper
from pipeline.process.role import Role
from pipeline.wire.messages import EngineName, WorkerStatus

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Rescue:
    """Listens to the other workers of the same engine, and takes over requests that they cannot finish.

    Args:
        me: the role's connection and name.
        engine: whose workers they are.
        stream: the work queue that their requests come from.
        consumers: the durable consumers of their lanes now, the most urgent first.
        leases: of this worker.
        held: how many requests this worker holds, by consumer.
        room: how many more requests it may begin beyond the slots.
        take: takes one request of a consumer; returns whether there may be more.
    """

    me: Role
    engine: EngineName
    stream: str
    consumers: Callable[[], Collection[str]]
    leases: LeaseKeeper
    held: Callable[[], Mapping[str, int]]
    room: Callable[[], int]
    take: Callable[[str], Awaitable[bool]]
    _takeover: Takeover = field(init=False)
    _heard: asyncio.Event = field(init=False, default_factory=asyncio.Event)

    def start(self) -> None:
        """Listen. Call once."""
        self._takeover = Takeover(self.me.name, self.leases.lease_s, self._now())
        self.me.bus.on_reconnect(self._begin_anew)

    async def run(self) -> None:
        """Look for orphans until cancelled."""
        while True:
            await self._until_time_to_look()
            await self.leases.until_certain()
            try:
                await self._look()
            except BusError as error:
                log.debug("Orphaned requests were not looked for: %s", error)
                await asyncio.sleep(AGAIN_S)

    async def _until_time_to_look(self) -> None:
        while (left_s := self._takeover.next_look() - self._now()) > 0 or self.room() <= 0:
            self._heard.clear()
            await wait_set(self._heard, min(max(left_s, AGAIN_S), self.leases.lease_s))

    async def _look(self) -> None:
        states = {state.name: state.num_ack_pending for state in await self.me.bus.consumers(self.stream)}
        held = {consumer: states[consumer] for consumer in self.consumers() if consumer in states}
        for consumer, count in self._takeover.look(held, self.held(), self._now()).items():
            for _ in range(count):
                if not await self.take(consumer):
                    break

    def heard(self, status: WorkerStatus) -> None:
        """A worker reported its status."""
        if status.engine == self.engine:
            if status.state == "gone":
                self._takeover.left(status.worker, self._now())
            else:
                self._takeover.heard(status.worker, status.held, self._now())
            self._heard.set()

    def _begin_anew(self) -> None:
        self._takeover.begin(self._now())
        self._heard.set()

    def _now(self) -> float:
        return self.me.bus.clock.now()
