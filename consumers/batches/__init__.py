"""The role that runs batches: feeds the lines of an input file to LOW, and gathers the results in files."""

from __future__ import annotations

from consumers.batches.batches import Batches
from pipeline.config import Config
from pipeline.process.lifecycle import Lifecycle
from pipeline.process.role import role

__all__ = ["Batches", "main"]


async def main(config: Config, lifecycle: Lifecycle) -> None:
    """Run the role until lifecycle asks to stop; raises as `pipeline.process.role.role`."""
    async with role("batches", config) as me:
        await Batches(me, config).run(lifecycle)
