"""The Ollama consumer: spilled requests, answered by an Ollama server, and given back to MLX where it fails."""

from __future__ import annotations

import os
import socket

from consumers.ollama_engine import OllamaEngine
from pipeline import topology
from pipeline.bus import Bus, Delivery
from pipeline.config import Config
from pipeline.core.delivery import Envelope
from pipeline.core.models import mlx_model_for
from pipeline.errors import ErrorCode, HeadraceError
from pipeline.lifecycle import Lifecycle
from pipeline.messages import ChatRequest
from pipeline.peers import Peers
from pipeline.subjects import STREAM_OLLAMA, Lane, Move, Priority, Task, ollama_consumer
from pipeline.telemetry import Tracing
from pipeline.worker.move import move
from pipeline.worker.worker import Source, Worker

SOURCE = Source(STREAM_OLLAMA, {Lane(p, Task.SIMPLE): ollama_consumer(p) for p in Priority})

# What these say of a request is true of any engine.
_FINAL = frozenset({ErrorCode.INVALID_REQUEST, ErrorCode.REQUEST_TOO_LARGE, ErrorCode.REPLY_SUBJECT_DENIED})


class ToMlx:
    """Gives back what Ollama cannot do after all."""

    def __init__(self, bus: Bus, config: Config, tracing: Tracing, peers: Peers) -> None:
        self._bus = bus
        self._config = config
        self._tracing = tracing
        self._peers = peers

    async def offer(self, delivery: Delivery, envelope: Envelope, request: ChatRequest, error: HeadraceError) -> bool:
        """As `Elsewhere.offer`."""
        if error.code in _FINAL:
            return False
        config = self._config
        served = self._peers.models("mlx")
        if mlx_model_for(request.wanted_model, config.spill_models, served, config.internal_models) is None:
            return False
        return await move(
            self._bus,
            self._tracing,
            delivery,
            envelope,
            to=Lane(envelope.priority, Task.COMPLEX).subject,
            how=Move.RETURNED,
            task=envelope.task,
            reason=f"back from ollama: {error.message}",
        )


async def main(config: Config, lifecycle: Lifecycle) -> None:
    """Run the role until lifecycle asks to stop.

    Raises:
        Unreachable: no broker at the first try.
        TopologyError: the broker's streams cannot be brought to what is configured.
    """
    name = f"ollama-{socket.gethostname()}-{os.getpid()}".replace(".", "-")
    tracing = Tracing.from_environment(service="headrace-ollama", instance=name)
    try:
        async with Bus.connect(config.nats_url, name=name) as bus:
            await topology.apply(bus.js, config)
            peers = Peers(bus)
            await peers.start()
            async with OllamaEngine(config) as engine:
                elsewhere = ToMlx(bus, config, tracing, peers)
                await Worker(bus, engine, config, tracing, SOURCE, elsewhere, peers, name).run(lifecycle)
    finally:
        tracing.shutdown()
