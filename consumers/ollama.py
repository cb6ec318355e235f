"""The Ollama worker: spilled requests, answered by an Ollama server, and moved back to MLX where it fails."""

from __future__ import annotations

from consumers.engines.ollama import OllamaEngine, OllamaFetcher
from pipeline.config import Config
from pipeline.delivery.lanes import OLLAMA_SOURCE
from pipeline.process.lifecycle import Lifecycle
from pipeline.process.role import role
from pipeline.worker.worker import Worker


async def main(config: Config, lifecycle: Lifecycle) -> None:
    """Run the role until lifecycle asks to stop; raises as `pipeline.process.role.role`."""
    async with role("ollama", config) as me, OllamaEngine(config) as engine:
        worker = Worker(me, engine, config, OLLAMA_SOURCE, fetcher=OllamaFetcher(engine))
        await worker.run(lifecycle)
