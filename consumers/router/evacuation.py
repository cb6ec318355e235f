"""Moves requests from Ollama's lanes back to MLX while no Ollama worker is ready, so that no request waits for one.

Ollama's worker itself returns the requests that it fails to answer, and MLX's workers take requests from Ollama's
lanes that they would begin sooner. The router moves the others: requests that only Ollama could answer, and all
requests if no MLX worker takes any.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import partial

from pipeline.broker.connection import Delivery
from pipeline.config import Config
from pipeline.core.ending import Abandoned, Failed, Moved, Returned, Settled
from pipeline.core.placement import back_to_mlx
from pipeline.core.rests import LaneRests
from pipeline.core.saturation import STALE_S
from pipeline.core.waits import Capacity
from pipeline.delivery.held import Held
from pipeline.delivery.lanes import OLLAMA_SOURCE
from pipeline.delivery.taking import Taken, Taking
from pipeline.process.role import Role
from pipeline.wire.decoding import decode_request
from pipeline.wire.errors import ErrorCode, HeadraceError, quoted
from pipeline.wire.requests import Request
from pipeline.wire.subjects import Lane

_LOOK_EVERY_S = 0.1
_REFUSED_PAUSE_S = 0.5
# MLX's workers take requests from the lanes in the order of their turns. What they have left after this long is moved.
_LENT_FOR_S = 5.0
# A request that only Ollama can answer stays on its lane, and is delivered again after this long.
_STAYS_S = 2.0


@dataclass(slots=True)
class Evacuation:
    """Takes requests back from Ollama's lanes. Several may run: the broker delivers each request to one of them."""

    me: Role
    config: Config
    _taking: Taking = field(init=False)
    _began_at: float = field(init=False)
    _away_since: float | None = field(init=False, default=None)
    _rests: LaneRests = field(init=False, default_factory=LaneRests)

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
            lanes = await self._until_wanted()
            taken = await self._taking.next(partial(self._while_wanted, lanes), lanes=lanes)
            if taken is not None:
                await self._take_back(taken)
            elif self._taking.refused:
                await asyncio.sleep(_REFUSED_PAUSE_S)

    def _is_away(self) -> bool:
        now, peers = self.me.bus.clock.now(), self.me.peers
        if Capacity.of(peers.workers("ollama")).slots_total:
            self._away_since = None
            return False
        if self._away_since is None:
            self._away_since = now
        # A worker that has not been heard yet may be there all the same.
        heard_long_enough = now - self._began_at > STALE_S
        lends = any(status.state == "ready" and status.borrows for status in peers.workers("mlx"))
        return heard_long_enough and now - self._away_since >= (_LENT_FOR_S if lends else 0.0)

    def _wanted(self) -> list[Lane]:
        """The lanes to take from now."""
        now = self.me.bus.clock.now()
        return [lane for lane in OLLAMA_SOURCE.consumers if self._is_away() and not self._rests.has_left(lane, now)]

    async def _until_wanted(self) -> list[Lane]:
        while not (lanes := self._wanted()):  # noqa: ASYNC110 - as below
            await asyncio.sleep(_LOOK_EVERY_S)
        return lanes

    async def _while_wanted(self, lanes: list[Lane]) -> None:
        while self._wanted() == lanes:  # noqa: ASYNC110 - no event announces that a worker has fallen silent
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _on_surplus(self, delivery: Delivery) -> None:
        await self._take_back(self._taking.receive(delivery))

    async def _take_back(self, taken: Taken) -> None:
        opened = await taken.held.open()
        outcome = opened if isinstance(opened, Settled | Abandoned) else self._outcome(taken.held)
        if isinstance(outcome, Returned):
            # It would be delivered here again and again, and not to Ollama's worker.
            self._rests.leave(taken.lane, self.me.bus.clock.now())
        with taken.held.process():
            await taken.held.end(outcome)
        self._taking.finish(taken, 1.0)

    def _outcome(self, held: Held) -> Moved | Returned | Failed:
        """Back to MLX if MLX can answer the request; else it stays for Ollama's worker, if that has a model for it."""
        stays = Returned(_STAYS_S)
        try:
            request = decode_request(held.body, max_body_bytes=self.config.max_body_bytes)
        except HeadraceError:
            return stays
        catalogue = self.me.peers.catalogue(self.config)
        moved = back_to_mlx(held.envelope, request, catalogue, why="ollama is away")
        return moved or (self._missing(request) if self._has_nothing() else stays)

    def _has_nothing(self) -> bool:
        """Whether Ollama answers and has no usable model any more."""
        workers = self.me.peers.workers("ollama")
        return bool(workers) and all(status.empty for status in workers)

    def _missing(self, request: Request) -> Failed:
        if (refusal := self.me.peers.catalogue(self.config).refusal(request.wanted_model)) is not None:
            return Failed(refusal)
        asked = "a model for this request" if request.wanted_model is None else f"model {quoted(request.wanted_model)}"
        return Failed(HeadraceError(ErrorCode.MODEL_NOT_FOUND, f"Ollama does not have {asked}.", param="model"))
