"""The router: moves simple requests to Ollama while MLX is saturated, and back while Ollama is away."""

from __future__ import annotations

import asyncio

from consumers.engines.ollama import OllamaClient
from consumers.router.evacuation import Evacuation
from consumers.router.router import Router
from pipeline.config import Config
from pipeline.process.lifecycle import Lifecycle
from pipeline.process.role import role

__all__ = ["Evacuation", "Router", "main"]


async def main(config: Config, lifecycle: Lifecycle) -> None:
    """Run the role until lifecycle asks to stop; raises as `pipeline.process.role.role`."""
    client = OllamaClient(
        config.ollama_host,
        idle_timeout_s=config.ollama_timeout_s,
        load_timeout_s=config.ollama_load_timeout_s,
        threads=config.ollama_threads,
    )
    try:
        async with role("router", config) as me, asyncio.TaskGroup() as group:
            evacuating = group.create_task(Evacuation(me, config).run())
            await Router(me, config, client).run(lifecycle)
            evacuating.cancel()
    finally:
        await client.close()
