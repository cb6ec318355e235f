"""The interface between a worker, which delivers requests, and an engine, which generates answers.

MLX, the simulated engine and Ollama implement it. One conformance suite runs on all three.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, Self

import msgspec

from pipeline.wire.answers import FinishReason, TokenScore, ToolCall, Usage
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.fetches import FetchStep
from pipeline.wire.messages import Dialect, EngineName, ModelFacts, WorkerState
from pipeline.wire.requests import ChatRequest, EmbeddingRequest
from pipeline.wire.subjects import Priority


class Misbehaved(HeadraceError):
    """The engine was reached and failed: an internal error, a malformed answer, an answer that broke off, a crash.

    Another attempt may succeed, and each failed one counts. An engine that is away, and has done nothing with the
    request, raises `unavailable` instead.
    """

    def __init__(self, message: str) -> None:
        super().__init__(ErrorCode.ENGINE_FAILED, message)


class TurnedAway(HeadraceError):
    """The engine answered that it is busy, and did nothing with the request. Another attempt may succeed.

    An engine that does not answer at all raises `unavailable` of no kind of its own: no request ends because of it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(ErrorCode.UNAVAILABLE, message)


class NotLoaded(HeadraceError):
    """The engine can load the model, and leaves the request to another worker or to a later delivery.

    It has done nothing with the request.
    """

    def __init__(self, message: str) -> None:
        super().__init__(ErrorCode.UNAVAILABLE, message)


class Work(msgspec.Struct, frozen=True):
    """One request for an engine.

    Attributes:
        seed: together with a token's position, it determines the token that is sampled there. An engine that resumes an
            answer therefore samples the same tokens as the engine that began it.
        resume_text: the part of the answer that the reader already has.
        resume_reasoning: the part of the reasoning that the reader already has.
        resume_tokens: the tokens of earlier attempts. They may go beyond `resume_text`. Generation continues after
            them. If another engine wrote the text, its tokens are unknown: the list is empty, and generation continues
            after the reasoning and the text.
        resume_reasoning: the part of the reasoning that the reader already has.
        priority: the priority of the request. An engine that can suspend requests gives a more urgent one the place of
            a less urgent one.
        extra: another worker had begun the request: it runs at once, beyond the slots.
        coming: how many more requests of this priority are on their way to the engine, as far as its worker knows.
        tenant: for whom the request is. An engine lets no tenant reuse what it computed for another one: the time to
            the first token would tell what the other has asked.
    """

    id: str
    request: ChatRequest
    model: str
    seed: int
    resume_tokens: list[int] = msgspec.field(default_factory=list)
    resume_text: str = ""
    resume_reasoning: str = ""
    priority: Priority = Priority.MEDIUM
    extra: bool = False
    coming: int = 0
    tenant: str = ""


class Piece(msgspec.Struct):
    """What an engine produced since the last piece: text, its tokens, and tool calls or parts of them.

    A tool call without an id and a name continues the arguments of the call before it, perhaps of an earlier piece.
    `restarted` counts how many times the engine restarted this request since the last piece. The text continues where
    it was. `preempted` counts how many times it suspended the request. `suspended` is whether the request is suspended
    now; None if that has not changed. Only the last piece has `finish_reason` and `usage`. Its `stop` is the stop
    string that ended the answer, if the engine tells it. Its `notes` say which parameters the engine did not take as
    they were written. `scores` are the log-probabilities of the tokens, if the request asks for them. `reasoning` is
    what the model thinks before it answers.
    """

    text: str = ""
    token_ids: list[int] = msgspec.field(default_factory=list)
    tool_calls: list[ToolCall] = msgspec.field(default_factory=list)
    restarted: int = 0
    preempted: int = 0
    suspended: bool | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    stop: str = ""
    reasoning: str = ""
    scores: list[TokenScore] = msgspec.field(default_factory=list)
    notes: list[str] = msgspec.field(default_factory=list)


# The note on an answer whose token limit was reached before its text began.
CUT_IN_REASONING = "The answer reached its token limit during the reasoning. Raise `max_tokens`, or turn reasoning off."


class Embedded(msgspec.Struct):
    """The vectors of texts, in the order of the texts, and the exact number of their tokens."""

    vectors: list[list[float]]
    prompt_tokens: int


class Generation(Protocol):
    """One running request."""

    async def next(self) -> Piece:
        """Wait until the engine has produced something, and take all of it. Cancelling is safe; nothing is lost.

        Raises:
            HeadraceError: the engine refuses the request (`context_length_exceeded`, ...), another attempt cannot
                succeed (`engine_failed`), another attempt may succeed (`Misbehaved`), or the engine is away
                (`unavailable`).
        """
        ...

    async def close(self) -> None:
        """Remove the request from the engine, finished or not, and free its memory. Idempotent."""
        ...


# How many requests per slot an engine accepts at most: its own, and as many that another worker had begun or that take
# the place of less urgent ones.
MOST_PER_SLOT = 2

# How many requests an engine runs at once as long as nothing of it was measured.
FIRST_SLOTS = 8


