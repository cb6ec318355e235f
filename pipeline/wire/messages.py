"""The messages of the wire contract as msgspec structs: answers, load, state, events.

Answers are told apart by their `object`. Source of the shapes: the OpenAI API reference (chat completions, embeddings)
and this project's `docs/protocol.md`.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Struct, field

from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.subjects import Priority, Task

# ---- answers ---------------------------------------------------------------------------------------------------------

EngineName = Literal["mlx", "ollama"]
StatusState = Literal["started", "restarted", "spilled"]
FinishReason = Literal["stop", "length", "tool_calls"]


class FunctionCall(Struct):
    """A function's name and its arguments, JSON as a string, as OpenAI has it."""

    name: str
    arguments: str = "{}"


class ToolCall(Struct):
    """One call that the assistant made."""

    function: FunctionCall
    id: str = ""
    type: Literal["function"] = "function"


class Status(Struct, tag_field="object", tag="headrace.status", omit_defaults=True):
    """An attempt has begun (`started`, `restarted`), or the request goes to the other engine (`spilled`)."""

    id: str
    state: StatusState
    created: int
    engine: EngineName
    model: str
    attempt: int
    queue_ms: float
    reason: str = ""


class ToolCallDelta(Struct):
    """A piece of a tool call: headrace sends each call whole, in one piece."""

    index: int
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class Delta(Struct, omit_defaults=True):
    """What a chunk adds."""

    role: str | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(Struct):
    """The only choice of a chunk. `token_ids` are the tokens behind its text, so that another engine can go on."""

    delta: Delta
    index: int = 0
    finish_reason: FinishReason | None = None
    token_ids: list[int] = field(default_factory=list)


class Chunk(Struct, tag_field="object", tag="chat.completion.chunk"):
    """A piece of a streamed answer. `seq` counts the request's chunks from 0, across attempts."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    seq: int
    attempt: int


class AssistantMessage(Struct):
    """The whole answer."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    tool_calls: list[ToolCall] | None = None


class Choice(Struct):
    """The only choice of a completion."""

    message: AssistantMessage
    finish_reason: FinishReason
    index: int = 0


class Usage(Struct):
    """Exact token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Account(Struct):
    """How a request was served: the `headrace` object of its last message. Times in milliseconds.

    `reason` says why this engine answered it; `simulated` is there, and true, only where no model was run.
    """

    engine: EngineName
    priority: Priority
    task: Task
    attempts: int
    queue_ms: float
    ttft_ms: float
    total_ms: float
    spilled: bool
    reason: str
    simulated: bool | msgspec.UnsetType = msgspec.UNSET


class Completion(Struct, tag_field="object", tag="chat.completion"):
    """The last message of a request that was answered."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    headrace: Account


class Embedding(Struct):
    """The vector of one text: numbers, or, as `base64`, 32-bit floats in little-endian order."""

    embedding: list[float] | str
    index: int
    object: Literal["embedding"] = "embedding"


class EmbeddingUsage(Struct):
    """Exact token counts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Struct, tag_field="object", tag="list"):
    """The last message of a request whose texts were embedded.

    `data` is the JSON of a list of `Embedding`, in the order of the texts. `embeddings` alone reads it: there may be a
    million numbers in it, and who only passes it on must not stop for them.
    """

    id: str
    created: int
    model: str
    data: msgspec.Raw
    usage: EmbeddingUsage
    headrace: Account

    def embeddings(self) -> list[Embedding]:
        """What is in `data`; raises msgspec.DecodeError."""
        return _embeddings_decoder.decode(self.data)


class ErrorBody(Struct):
    """An error as OpenAI's clients read it."""

    code: ErrorCode
    message: str
    type: str
    param: str | None
    retryable: bool

    @classmethod
    def of(cls, error: HeadraceError) -> ErrorBody:
        """The wire form of error."""
        return cls(error.code, error.message, error.type, error.param, error.retryable)


class ErrorAnswer(Struct, tag_field="object", tag="error"):
    """The last message of a request that was not answered."""

    id: str
    created: int
    error: ErrorBody


Success = Completion | EmbeddingList
Last = Success | ErrorAnswer
Answer = Status | Chunk | Last

_embeddings_decoder = msgspec.json.Decoder(list[Embedding])
_answer_decoder: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Answer)


def decode_answer(data: bytes) -> Answer:
    """Read one message of a reply subject; raises msgspec.DecodeError for what is none of ours."""
    return _answer_decoder.decode(data)


def is_last(message: Answer) -> bool:
    """Whether nothing comes after message."""
    return isinstance(message, Last)


# ---- load and state --------------------------------------------------------------------------------------------------

Level = Literal["normal", "busy", "saturated"]
WorkerState = Literal["loading", "ready", "draining", "down", "gone"]


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


class Slots(Struct):
    """Room for sequences in running batches."""

    used: int
    total: int


class Load(Struct, tag_field="object", tag="headrace.load"):
    """How loaded one engine is (all its workers together). `saturation` 1.0 is full; `at` is UTC, unix seconds."""

    engine: EngineName
    level: Level
    saturation: float
    predicted_wait_ms: PerPriority
    queued: PerPriorityCount
    slots: Slots
    tokens_per_s: float
    reason: str
    at: float


class WorkerStatus(Struct, tag_field="object", tag="headrace.worker"):
    """What one worker says of itself, at every change and every second; `gone` is its last word.

    `pending_tokens` is the output still expected of what runs; `kv_bytes` what its sequences hold of the KV cache and
    `kv_bytes_limit` what they may (0: unknown). `models` are the names it answers to, internal ones left out,
    `tool_models` those of them that are known to call tools, and `embedding_models` those that make embeddings and no
    answers. `simulated`: no model is run; `standin`: it is headrace's
    own stand-in that answers for Ollama. `held` counts the requests in its hands by durable consumer, also those that
    have left their slot.
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


EventKind = Literal["started", "done", "failed", "cancelled", "expired", "spilled", "triaged", "returned"]


class RequestEvent(Struct, tag_field="object", tag="headrace.event", omit_defaults=True):
    """What just happened to one request; published for statistics and for whoever wants to watch.

    Times are counted from when the request was first stored. `wait_ms` is until an engine began, or, of `spilled` and
    `triaged`, until the router was handed it. `tenant` is whom the request is for.
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


# ---- asking the pipeline ---------------------------------------------------------------------------------------------


class Position(Struct):
    """Where a request stands (`queued`, `running`, `finished`, `unknown`), how many are before it, and for how long."""

    id: str
    state: str
    position: int = 0
    eta_ms: float = 0.0


class Cancelled(Struct):
    """What became of a cancellation: `cancelled`, `finished` or `unknown`."""

    id: str
    state: str


class Model(Struct):
    """A model that answers, as OpenAI lists it."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "headrace"


class ModelList(Struct):
    """The models that answer."""

    data: list[Model]
    object: str = "list"


_encoder = msgspec.json.Encoder()


def encode(message: Struct) -> bytes:
    """A message as JSON."""
    return _encoder.encode(message)
