"""Taking over, beyond the slots, what a worker that has died or left had begun: as `pipeline.core.takeover` says."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.broker.connection import BusError, Delivery
from pipeline.core.takeover import AGAIN_S, Takeover
from pipeline.delivery.lease import LeaseKeeper
from pipeline.delivery.puller import Puller
from pipeline.process.role import Role
from pipeline.wire.messages import EngineName, WorkerStatus

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Rescue:
    """Listens to the other workers of the same engine, and takes over what they cannot finish.

    Args:
        me: the role's connection and name.
        engine: whose workers they are.
        stream: where their requests are.
        consumers: of the stream's lanes, the most urgent first.
        leases: of this worker.
        held: how many requests this worker holds, by consumer.
        room: how many more it may begin, slots or not.
        begin: serves a request that was begun before.
        on_surplus: is given one that was not.
    """

    me: Role
    engine: EngineName
    stream: str
    consumers: tuple[str, ...]
    leases: LeaseKeeper
    held: Callable[[], Mapping[str, int]]
    room: Callable[[], int]
    begin: Callable[[Delivery], None]
    on_surplus: Callable[[Delivery], Coroutine[Any, Any, None]]
    _takeover: Takeover = field(init=False)
    _puller: Puller = field(init=False)
    _heard: asyncio.Event = field(init=False, default_factory=asyncio.Event)

    async def start(self) -> None:
        """Listen. Call once."""
        self._puller = Puller(self.me.bus, self.stream, self.on_surplus, self.leases.lease_s)
        await self._puller.start()
        self._takeover = Takeover(self.me.name, self.leases.lease_s, _now())
        self.me.peers.on_status = self._on_status
        self.me.bus.on_reconnect(self._begin_anew)

    async def close(self) -> None:
        """Wait until what still came has been handed on as surplus."""
        await self._puller.close()

    async def run(self) -> None:
        """Look for orphans until cancelled."""
        while True:
            await self._until_time_to_look()
            await self.leases.until_certain()
            try:
                await self._look()
            except BusError as error:
                log.debug("not looked for orphaned requests: %s", error)
                await asyncio.sleep(AGAIN_S)

    async def _until_time_to_look(self) -> None:
        while (left_s := self._takeover.next_look() - _now()) > 0 or self.room() <= 0:
            self._heard.clear()
            try:
                async with asyncio.timeout(min(max(left_s, AGAIN_S), self.leases.lease_s)):
                    await self._heard.wait()
            except TimeoutError:
                pass

    async def _look(self) -> None:
        states = {state.name: state.num_ack_pending for state in await self.me.bus.consumers(self.stream)}
        held = {consumer: states[consumer] for consumer in self.consumers if consumer in states}
        for consumer, count in self._takeover.look(held, self.held(), _now()).items():
            await self._take(consumer, min(count, self.room()))

    async def _take(self, consumer: str, count: int) -> None:
        for _ in range(count):
            delivery = await self._puller.take(consumer)
            if delivery is None:
                return
            if delivery.delivered == 1:
                # Nobody has begun it: the lane's orphans have been taken, or their leases hold still.
                await self.on_surplus(delivery)
                return
            log.info("request %d of %s is taken over", delivery.sequence, consumer)
            self.begin(delivery)

    def _on_status(self, status: WorkerStatus) -> None:
        if status.engine == self.engine:
            if status.state == "gone":
                self._takeover.left(status.worker, _now())
            else:
                self._takeover.heard(status.worker, status.held, _now())
            self._heard.set()

    def _begin_anew(self) -> None:
        self._takeover.begin(_now())
        self._heard.set()


def _now() -> float:
    return asyncio.get_running_loop().time()
