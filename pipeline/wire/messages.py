"""The messages of the wire contract besides answers, as msgspec structs: load, state, events, replies to questions."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Struct, field

from pipeline.wire.errors import ErrorCode
from pipeline.wire.subjects import Priority

EngineName = Literal["mlx", "ollama"]
# The API of the server behind a worker of the second engine. All such workers serve Ollama's lanes.
Dialect = Literal["ollama", "openai"]
Level = Literal["normal", "busy", "saturated"]
WorkerState = Literal["loading", "ready", "draining", "down", "gone"]

# ---- load and state --------------------------------------------------------------------------------------------------


class PerPriority(Struct):
    """One number per priority."""

    high: float = 0
    medium: float = 0
    low: float = 0

    def of(self, priority: Priority) -> float:
        """The number of one priority."""
        return float(getattr(self, priority))


class PerPriorityCount(Struct):
    """One count per priority."""

    high: int = 0
    medium: int = 0
    low: int = 0

    def of(self, priority: Priority) -> int:
        """The count of one priority."""
        return int(getattr(self, priority.value))


class Slots(Struct):
    """The slots of an engine or a worker: room for sequences in the running batch."""

    used: int
    total: int


class Load(Struct, tag_field="object", tag="headrace.load"):
    """The load of one engine, all its workers together. `saturation` 1.0 is full. `at` is UTC, unix seconds.

    `available` is whether a worker is ready. Without one, the level is `normal` and the saturation 0: no slot is used.
    `keeps` is why nothing is spilled from this engine, although it may be saturated; empty if requests may spill.
    `takes_back` is whether it also takes back what the second engine runs. `queued_tenants` is the part of `queued`
    that is of named tenants; 0 for the second engine.
    """

    engine: EngineName
    level: Level
    saturation: float
    predicted_wait_ms: PerPriority
    queued: PerPriorityCount
    slots: Slots
    tokens_per_s: float
    reason: str
    at: float
    available: bool = True
    keeps: str = ""
    takes_back: bool = False
    queued_tenants: PerPriorityCount = field(default_factory=PerPriorityCount)


class LanesNote(Struct):
    """The body of `llm.lanes`: the subjects of the lanes of named tenants that have a consumer."""

    lanes: list[str]
    object: str = "headrace.lanes"


class ModelFacts(Struct, omit_defaults=True):
    """What a worker knows of one of its models. Empty and 0 mean that it is not known.

    Attributes:
        capabilities: as Ollama names them: `completion`, `tools`, `thinking`, `vision`, `embedding`.
        context_tokens: the longest that prompt and answer together can be.
        family, format, parameter_size, quantization: as Ollama writes them.
        size_bytes: of its files.
        digest: of its files, as Ollama lists it.
        loaded: whether it is in memory now.
        vram_bytes: the part of it on a GPU.
        memory_bytes: what it takes while it is loaded.
        loading_bytes: how much of `size_bytes` is in memory while it is being loaded.
        loading_since: when its load began, UTC, unix seconds; 0 if it is not being loaded.
        expires_at: when it leaves memory if no request comes, UTC, unix seconds; 0 if it stays.
        alias_of: the model of which this is another name.
    """

    capabilities: list[str] = field(default_factory=list)
    context_tokens: int = 0
    family: str = ""
    format: str = ""
    parameter_size: str = ""
    quantization: str = ""
    size_bytes: int = 0
    digest: str = ""
    loaded: bool = False
    vram_bytes: int = 0
    memory_bytes: int = 0
    loading_bytes: int = 0
    loading_since: float = 0.0
    expires_at: float = 0.0
    alias_of: str = ""


class WorkerStatus(Struct, tag_field="object", tag="headrace.worker"):
    """The status of one worker. It is published at every change and every second. State `gone` is the last one.

    Attributes:
        models: the names that the worker answers to, without internal models.
        pending_tokens: the output that is still expected of the running requests.
        pending_prompt_tokens: what is still to be read of their prompts.
        tokens_per_s: how fast the engine writes while it reads no prompts.
        prompt_tokens_per_s: how fast it reads prompts.
        tokens_per_request, prompt_tokens_per_request: of an average request. Rates and averages are 0 if not known.
        answer_tokens_per_s: how fast one answer is written beside those that run with it.
        loading_s: how long the next request waits until its model is loaded; 0 if it is.
        empty: the engine is a server that answers, and has no usable model.
        borrows: the worker takes requests from Ollama's lanes where its engine begins them sooner.
        lent: how many requests the worker has returned for MLX to continue, by durable consumer, since it started.
        given_back: the durable consumers of named tenants to which the worker has returned requests since the status
            before. No pull stands open on them, so the other workers ask them.
        suspends: whether a more urgent request can take the place of a less urgent one, at present.
        kv_bytes: the size of their KV cache.
        kv_bytes_limit: the largest allowed size of it (0: unknown).
        at: when the worker published this, UTC, unix seconds.
        simulated: no model runs.
        standin: headrace's own stand-in answers in place of Ollama.
        held: how many requests the worker holds by durable consumer, including those that have left their slot.
        tool_models: the models that are known to call tools.
        embedding_models: the models that make embeddings only.
        compute: what computes, and how fast, in words; empty if that is not known.
        facts: of its models, by name.
        alone: why the engine runs one request at a time instead of several together; empty if it does not.
        server: the URL of the server that is its engine; empty for an engine of the worker's own machine.
        dialect: the API of that server.
        prompt_tokens: of all prompts that the engine has begun since it started.
        reused_tokens: those of them that it did not compute, because an earlier request had left them.
        kept_bytes: the size of what it keeps of earlier prompts in memory.
        stored_bytes: the size of what it stores of them on disk.
        drafted_tokens: the tokens that its draft model has proposed.
        accepted_tokens: those of them that became part of answers.
        fetches: the worker hears calls for models that are not here.
        cannot_load: the models whose last load failed, and why, by name. One of them that is in `models` may be asked
            for again: the request makes the worker try.
    """

    worker: str
    engine: EngineName
    state: WorkerState
    models: list[str]
    slots: Slots
    running: PerPriorityCount
    pending_tokens: float
    tokens_per_s: float
    tokens_per_request: float
    kv_bytes: int
    kv_bytes_limit: int
    at: float
    reason: str = ""
    simulated: bool = False
    standin: bool = False
    held: dict[str, int] = field(default_factory=dict)
    tool_models: list[str] = field(default_factory=list)
    embedding_models: list[str] = field(default_factory=list)
    compute: str = ""
    pending_prompt_tokens: float = 0.0
    prompt_tokens_per_s: float = 0.0
    prompt_tokens_per_request: float = 0.0
    suspends: bool = False
    facts: dict[str, ModelFacts] = field(default_factory=dict)
    answer_tokens_per_s: float = 0.0
    loading_s: float = 0.0
    empty: bool = False
    borrows: bool = False
    lent: dict[str, int] = field(default_factory=dict)
    given_back: list[str] = field(default_factory=list)
    alone: str = ""
    server: str = ""
    dialect: Dialect | None = None
    prompt_tokens: int = 0
    reused_tokens: int = 0
    kept_bytes: int = 0
    stored_bytes: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    fetches: bool = False
    cannot_load: dict[str, str] = field(default_factory=dict)


StoreState = Literal["ok", "low", "full", "failed"]


class StoreReport(Struct, tag_field="object", tag="headrace.store"):
    """Whether the broker can store requests, published twice a second by the process that runs the broker.

    Attributes:
        state: `low`: warn. `full`: new requests are refused. `failed`: the broker stores nothing.
        reason: a sentence with what to do; empty for `ok`.
        free_bytes, total_bytes: of the filesystem of the store, or of the server's own limit if it leaves less; 0 if
            unknown.
    """

    state: StoreState
    reason: str
    free_bytes: int = 0
    total_bytes: int = 0

    @property
    def refuses(self) -> bool:
        """Whether new requests are refused."""
        return self.state in ("full", "failed")


class StoreFailure(Struct, tag_field="object", tag="headrace.store_failure"):
    """A process sent the broker a message on subject, and the broker did not store it."""

    subject: str


EventKind = Literal["started", "done", "failed", "cancelled", "expired", "spilled", "triaged", "returned"]


class RequestEvent(Struct, tag_field="object", tag="headrace.event", omit_defaults=True):
    """An event in the life of one request, published for statistics and the dashboard.

    Times count from when the request was first stored. `wait_ms` ends when an engine began, or for `spilled` and
    `triaged` when the router received the request. `tenant` is the tenant of the request. `worker` is the process that
    publishes the event; empty for the monitor. `deliveries` is how often the message was delivered to a
    process. A `started` event has the number of the attempt, and its context in the trace (`traceparent`) if the worker
    records traces. A `done` event has the tokens of the prompt that the engine computed, and of the answer.
    """

    id: str
    kind: EventKind
    priority: Priority
    engine: EngineName | None = None
    wait_ms: float | None = None
    ttft_ms: float | None = None
    total_ms: float | None = None
    code: ErrorCode | None = None
    reason: str = ""
    tenant: str = ""
    worker: str = ""
    attempt: int = 0
    deliveries: int = 0
    trace: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


# ---- asking the pipeline ---------------------------------------------------------------------------------------------


class Position(Struct):
    """The state of a request, its position and the expected wait.

    `state` is `queued`, `running`, `finished`, `unknown` or `filling`. `filling`: the monitor has just started and is
    still reading the queue, and has not read this request yet; `position` and `eta_ms` are then left out. `estimated`
    is present, and true, only if `position` is derived from the broker's count of the lane. `paused` is present, and
    true, only while an operator has paused the request's lane or tenant; `eta_ms` is then null.
    """

    id: str
    state: str
    position: int | msgspec.UnsetType = 0
    eta_ms: float | msgspec.UnsetType | None = 0.0
    estimated: bool | msgspec.UnsetType = msgspec.UNSET
    paused: bool | msgspec.UnsetType = msgspec.UNSET


class LateQuery(Struct):
    """Asks for the messages kept of a request's answer, from the one after a sequence."""

    id: str
    after: int = 0


class LateMessage(Struct):
    """One message of an answer, and its sequence in the stream."""

    seq: int
    message: msgspec.Raw


class LateAnswer(Struct):
    """Messages of an answer, oldest first: none if no more are kept now."""

    id: str
    messages: list[LateMessage]


class Cancelled(Struct):
    """The result of a cancellation: `cancelled`, `finished`, `unknown` or `pending`.

    `pending`: the monitor is still reading the queue, and cancels the request when it reads it. Or the request runs,
    and another monitor, which leads now, ends it.
    """

    id: str
    state: str


class TokenCount(Struct, tag_field="object", tag="headrace.tokens"):
    """A worker's count of a prompt's tokens, as its model reads the prompt."""

    prompt_tokens: int


class Model(Struct):
    """A model, in the form of OpenAI's list."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "headrace"


class ModelList(Struct):
    """The models that answer requests."""

    data: list[Model]
    object: str = "list"


_encoder = msgspec.json.Encoder()


def encode(message: Struct) -> bytes:
    """Encode message as JSON."""
    return _encoder.encode(message)
