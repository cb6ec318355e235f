"""The MLX consumer: requests of all lanes, answered by the model in the supervised child process."""

from __future__ import annotations

import time

from consumers.engines.local.process import EngineProcess
from consumers.models.names import located, served_name_of
from pipeline.broker.connection import Delivery
from pipeline.config import Config
from pipeline.core.envelope import Envelope
from pipeline.delivery.move import move
from pipeline.process.lifecycle import Lifecycle
from pipeline.process.role import Role, role
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import EmbeddingRequest, Request
from pipeline.wire.subjects import LANES, QUEUED_PREFIX, STREAM_REQUESTS, Move, ollama_subject
from pipeline.worker.worker import Source, Worker

SOURCE = Source(STREAM_REQUESTS, {lane: lane.consumer for lane in LANES}, QUEUED_PREFIX)


# For so long after its start a worker does not say that nobody has a model, unless a ready Ollama has been heard of.
PATIENCE_S = 10.0


class ToOllama:
    """Passes on what names a model that only Ollama has.

    Args:
        me: the role's connection.
        config: the settings.
        patience_s: how long Ollama has to be heard of.
    """

    def __init__(self, me: Role, config: Config, patience_s: float = PATIENCE_S) -> None:
        self._me = me
        self._config = config
        self._patient_until = time.monotonic() + patience_s

    async def offer(self, delivery: Delivery, envelope: Envelope, request: Request, error: HeadraceError) -> bool:
        """As `Elsewhere.offer`.

        Raises:
            HeadraceError: `model_not_found` with all that there is, where no engine has the model; `unavailable` while
                Ollama may still say that it has it.
        """
        if error.code is not ErrorCode.MODEL_NOT_FOUND or envelope.move is Move.RETURNED:
            return False
        try:
            model = self._model_for(request)
        except HeadraceError as refusal:
            if refusal.code is ErrorCode.MODEL_NOT_FOUND and self._may_still_be_told:
                raise HeadraceError(ErrorCode.UNAVAILABLE, "ollama has not said yet which models it has") from None
            raise
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

    @property
    def _may_still_be_told(self) -> bool:
        is_told = any(status.state == "ready" for status in self._me.peers.workers("ollama"))
        return not is_told and time.monotonic() < self._patient_until

    def _model_for(self, request: Request) -> str | None:
        catalogue = self._me.peers.catalogue(self._config)
        if isinstance(request, EmbeddingRequest):
            return catalogue.embedder(request.wanted_model)
        catalogue.engines_for(request.wanted_model)
        return catalogue.model_on("ollama", request.wanted_model)


async def main(config: Config, lifecycle: Lifecycle) -> None:
    """Run the role until lifecycle asks to stop; raises as `pipeline.process.role.role`."""
    model_path, served_name = located(config.model), served_name_of(config.model)
    async with (
        role("mlx", config) as me,
        EngineProcess(config, model_path=model_path, served_name=served_name) as engine,
    ):
        elsewhere = ToOllama(me, config)
        await Worker(me, engine, config, SOURCE, elsewhere).run(lifecycle)
