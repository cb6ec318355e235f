"""Taking requests back from Ollama's lanes while nobody works there, so that none waits for a server that is away.

Ollama's own consumer gives back what fails in its hands; what it has not pulled yet stands in lanes that nobody serves
when its server, or the consumer itself, is down.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from pipeline.broker.connection import Delivery
from pipeline.config import Config
from pipeline.core.ending import Moved, Returned
from pipeline.core.envelope import read_envelope
from pipeline.core.placement import back_to_mlx
from pipeline.core.saturation import STALE_S, Capacity
from pipeline.delivery.held import Held
from pipeline.delivery.lease import LeaseKeeper
from pipeline.delivery.puller import Puller
from pipeline.process.role import Role
from pipeline.wire.errors import HeadraceError
from pipeline.wire.requests import decode_request
from pipeline.wire.subjects import STREAM_OLLAMA, Priority, Task, ollama_consumer

_LOOK_EVERY_S = 0.5
# What only Ollama can answer waits there for it, and is looked at again after this long.
_STAYS_S = 2.0
_PRIORITY_OF_CONSUMER = {ollama_consumer(priority): priority for priority in Priority}


@dataclass(slots=True)
class Evacuation:
    """Empties Ollama's lanes while Ollama is away. Several may run; each request is taken by one."""

    me: Role
    config: Config
    _puller: Puller = field(init=False)
    _leases: LeaseKeeper = field(init=False)
    _began_at: float = field(init=False, default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._puller = Puller(self.me.bus, STREAM_OLLAMA, self._take_back, self.config.lease_s)
        self._leases = LeaseKeeper(self.config.lease_s)

    async def run(self) -> None:
        """Watch until cancelled."""
        await self._puller.start()
        async with asyncio.TaskGroup() as group:
            renewing = group.create_task(self._leases.run())
            try:
                await self._empty_lanes()
            finally:
                await asyncio.shield(self._puller.close())
                renewing.cancel()

    async def _empty_lanes(self) -> None:
        while True:
            await self._until(away=True)
            await self._leases.until_certain()
            delivery = await self._puller.wait(list(_PRIORITY_OF_CONSUMER), self._until(away=False))
            if delivery is not None:
                await self._take_back(delivery)

    def _is_away(self) -> bool:
        # A worker that has not been heard of yet may be there all the same.
        heard_long_enough = time.monotonic() - self._began_at > STALE_S
        return heard_long_enough and not Capacity.of(self.me.peers.workers("ollama")).slots_total

    async def _until(self, *, away: bool) -> None:
        while self._is_away() is not away:  # noqa: ASYNC110 - silence is a fact that no event announces
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _take_back(self, delivery: Delivery) -> None:
        envelope = read_envelope(delivery, _PRIORITY_OF_CONSUMER[delivery.consumer], Task.SIMPLE)
        held = Held.taken(self.me.bus, delivery, envelope, self._leases, tracing=self.me.tracing)
        await held.end(self._outcome(held))

    def _outcome(self, held: Held) -> Moved | Returned:
        """Back to MLX where MLX can answer the request; else it stays for Ollama's worker."""
        try:
            request = decode_request(held.body, max_body_bytes=self.config.max_body_bytes)
        except HeadraceError:
            return Returned(_STAYS_S)
        catalogue = self.me.peers.catalogue(self.config)
        return back_to_mlx(held.envelope, request, catalogue, why="ollama is away") or Returned(_STAYS_S)
