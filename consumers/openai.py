"""The worker of a server of OpenAI's API: spilled requests, and those for models that no other engine has."""

from __future__ import annotations

from consumers.engines.openai import OpenAIEngine
from pipeline.config import Config
from pipeline.delivery.lanes import OLLAMA_SOURCE
from pipeline.process.lifecycle import Lifecycle, StartError
from pipeline.process.role import role
from pipeline.worker.worker import Worker


async def main(config: Config, lifecycle: Lifecycle) -> None:
    """Run the role until lifecycle asks to stop; raises as `pipeline.process.role.role`.

    Raises:
        StartError: not one server is named.
        ConfigError: its URL or its key cannot be used.
    """
    if len(config.openai) != 1:
        named = "no server" if not config.openai else f"{len(config.openai)} servers"
        message = f"This role serves one server of OpenAI's API, and the settings name {named}."
        raise StartError(f"{message} Name one: headrace run openai --url http://127.0.0.1:8000")
    async with role("openai", config) as me, OpenAIEngine(config, config.openai[0]) as engine:
        await Worker(me, engine, config, OLLAMA_SOURCE).run(lifecycle)
