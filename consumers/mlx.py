"""The MLX consumer: requests of all lanes, answered by the model in the supervised child process."""

from __future__ import annotations

from consumers.engine.process import EngineProcess
from pipeline.config import Config
from pipeline.connection import Delivery
from pipeline.core.envelope import Envelope
from pipeline.core.models import Catalogue
from pipeline.errors import ErrorCode, HeadraceError
from pipeline.lifecycle import Lifecycle
from pipeline.requests import ChatRequest
from pipeline.role import Role, role
from pipeline.subjects import LANES, QUEUED_PREFIX, STREAM_REQUESTS, Move, ollama_subject
from pipeline.worker.move import move
from pipeline.worker.worker import Source, Worker

SOURCE = Source(STREAM_REQUESTS, {lane: lane.consumer for lane in LANES}, QUEUED_PREFIX)


class ToOllama:
    """Passes on what names a model that only Ollama has."""

    def __init__(self, me: Role, config: Config) -> None:
        self._me = me
        self._config = config

    async def offer(self, delivery: Delivery, envelope: Envelope, request: ChatRequest, error: HeadraceError) -> bool:
        """As `Elsewhere.offer`.

        Raises:
            HeadraceError: `model_not_found` with all that there is, where no engine has the model.
        """
        if error.code is not ErrorCode.MODEL_NOT_FOUND or envelope.move is Move.RETURNED:
            return False
        config, peers = self._config, self._me.peers
        catalogue = Catalogue(peers.models("mlx"), peers.models("ollama"), config.spill_models, config.internal_models)
        catalogue.engines_for(request.wanted_model)
        model = catalogue.model_on("ollama", request.wanted_model)
        if model is None:
            return False
        return await move(
            self._me.bus,
            self._me.tracing,
            delivery,
            envelope,
            to=ollama_subject(envelope.priority),
            how=Move.SPILLED,
            task=envelope.task,
            reason=f"only ollama has the model {model}",
        )


async def main(config: Config, lifecycle: Lifecycle) -> None:
    """Run the role until lifecycle asks to stop; raises as `pipeline.role.role`."""
    async with role("mlx", config) as me, EngineProcess(config) as engine:
        elsewhere = ToOllama(me, config)
        await Worker(me, engine, config, SOURCE, elsewhere).run(lifecycle)
