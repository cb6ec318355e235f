"""The backpressure monitor: load events, statistics and positions, and the end of what waits too long."""

from __future__ import annotations

from consumers.monitor.monitor import Monitor
from pipeline.config import Config
from pipeline.process.lifecycle import Lifecycle
from pipeline.process.role import role

__all__ = ["Monitor", "main"]


async def main(config: Config, lifecycle: Lifecycle) -> None:
    """Run the role until lifecycle asks to stop; raises as `pipeline.process.role.role`."""
    async with role("monitor", config) as me:
        await Monitor(me, config).run(lifecycle)
