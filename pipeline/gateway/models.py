"""The model lists of all dialects, from one catalogue that is kept for a moment."""

from __future__ import annotations

import time

from starlette.requests import Request
from starlette.responses import Response

from pipeline.broker.peers import Peers
from pipeline.config import Config
from pipeline.core.models import Catalogue, same_model, spelled
from pipeline.gateway.bodies import read_body
from pipeline.gateway.dialects import anthropic, ollama, openai
from pipeline.gateway.responses import json_response
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import EngineName

_KEPT_S = 0.2
_MAX_SHOW_BYTES = 1 << 16
_ENGINES: tuple[EngineName, ...] = ("mlx", "ollama")


class Models:
    """The models that clients can name.

    Args:
        peers: the known workers.
        config: the settings.
    """

    def __init__(self, peers: Peers, config: Config) -> None:
        self._peers = peers
        self._config = config
        self._since = time.time()
        self._catalogue: Catalogue | None = None
        self._catalogue_at = 0.0

    def catalogue(self) -> Catalogue:
        """The known models. It is built at most five times a second, however many calls need it."""
        now = time.monotonic()
        if self._catalogue is None or now - self._catalogue_at > _KEPT_S:
            self._catalogue = self._peers.catalogue(self._config)
            self._catalogue_at = now
        return self._catalogue

    def listed(self) -> list[str]:
        """The names that clients see."""
        return self.catalogue().listed()

    def check(self, requested: str | None, *, embeds: bool) -> None:
        """Refuse a model that no engine can have. While an engine has no worker, the pipeline decides later.

        Raises:
            HeadraceError: `model_internal` or `model_not_found`; `unsupported_parameter` for a chat with a model that
                only makes embeddings.
        """
        catalogue = self.catalogue()
        try:
            if embeds:
                catalogue.embedder(requested or None)
            else:
                catalogue.engines_for(requested or None)
        except HeadraceError as error:
            complete = catalogue.mlx and (catalogue.ollama or catalogue.embedders)
            if error.code is not ErrorCode.MODEL_NOT_FOUND or complete:
                raise

    def only_on_ollama(self, requested: str | None) -> bool:
        """Whether Ollama has the model of a chat, and MLX has neither it nor its equivalent."""
        catalogue = self.catalogue()
        return catalogue.model_on("mlx", requested) is None and catalogue.model_on("ollama", requested) is not None

    # ---- handlers

    async def v1_list(self, request: Request) -> Response:
        """`GET /v1/models`, in OpenAI's form or Anthropic's."""
        models = anthropic.models if _is_anthropics(request) else openai.models
        return json_response(models(self.listed()))

    async def v1_one(self, request: Request) -> Response:
        """`GET /v1/models/{id}`, in OpenAI's form or Anthropic's."""
        model = anthropic.model if _is_anthropics(request) else openai.model
        return json_response(model(self._known(request.path_params["id"])))

    async def tags(self, _: Request) -> Response:
        """`GET /api/tags`."""
        return json_response(ollama.tags(self.listed(), since=self._since))

    async def ps(self, _: Request) -> Response:
        """`GET /api/ps`: the models of workers that are ready."""
        ready = {
            name
            for engine in _ENGINES
            for worker in self._peers.workers(engine)
            if worker.state == "ready"
            for name in (*worker.models, *worker.embedding_models)
        }
        return json_response(ollama.ps(name for name in self.listed() if name in ready))

    async def show(self, request: Request) -> Response:
        """`POST /api/show`."""
        body = await read_body(request, limit=_MAX_SHOW_BYTES, within_s=self._config.http_stall_timeout_s)
        name = self._known(ollama.read_show(body))
        return json_response(ollama.show(name, since=self._since, capabilities=self._capabilities(name)))

    async def version(self, _: Request) -> Response:
        """`GET /api/version`."""
        return json_response({"version": ollama.API_VERSION})

    def _capabilities(self, name: str) -> list[str]:
        if self.catalogue().only_embeds(name):
            return ["embedding"]
        calls_tools = any(same_model(name, known) for known in self._peers.tool_models())
        return ["completion", "tools"] if calls_tools else ["completion"]

    def _known(self, name: str) -> str:
        """The name as it is listed; raises HeadraceError for an unknown model."""
        chosen, catalogue = spelled(name, self.listed()), self.catalogue()
        if not catalogue.only_embeds(chosen):
            catalogue.engines_for(chosen)
        return chosen


def _is_anthropics(request: Request) -> bool:
    """Whether a client of Anthropic's API calls: both APIs have this path, and only its clients send this header."""
    return "anthropic-version" in request.headers
