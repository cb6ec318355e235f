"""Taking requests back from Ollama's lanes while nobody works there, so that none waits for a server that is away.

Ollama's own consumer gives back what fails in its hands; what it has not pulled yet stands in lanes that nobody serves
when its server, or the consumer itself, is down.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field

from pipeline.broker.connection import BusError, Delivery
from pipeline.config import Config
from pipeline.core.envelope import read_envelope
from pipeline.core.saturation import STALE_S, Capacity
from pipeline.delivery.move import give_back, return_to_mlx
from pipeline.delivery.puller import Puller
from pipeline.process.role import Role
from pipeline.wire.errors import HeadraceError
from pipeline.wire.requests import decode_request
from pipeline.wire.subjects import STREAM_OLLAMA, Priority, Task, ollama_consumer

log = logging.getLogger(__name__)

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
    _began_at: float = field(init=False, default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._puller = Puller(self.me.bus, STREAM_OLLAMA, self._take_back, self.config.lease_s)

    async def run(self) -> None:
        """Watch until cancelled."""
        await self._puller.start()
        try:
            while True:
                await self._until(away=True)
                delivery = await self._puller.wait(list(_PRIORITY_OF_CONSUMER), self._until(away=False))
                if delivery is not None:
                    await self._take_back(delivery)
        finally:
            await asyncio.shield(self._puller.close())

    def _is_away(self) -> bool:
        # A worker that has not been heard of yet may be there all the same.
        heard_long_enough = time.monotonic() - self._began_at > STALE_S
        return heard_long_enough and not Capacity.of(self.me.peers.workers("ollama")).slots_total

    async def _until(self, *, away: bool) -> None:
        while self._is_away() is not away:  # noqa: ASYNC110 - silence is a fact that no event announces
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _take_back(self, delivery: Delivery) -> None:
        envelope = read_envelope(delivery, _PRIORITY_OF_CONSUMER[delivery.consumer], Task.SIMPLE)
        try:
            request = decode_request(delivery.message.data, max_body_bytes=self.config.max_body_bytes)
            if await return_to_mlx(self.me, self.config, delivery, envelope, request, why="ollama is away"):
                return
        except HeadraceError as error:
            log.info("%s stays for Ollama's consumer to refuse: %s", envelope.id, error)
        except BusError as error:
            log.warning("%s comes again: %s", envelope.id, error)
            return
        await give_back(self.me.bus, delivery, envelope, delay_s=_STAYS_S)
