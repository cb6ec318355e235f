"""The models that a server of OpenAI's API lists. No I/O.

Source of the shapes: the OpenAI API reference (`GET /v1/models`), and what vLLM and llama.cpp's server add to it.
"""

from __future__ import annotations

import re
from typing import Any

from msgspec import Struct

from consumers.engines.openai.wire import converted
from pipeline.wire.messages import ModelFacts

_EMBEDS = re.compile(r"embed", re.IGNORECASE)


class _Meta(Struct):
    """What llama.cpp's server tells of a model."""

    n_ctx: int | None = None
    n_ctx_train: int | None = None
    n_params: int | None = None
    size: int | None = None


class OpenAIModel(Struct):
    """A model in a server's list. vLLM adds `max_model_len`, llama.cpp `meta`."""

    id: str = ""
    max_model_len: int | None = None
    meta: _Meta | None = None

    @property
    def name(self) -> str:
        """Its name in calls."""
        return self.id

    @property
    def size(self) -> int | None:
        """The bytes of its files."""
        return None if self.meta is None else self.meta.size

    @property
    def parameters(self) -> float:
        """How many parameters it has."""
        return float((self.meta or _Meta()).n_params or 0)

    @property
    def context_tokens(self) -> int:
        """The most tokens that a prompt and its answer may have; 0 if the server does not tell."""
        meta = self.meta or _Meta()
        return self.max_model_len or meta.n_ctx or meta.n_ctx_train or 0

    @property
    def embeds(self) -> bool:
        """Whether it makes embeddings only. The API does not tell, and the names of such models do."""
        return bool(self.id and _EMBEDS.search(self.id))

    @property
    def chats(self) -> bool:
        """Whether it chats: every other model counts as one that does."""
        return bool(self.id) and not self.embeds

    @property
    def calls_tools(self) -> bool:
        """The API does not tell."""
        return False

    @property
    def family(self) -> str:
        """The API does not tell."""
        return ""

    @property
    def standin(self) -> bool:
        """It is no stand-in's."""
        return False

    def facts(self) -> ModelFacts:
        """What is known of it. The API does not tell which models are in memory: all count as loaded."""
        return ModelFacts(
            capabilities=["embedding" if self.embeds else "completion"],
            context_tokens=self.context_tokens,
            parameter_size=f"{self.parameters / 1e6:.0f}M" if self.parameters else "",
            size_bytes=self.size or 0,
            loaded=True,
        )


class _Models(Struct):
    data: list[OpenAIModel] | None = None


def read_list(answer: dict[str, Any]) -> list[OpenAIModel]:
    """The models in an answer of `GET /v1/models`, each once; raises BadAnswer for another shape."""
    listed = converted(answer, _Models).data or []
    return list({model.id: model for model in listed if model.id}.values())
