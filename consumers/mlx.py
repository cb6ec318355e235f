"""The MLX consumer: requests of all lanes, answered by the model in the supervised child process."""

from __future__ import annotations

import os
import socket

from consumers.engine.process import EngineProcess
from pipeline import topology
from pipeline.bus import Bus, Delivery
from pipeline.config import Config
from pipeline.core.delivery import Envelope
from pipeline.core.models import ollama_model_for
from pipeline.errors import ErrorCode, HeadraceError
from pipeline.lifecycle import Lifecycle
from pipeline.messages import ChatRequest
from pipeline.peers import Peers
from pipeline.subjects import LANES, QUEUED_PREFIX, STREAM_REQUESTS, Move, ollama_subject
from pipeline.telemetry import Tracing
from pipeline.worker.move import move
from pipeline.worker.worker import Source, Worker

SOURCE = Source(STREAM_REQUESTS, {lane: lane.consumer for lane in LANES}, QUEUED_PREFIX)


class ToOllama:
    """Passes on what names a model that only Ollama has."""

    def __init__(self, bus: Bus, config: Config, tracing: Tracing, peers: Peers) -> None:
        self._bus = bus
        self._config = config
        self._tracing = tracing
        self._peers = peers

    async def offer(self, delivery: Delivery, envelope: Envelope, request: ChatRequest, error: HeadraceError) -> bool:
        """As `Elsewhere.offer`."""
        if error.code is not ErrorCode.MODEL_NOT_FOUND or envelope.move is Move.RETURNED:
            return False
        config = self._config
        there = self._peers.models("ollama")
        model = ollama_model_for(request.wanted_model, config.spill_models, there, config.internal_models)
        if model is None:
            return False
        return await move(
            self._bus,
            self._tracing,
            delivery,
            envelope,
            to=ollama_subject(envelope.priority),
            how=Move.SPILLED,
            task=envelope.task,
            reason=f"only ollama has the model {model}",
        )


async def main(config: Config, lifecycle: Lifecycle) -> None:
    """Run the role until lifecycle asks to stop.

    Raises:
        Unreachable: no broker at the first try.
        TopologyError: the broker's streams cannot be brought to what is configured.
    """
    name = f"mlx-{socket.gethostname()}-{os.getpid()}".replace(".", "-")
    tracing = Tracing.from_environment(service="headrace-mlx", instance=name)
    try:
        async with Bus.connect(config.nats_url, name=name) as bus:
            await topology.apply(bus.js, config)
            peers = Peers(bus)
            await peers.start()
            async with EngineProcess(config) as engine:
                elsewhere = ToOllama(bus, config, tracing, peers)
                await Worker(bus, engine, config, tracing, SOURCE, elsewhere, peers, name).run(lifecycle)
    finally:
        tracing.shutdown()
