"""What each role's process has: a name on the broker, the connection and its clock, the streams, peers, spans."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from pipeline.aio import Background
from pipeline.broker import topology
from pipeline.broker.connection import BusError
from pipeline.broker.jetstream import Bus
from pipeline.broker.peers import Peers
from pipeline.broker.secret import learn_moves
from pipeline.config import Config
from pipeline.telemetry import Tracing

log = logging.getLogger(__name__)

_APPLY_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True)
class Role:
    """One role's connection to everything else. Its clock is `bus.clock`."""

    name: str
    bus: Bus
    peers: Peers
    tracing: Tracing


@asynccontextmanager
async def role(kind: str, config: Config) -> AsyncIterator[Role]:
    """Connect one role for the time of the block.

    The streams are brought to the configured state at the start and after each reconnect: a broker that restarted may
    have lost what it held in memory. The broker's clock is known when the block begins.

    Args:
        kind: the role, as in `headrace run KIND`.
        config: the settings.

    Raises:
        BusError: the broker did not answer at the first try.
        TopologyError: the broker's streams cannot be brought to the configured state.
    """
    name = f"{kind}-{socket.gethostname()}-{os.getpid()}".replace(".", "-")
    tracing = Tracing.from_environment(service=f"headrace-{kind}", instance=name)
    background = Background()
    try:
        async with Bus.connect(config.nats_url, name=name) as bus:
            await topology.apply(bus.js, config)
            await learn_moves(bus)
            await bus.sample_clock()
            tracing.use_clock(bus.clock.aligned)
            background.start(bus.keep_clock(), what="sampling the broker's clock")
            bus.on_reconnect(lambda: _apply_again(bus, config, background))
            peers = Peers(bus)
            await peers.start()
            await peers.pauses.start()
            await peers.lanes.start()
            yield Role(name, bus, peers, tracing)
    finally:
        background.cancel()
        await asyncio.to_thread(tracing.shutdown)


def _apply_again(bus: Bus, config: Config, background: Background) -> None:
    async def apply() -> None:
        while True:
            try:
                await topology.apply(bus.js, config)
                await learn_moves(bus)
                return
            except BusError as error:
                log.info("The broker is not ready yet: %s", error)
            except topology.TopologyError as error:
                log.warning("The broker's streams were not restored: %s", error)
                return
            await asyncio.sleep(_APPLY_PAUSE_S)

    background.start(apply(), what="restoring the broker's streams")
