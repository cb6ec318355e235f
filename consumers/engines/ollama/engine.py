"""Ollama as an engine: its API in the terms of `consumers.engines.server`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from consumers.engines.ollama.about import facts_of
from consumers.engines.ollama.calls import call_of, embed_body, notes_on
from consumers.engines.ollama.client import OllamaClient
from consumers.engines.ollama.wire import LineReader, OllamaModel, blames_request, read_embedded, says_too_long
from consumers.engines.server.dialect import Call
from consumers.engines.server.engine import ServerEngine
from consumers.engines.server.errors import ServerError
from pipeline.config import Config
from pipeline.engine import Embedded, Work
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import Dialect, ModelFacts
from pipeline.wire.requests import EmbeddingRequest

# Statuses that are about the server or its proxy, and not about the request.
_NOT_THE_REQUEST = frozenset({401, 403, 407, 408, 425, 429, 499})


class OllamaDialect:
    """An Ollama server, as `ServerDialect`.

    Args:
        config: the settings; `ollama_*` and `default_max_tokens` are read.
        host: the server, as `OLLAMA_HOST`; empty for `config.ollama_host`.

    Attributes:
        client: of the server.
    """

    dialect: Dialect = "ollama"
    label = "Ollama"
    # Ollama reports no tokens, and has no way to go on with a text.
    continues = False
    advice = "Pull one with `ollama pull`."

    def __init__(self, config: Config, host: str = "") -> None:
        self._default_max_tokens = config.default_max_tokens
        self.client = OllamaClient(
            host or config.ollama_host,
            idle_timeout_s=config.ollama_timeout_s,
            load_timeout_s=config.ollama_load_timeout_s,
            threads=config.ollama_threads,
        )
        self.url = self.client.url
        self.place = f"Ollama at {self.url}"
        self.is_local = self.client.is_local

    async def models(self) -> Sequence[OllamaModel]:
        """As `ServerDialect.models`."""
        return await self.client.models()

    async def loaded(self) -> Mapping[str, int] | None:
        """As `ServerDialect.loaded`."""
        loaded = await self.client.loaded()
        return None if loaded is None else {model.name: model.size_vram for model in loaded}

    def facts(self, model: OllamaModel, loaded: Mapping[str, int]) -> ModelFacts:
        """As `ServerDialect.facts`."""
        return facts_of(model, loaded)

    def call(self, work: Work, model: OllamaModel | None) -> Call:
        """As `ServerDialect.call`."""
        if name := work.request.needs_mlx:
            message = f"Ollama does not support `{name}`. Name a model that MLX has, or leave it out."
            raise HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, message, param=name)
        if work.resume_text or work.resume_tokens:
            raise HeadraceError(
                ErrorCode.ENGINE_FAILED,
                "The answer was begun by another attempt, and Ollama cannot continue it: it reports no tokens.",
            )
        model = model or OllamaModel(work.model)
        path, body = call_of(work, model, default_max_tokens=self._default_max_tokens)
        asks = bool(body.get("messages") or body.get("prompt"))
        scores = work.request.alternatives is not None
        reader = LineReader(work.id, notes_on(work.request, model), scores=scores, asks=asks)
        return Call(self.client.answer(path, body), reader, limit=body["options"]["num_predict"])

    async def embed(self, request: EmbeddingRequest, model: str) -> Embedded:
        """As `ServerDialect.embed`."""
        return read_embedded(await self.client.embed(embed_body(request, model)), len(request.texts))

    def refusal(self, error: ServerError) -> HeadraceError | None:
        """As `ServerDialect.refusal`."""
        if not blames_request(error.message) and (
            error.status is None or not 400 <= error.status < 500 or error.status in _NOT_THE_REQUEST
        ):
            return None
        return HeadraceError(_code(error), f"Ollama refused the request: {error.message.rstrip('.')}.")

    async def close(self) -> None:
        """As `ServerDialect.close`."""
        await self.client.close()


class OllamaEngine(ServerEngine[OllamaModel]):
    """An Ollama server as an engine.

    Args:
        config: the settings.
        host: the server, as `OLLAMA_HOST`; empty for `config.ollama_host`.

    Attributes:
        client: of the server.
    """

    def __init__(self, config: Config, host: str = "") -> None:
        dialect = OllamaDialect(config, host)
        super().__init__(config, dialect, slots=config.ollama_slots)
        self.client = dialect.client


def _code(error: ServerError) -> ErrorCode:
    if says_too_long(error.message):
        return ErrorCode.CONTEXT_LENGTH_EXCEEDED
    if error.status == 404:
        return ErrorCode.MODEL_NOT_FOUND
    return ErrorCode.UNSUPPORTED_PARAMETER if "does not support" in error.message else ErrorCode.INVALID_REQUEST
