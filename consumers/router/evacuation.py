"""Moving requests from Ollama's lanes back to MLX while no Ollama worker is ready, so that none waits for one.

Ollama's worker moves back the requests that fail in its hands. Requests that it has not pulled yet are taken back here
when its server, or the worker itself, is down.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from pipeline.broker.connection import Delivery
from pipeline.config import Config
from pipeline.core.ending import Moved, Returned
from pipeline.core.placement import back_to_mlx
from pipeline.core.saturation import STALE_S
from pipeline.core.waits import Capacity
from pipeline.delivery.held import Held
from pipeline.delivery.taking import OLLAMA_SOURCE, Taken, Taking
from pipeline.process.role import Role
from pipeline.wire.errors import HeadraceError
from pipeline.wire.requests import decode_request

_LOOK_EVERY_S = 0.5
# A request that only Ollama can answer stays on its lane, and is delivered again after this long.
_STAYS_S = 2.0


@dataclass(slots=True)
class Evacuation:
    """Empties Ollama's lanes while Ollama is away. Several may run: the broker delivers each request to one of them."""

    me: Role
    config: Config
    _taking: Taking = field(init=False)
    _began_at: float = field(init=False)

    def __post_init__(self) -> None:
        self._taking = Taking(self.me, self.config, OLLAMA_SOURCE, on_surplus=self._on_surplus)
        self._began_at = self.me.bus.clock.now()

    async def run(self) -> None:
        """Work until cancelled."""
        await self._taking.start()
        async with asyncio.TaskGroup() as group:
            renewing = group.create_task(self._taking.leases.run())
            try:
                await self._empty_lanes()
            finally:
                await asyncio.shield(self._taking.close())
                renewing.cancel()

    async def _empty_lanes(self) -> None:
        while True:
            await self._until(away=True)
            taken = await self._taking.next(lambda: self._until(away=False))
            if taken is not None:
                await self._take_back(taken)
            elif self._taking.refused:
                await asyncio.sleep(_LOOK_EVERY_S)

    def _is_away(self) -> bool:
        # A worker that has not been heard yet may be there all the same.
        heard_long_enough = self.me.bus.clock.now() - self._began_at > STALE_S
        return heard_long_enough and not Capacity.of(self.me.peers.workers("ollama")).slots_total

    async def _until(self, *, away: bool) -> None:
        while self._is_away() is not away:  # noqa: ASYNC110 - no event announces that a worker has fallen silent
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _on_surplus(self, delivery: Delivery) -> None:
        await self._take_back(self._taking.receive(delivery))

    async def _take_back(self, taken: Taken) -> None:
        with taken.held.process():
            await taken.held.end(self._outcome(taken.held))
        self._taking.finish(taken, 1.0)

    def _outcome(self, held: Held) -> Moved | Returned:
        """Back to MLX if MLX can answer the request; else it stays for Ollama's worker."""
        try:
            request = decode_request(held.body, max_body_bytes=self.config.max_body_bytes)
        except HeadraceError:
            return Returned(_STAYS_S)
        catalogue = self.me.peers.catalogue(self.config)
        return back_to_mlx(held.envelope, request, catalogue, why="ollama is away") or Returned(_STAYS_S)
