"""The gateway: ways in for programs that do not speak JetStream. Core request-reply here; HTTP is to come beside it."""

from __future__ import annotations

from pipeline.config import Config
from pipeline.gateway.ask import Ask
from pipeline.lifecycle import Lifecycle
from pipeline.role import role


async def main(config: Config, lifecycle: Lifecycle) -> None:
    """Run the role until lifecycle asks to stop; raises as `pipeline.role.role`."""
    async with role("gateway", config) as me:
        await Ask(me.bus, me.tracing).start()
        lifecycle.report("ready")
        await lifecycle.stopping.wait()
