"""Streams that were deleted while headrace runs are created again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from pipeline.broker import topology
from pipeline.broker.connection import BusError
from pipeline.broker.jetstream import Bus
from pipeline.broker.secret import keep_moves
from pipeline.config import Config

log = logging.getLogger(__name__)

_EVERY_S = 2.0


class StreamKeeper:
    """Looks from time to time whether all streams exist. Whatever is stored in a missing one is refused until then.

    Args:
        bus: the connection.
        config: the settings, to create them.
        leads: whether this monitor acts.
        on_made: called when streams were created.
    """

    def __init__(self, bus: Bus, config: Config, leads: Callable[[], bool], on_made: Callable[[], None]) -> None:
        self.bus = bus
        self.config = config
        self.leads = leads
        self.on_made = on_made

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(_EVERY_S)
            if self.leads():
                await self._look()

    async def _look(self) -> None:
        names = [stream.name for stream in topology.streams(self.config)]
        missing = [name for name in names if await self.bus.lacks(name)]
        if not missing:
            return
        log.warning("The streams %s are missing; creating them again.", ", ".join(missing))
        try:
            await topology.apply(self.bus.js, self.config)
            await keep_moves(self.bus)
        except (BusError, topology.TopologyError) as error:
            log.error("They were not created: %s", error)  # noqa: TRY400 - the message says all
        else:
            self.on_made()
