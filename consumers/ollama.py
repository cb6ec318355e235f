"""The Ollama consumer: spilled requests, answered by an Ollama server, and given back to MLX where it fails."""

from __future__ import annotations

from consumers.engines.ollama import OllamaEngine
from pipeline.broker.connection import Delivery
from pipeline.config import Config
from pipeline.core.envelope import Envelope
from pipeline.delivery.move import return_to_mlx
from pipeline.process.lifecycle import Lifecycle
from pipeline.process.role import Role, role
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import Request
from pipeline.wire.subjects import STREAM_OLLAMA, Lane, Priority, Task, ollama_consumer
from pipeline.worker.worker import Source, Worker

SOURCE = Source(STREAM_OLLAMA, {Lane(p, Task.SIMPLE): ollama_consumer(p) for p in Priority})

# What these say of a request is true of any engine.
_FINAL = frozenset({ErrorCode.INVALID_REQUEST, ErrorCode.REQUEST_TOO_LARGE, ErrorCode.REPLY_SUBJECT_DENIED})


class ToMlx:
    """Gives back what Ollama cannot do after all."""

    def __init__(self, me: Role, config: Config) -> None:
        self._me = me
        self._config = config

    async def offer(self, delivery: Delivery, envelope: Envelope, request: Request, error: HeadraceError) -> bool:
        """As `Elsewhere.offer`."""
        if error.code in _FINAL:
            return False
        return await return_to_mlx(self._me, self._config, delivery, envelope, request, why=error.message)


async def main(config: Config, lifecycle: Lifecycle) -> None:
    """Run the role until lifecycle asks to stop; raises as `pipeline.process.role.role`."""
    async with role("ollama", config) as me, OllamaEngine(config) as engine:
        await Worker(me, engine, config, SOURCE, ToMlx(me, config)).run(lifecycle)
