"""The gateway: ways in for programs that do not speak JetStream. Core request-reply here; HTTP is to come beside it."""

from __future__ import annotations

import os
import socket

from pipeline import topology
from pipeline.bus import Bus
from pipeline.config import Config
from pipeline.gateway.ask import Ask
from pipeline.lifecycle import Lifecycle
from pipeline.telemetry import Tracing


async def main(config: Config, lifecycle: Lifecycle) -> None:
    """Run the role until lifecycle asks to stop.

    Raises:
        Unreachable: no broker at the first try.
        TopologyError: the broker's streams cannot be brought to what is configured.
    """
    name = f"gateway-{socket.gethostname()}-{os.getpid()}"
    tracing = Tracing.from_environment(service="headrace-gateway", instance=name)
    try:
        async with Bus.connect(config.nats_url, name=name) as bus:
            await topology.apply(bus.js, config)
            await Ask(bus, tracing).start()
            lifecycle.report("ready")
            await lifecycle.stopping.wait()
    finally:
        tracing.shutdown()
