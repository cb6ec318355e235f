"""What every role's process holds: its name on the broker, the connection, the streams, its peers, its spans."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from pipeline.broker import topology
from pipeline.broker.connection import Unreachable
from pipeline.broker.jetstream import Bus
from pipeline.broker.peers import Peers
from pipeline.config import Config
from pipeline.telemetry import Tracing

log = logging.getLogger(__name__)

_APPLY_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True)
class Role:
    """One role's connection to everything else."""

    name: str
    bus: Bus
    peers: Peers
    tracing: Tracing


@asynccontextmanager
async def role(kind: str, config: Config) -> AsyncIterator[Role]:
    """Connect one role for the time of the block.

    A broker that has come back may have lost what it held in memory: the streams are brought to what is configured
    after each reconnect as well.

    Args:
        kind: the role, as in `headrace run KIND`.
        config: the settings.

    Raises:
        Unreachable: no broker at the first try.
        TopologyError: the broker's streams cannot be brought to what is configured.
    """
    name = f"{kind}-{socket.gethostname()}-{os.getpid()}".replace(".", "-")
    tracing = Tracing.from_environment(service=f"headrace-{kind}", instance=name)
    applying: set[asyncio.Task[None]] = set()
    try:
        async with Bus.connect(config.nats_url, name=name) as bus:
            await topology.apply(bus.js, config)

            async def apply_again() -> None:
                while True:
                    try:
                        await topology.apply(bus.js, config)
                        return
                    except Unreachable as error:
                        log.info("the broker is not ready yet: %s", error)
                    except topology.TopologyError as error:
                        log.warning("the broker's streams were not brought back: %s", error)
                        return
                    await asyncio.sleep(_APPLY_PAUSE_S)

            def on_reconnect() -> None:
                task = asyncio.get_running_loop().create_task(apply_again())
                applying.add(task)
                task.add_done_callback(applying.discard)

            bus.on_reconnect(on_reconnect)
            peers = Peers(bus)
            await peers.start()
            yield Role(name, bus, peers, tracing)
    finally:
        for task in applying:
            task.cancel()
        await asyncio.to_thread(tracing.shutdown)