class EngineStatus(msgspec.Struct):
    """The state of an engine. Rates are measured; 0 means not known yet.

    Attributes:
        standin: headrace's own stand-in answers in place of Ollama.
        tool_models: the models that are known to call tools.
        embedding_models: the models that make embeddings only. They are not in `models`.
        compute: what computes, and how fast, in words; empty if that is not known.
        alone: why it runs one request at a time instead of several together, in words; empty if it does not.
        pending_tokens, pending_prompt_tokens: what is still to be written and read of the running requests.
        tokens_per_s, prompt_tokens_per_s: how fast the engine writes while it reads no prompts, and reads.
        tokens_per_request, prompt_tokens_per_request: of an average request.
        answer_tokens_per_s: how fast one answer is written beside those that run with it.
        loading_s: how long the next request waits until its model is loaded; 0 if it is.
        rests: how long each running request probably still takes, by id, seconds; only of an engine that another one
            may take work back from. Infinite if it is not known.
        empty: the server that is the engine answers, and has no usable model.
        suspends: whether the engine suspends a request, at present, in favour of a more urgent one.
        server: the URL of the server that is the engine; empty for an engine of this machine's own.
        dialect: the API of that server; None for an engine of this machine's own.
        facts: of the models, by name.
        prompt_tokens, reused_tokens: of all prompts that were begun, and those of them that were not computed, because
            an earlier request had left them.
        kept_bytes: the size of what is kept of earlier prompts.
        stored_bytes: the size of what is stored of them on disk.
        drafted_tokens, accepted_tokens: what a draft model has proposed, and what of it was right.
        swapping: another model is being loaded; `reason` says which one, and how far it is.
        cannot_load: the models whose last load failed, and why, by name.
    """

    state: WorkerState
    models: list[str]
    slots_used: int
    slots_total: int
    pending_tokens: float = 0.0
    tokens_per_s: float = 0.0
    tokens_per_request: float = 0.0
    pending_prompt_tokens: float = 0.0
    prompt_tokens_per_s: float = 0.0
    prompt_tokens_per_request: float = 0.0
    kv_bytes: int = 0
    kv_bytes_limit: int = 0
    reason: str = ""
    standin: bool = False
    tool_models: list[str] = msgspec.field(default_factory=list)
    embedding_models: list[str] = msgspec.field(default_factory=list)
    compute: str = ""
    alone: str = ""
    answer_tokens_per_s: float = 0.0
    loading_s: float = 0.0
    rests: dict[str, float] = msgspec.field(default_factory=dict)
    empty: bool = False
    suspends: bool = False
    server: str = ""
    dialect: Dialect | None = None
    facts: dict[str, ModelFacts] = msgspec.field(default_factory=dict)
    prompt_tokens: int = 0
    reused_tokens: int = 0
    kept_bytes: int = 0
    stored_bytes: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    swapping: bool = False
    cannot_load: dict[str, str] = msgspec.field(default_factory=dict)


class Embedder(Protocol):
    """The part of an engine that makes embeddings."""

    def embedding_model(self, model: str | None) -> str:
        """The engine's own name of the model for an embeddings request that names model (None: any model).

        Raises:
            HeadraceError: `model_not_found` or `model_internal`; `unavailable` if the models are not known.
        """
        ...

    async def embed(self, request: EmbeddingRequest, model: str) -> Embedded:
        """Embed the texts of request. Cancelling is safe.

        Raises:
            HeadraceError: as `Generation.next`.
        """
        ...


class TokenCounter(Protocol):
    """The part of an engine that counts tokens."""

    async def count_tokens(self, request: ChatRequest) -> int:
        """The exact number of tokens of a request's prompt, its tools included. Cancelling is safe.

        Raises:
            HeadraceError: the engine refuses the request, or is loading or away (`unavailable`).
        """
        ...


class Fetcher(Protocol):
    """Fetches models for an engine, to its machine."""

    def fetchable(self, name: str) -> str:
        """The model that a name means here.

        Raises:
            HeadraceError: `model_not_found` for a name that another engine may know; another code if nothing is
                fetched here.
        """
        ...

    async def fetch(self, model: str, note: Callable[[FetchStep], None]) -> str:
        """Fetch a model, beside the engine's work. Cancelling ends it; the next fetch uses what there is of it.

        Args:
            model: as `fetchable` returns it.
            note: called with each step, in the event loop.

        Returns:
            The name under which the engine now answers with the model; empty if it does not.

        Raises:
            HeadraceError: the model cannot be fetched.
        """
        ...


class Engine(Protocol):
    """Answers requests. An asynchronous context manager; once entered, the engine is ready or loading.

    `embedder` makes embeddings, and `counter` counts the tokens of prompts. Each is None if the engine does not do it.
    """

    name: EngineName
    simulated: bool
    embedder: Embedder | None
    counter: TokenCounter | None

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc: object) -> None: ...

    def resolve(self, model: str | None) -> str:
        """The engine's own name of the model that a request names (None: any model).

        Raises:
            HeadraceError: `model_not_found` or `model_internal`; `unavailable` for a model that cannot be loaded.
        """
        ...

    async def submit(self, work: Work) -> Generation:
        """Begin work. The caller makes sure that there is room: `MOST_PER_SLOT`. Cancelling is safe.

        An engine of several models waits here until the request's model is loaded.

        Raises:
            HeadraceError: as `Generation.next`. A refusal is raised here or there.
            NotLoaded: the request is not to wait here.
        """
        ...

    def status(self) -> EngineStatus:
        """The present state of the engine."""
        ...

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call callback in the event loop after each change of `status`."""
        ...
