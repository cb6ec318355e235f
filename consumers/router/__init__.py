"""The router: moves simple requests to Ollama while MLX is saturated, and back while Ollama is away."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from consumers.router.evacuation import Evacuation
from consumers.router.router import Router
from pipeline.config import Config
from pipeline.process.lifecycle import Lifecycle
from pipeline.process.role import role

if TYPE_CHECKING:
    from consumers.engines.ollama import OllamaClient

__all__ = ["Evacuation", "Router", "main"]


async def main(config: Config, lifecycle: Lifecycle) -> None:
    """Run the role until lifecycle asks to stop; raises as `pipeline.process.role.role`."""
    client = _client(config) if config.classifier_model else None
    try:
        async with role("router", config) as me, asyncio.TaskGroup() as group:
            evacuating = group.create_task(Evacuation(me, config).run())
            await Router(me, config, client).run(lifecycle)
            evacuating.cancel()
    finally:
        if client is not None:
            await client.close()


def _client(config: Config) -> OllamaClient:
    """A client for the model that classifies."""
    from consumers.engines.ollama import OllamaClient  # noqa: PLC0415 - slow to import, and rarely used

    return OllamaClient(
        config.ollama_host,
        idle_timeout_s=config.ollama_timeout_s,
        load_timeout_s=config.ollama_load_timeout_s,
        threads=config.ollama_threads,
    )
