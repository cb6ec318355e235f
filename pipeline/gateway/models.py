"""The model lists of all dialects, from one catalogue that is kept for a moment."""

from __future__ import annotations

import time

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pipeline.broker.peers import Peers
from pipeline.config import Config
from pipeline.core.models import Catalogue, same_model, spelled
from pipeline.core.placement import lacks_model
from pipeline.gateway.bodies import read_body
from pipeline.gateway.dialects import anthropic, ollama, openai
from pipeline.gateway.responses import json_response
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import ModelFacts

_KEPT_S = 0.2
_MAX_SHOW_BYTES = 1 << 16
# The name under which any engine answers.
ANY = "auto"


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
                only makes embeddings; `unavailable` for one that cannot be loaded.
        """
        catalogue = self.catalogue()
        try:
            if embeds:
                catalogue.embedder(requested or None)
            else:
                catalogue.engines_for(requested or None)
        except HeadraceError as error:
            complete = catalogue.mlx and (catalogue.ollama or catalogue.embedders)
            if not lacks_model(error) or complete:
                raise

    def has(self, requested: str) -> bool:
        """Whether a worker answers to a name, or makes embeddings with it.

        Raises:
            HeadraceError: `model_internal`.
        """
        try:
            self._known(requested)
        except HeadraceError as error:
            if error.code is not ErrorCode.MODEL_NOT_FOUND:
                raise
            return False
        return True

    def only_on_ollama(self, requested: str | None) -> bool:
        """Whether Ollama has the model of a chat, and MLX has neither it nor its equivalent."""
        catalogue = self.catalogue()
        return catalogue.model_on("mlx", requested) is None and catalogue.model_on("ollama", requested) is not None

    # ---- handlers

    async def v1_list(self, request: Request) -> Response:
        """`GET /v1/models`, in OpenAI's form or Anthropic's."""
        models = anthropic.models if _is_anthropics(request) else openai.models
        return json_response(models(self._names()))

    async def v1_one(self, request: Request) -> Response:
        """`GET /v1/models/{id}`, in OpenAI's form or Anthropic's."""
        model = anthropic.model if _is_anthropics(request) else openai.model
        return json_response(model(self._known(request.path_params["id"])))

    async def tags(self, _: Request) -> Response:
        """`GET /api/tags`."""
        return json_response(ollama.tags(self._shown(), since=self._since))

    async def ps(self, _: Request) -> Response:
        """`GET /api/ps`: the models that are in the memory of a worker's engine."""
        shown = self._shown()
        shown.pop(ANY, None)
        return json_response(ollama.ps(shown, now=time.time()))

    async def show(self, request: Request) -> Response:
        """`POST /api/show`."""
        body = await read_body(request, limit=_MAX_SHOW_BYTES, within_s=self._config.http_stall_timeout_s)
        name = self._known(ollama.read_show(body))
        return json_response(ollama.show(name, self._facts(name), since=self._since))

    async def version(self, _: Request) -> Response:
        """`GET /api/version`."""
        return json_response({"version": ollama.API_VERSION})

    def _names(self) -> list[str]:
        """The names that lists show: those of the models, and the one that stands for any of them."""
        listed = self.listed()
        return list(dict.fromkeys([*listed, ANY])) if listed else []

    def _shown(self) -> dict[str, ModelFacts]:
        return {name: self._facts(name) for name in self._names()}

    def _facts(self, name: str) -> ModelFacts:
        """What is known of a listed model. Of any model: of the one that answers first."""
        if name == ANY:
            listed = self.listed()
            name = next(iter(listed), "")
        facts = self._peers.facts()
        found = next((known for other, known in facts.items() if same_model(name, other)), ModelFacts())
        if found.capabilities:
            return found
        # Workers of older versions tell no facts.
        calls_tools = any(same_model(name, known) for known in self._peers.tool_models())
        can = ["embedding"] if self.catalogue().only_embeds(name) else ["completion"]
        return msgspec.structs.replace(found, capabilities=[*can, "tools"] if calls_tools else can)

    def _known(self, name: str) -> str:
        """The name as it is listed; raises HeadraceError for an unknown model, and one that could not be loaded."""
        chosen, catalogue = spelled(name, self._names()), self.catalogue()
        if chosen == ANY:
            return ANY
        if not catalogue.only_embeds(chosen):
            if catalogue.model_on("ollama", chosen) is None and (refusal := catalogue.refusal(chosen)):
                raise refusal
            catalogue.engines_for(chosen)
        return chosen


def _is_anthropics(request: Request) -> bool:
    """Whether a client of Anthropic's API calls: both APIs have this path, and only its clients send this header."""
    return "anthropic-version" in request.headers
