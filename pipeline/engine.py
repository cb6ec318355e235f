"""What a worker needs of an engine: the seam between delivery (ours to get right once) and generation.

Three things stand behind it: MLX, the simulated engine, and Ollama. One conformance suite runs on all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, Self

import msgspec

from pipeline.wire.messages import EngineName, FinishReason, ToolCall, Usage, WorkerState
from pipeline.wire.requests import ChatRequest, EmbeddingRequest


class Work(msgspec.Struct, frozen=True):
    """One request as an engine gets it.

    `seed` decides every sampled token together with the token's position, so that whoever goes on with the answer
    draws what the first engine would have drawn. `resume_text` is what the reader already has of the answer, and
    `resume_tokens` are the tokens of earlier attempts, which may reach further than that text; generation goes on after
    them. Where nobody knows the tokens (another engine wrote the text), they are empty, and the text stands for them.
    """

    id: str
    request: ChatRequest
    model: str
    seed: int
    resume_tokens: list[int] = msgspec.field(default_factory=list)
    resume_text: str = ""


class Piece(msgspec.Struct):
    """What an engine has produced since it was last asked: text, the tokens behind it, whole tool calls.

    `restarted` counts how often the engine had to begin this request again since the last piece; the text still goes on
    where it was. `finish_reason` and `usage` stand in the last piece, and only there.
    """

    text: str = ""
    token_ids: list[int] = msgspec.field(default_factory=list)
    tool_calls: list[ToolCall] = msgspec.field(default_factory=list)
    restarted: int = 0
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


class Embedded(msgspec.Struct):
    """What an engine has made of texts: one vector each, in order, and the exact count of their tokens."""

    vectors: list[list[float]]
    prompt_tokens: int


class Generation(Protocol):
    """One running request."""

    async def next(self) -> Piece:
        """Wait until there is something, and take all of it at once. Cancelling is safe: nothing is lost.

        Raises:
            HeadraceError: what the engine refuses (`context_length_exceeded`, ...), `engine_failed` where this request
                brings the engine down, `unavailable` where the engine is gone and another one should have the request.
        """
        ...

    async def close(self) -> None:
        """Take the request out of the engine, finished or not, and free what it holds. Twice is harmless."""
        ...


class EngineStatus(msgspec.Struct):
    """What an engine says of itself. Rates are measured, 0 until they are known.

    `standin`: what answers is headrace's own stand-in for an Ollama. `tool_models`: those that are known to call tools.
    `embedding_models`: those that make embeddings and no answers; they are not among `models`.
    """

    state: WorkerState
    models: list[str]
    slots_used: int
    slots_total: int
    pending_tokens: float = 0.0
    tokens_per_s: float = 0.0
    tokens_per_request: float = 0.0
    kv_bytes: int = 0
    kv_bytes_limit: int = 0
    reason: str = ""
    standin: bool = False
    tool_models: list[str] = msgspec.field(default_factory=list)
    embedding_models: list[str] = msgspec.field(default_factory=list)


class Embedder(Protocol):
    """What an engine that can embed has besides."""

    def embedding_model(self, model: str | None) -> str:
        """The engine's own name of the model that embeds for a request which asks for model (None: any).

        Raises:
            HeadraceError: `model_not_found`, `model_internal`; `unavailable` where nobody knows.
        """
        ...

    async def embed(self, request: EmbeddingRequest, model: str) -> Embedded:
        """Embed texts. Cancelling is safe.

        Raises:
            HeadraceError: as `Generation.next`.
        """
        ...


class Engine(Protocol):
    """Something that answers requests; an asynchronous context manager. Entered, it is ready or loading.

    `embedder` is what embeds texts, None where nothing does.
    """

    name: EngineName
    simulated: bool
    embedder: Embedder | None

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc: object) -> None: ...

    def resolve(self, model: str | None) -> str:
        """The engine's own name of the model that a request asks for (None: any).

        Raises:
            HeadraceError: `model_not_found`, `model_internal`.
        """
        ...

    async def submit(self, work: Work) -> Generation:
        """Begin work. The caller sees to it that a slot is free.

        Raises:
            HeadraceError: as `Generation.next`; what can be refused at once may be refused here or there.
        """
        ...

    def status(self) -> EngineStatus:
        """The engine as it is now."""
        ...

    def on_change(self, callback: Callable[[], None]) -> None:
        """Have callback called, in the event loop, whenever `status` has changed."""
        ...
