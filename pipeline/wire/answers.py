"""The messages of an answer as msgspec structs: status, chunks, the last message.

The field `object` distinguishes them. Sources: the OpenAI API reference (chat completions, embeddings) and
`docs/protocol.md`.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import Struct, field

from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import Dialect, EngineName
from pipeline.wire.subjects import Priority, Task
from pipeline.wire.validation import UNREADABLE

StatusState = Literal["started", "restarted", "spilled", "suspended", "resumed"]
FinishReason = Literal["stop", "length", "tool_calls"]


class FunctionCall(Struct):
    """A function's name, and its arguments as a string of JSON, as in OpenAI's API."""

    name: str
    arguments: str = "{}"

    def as_object(self) -> dict[str, Any]:
        """The arguments decoded. If they are not a JSON object, as a model may write them, they are one string."""
        try:
            return msgspec.json.decode(self.arguments or "{}", type=dict[str, Any])
        except UNREADABLE:
            return {"arguments": self.arguments}


class ToolCall(Struct):
    """One tool call by the assistant."""

    function: FunctionCall
    id: str = ""
    type: Literal["function"] = "function"

    @property
    def begins(self) -> bool:
        """Whether this is a call or its beginning. Else it continues the arguments of the call before it."""
        return bool(self.id or self.function.name)


class Status(Struct, tag_field="object", tag="headrace.status", omit_defaults=True):
    """An attempt has begun (`started`, `restarted`), or the request was spilled (`spilled`).

    `suspended`: more urgent requests have taken its place in the engine. `resumed`: it has a place again.
    """

    id: str
    state: StatusState
    created: int
    engine: EngineName
    model: str
    attempt: int
    queue_ms: float
    reason: str = ""


class ToolCallDelta(Struct):
    """A part of a tool call in a chunk: the call with its name, or more of its arguments, with no id and no name."""

    index: int
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"

    @property
    def begins(self) -> bool:
        """As `ToolCall.begins`."""
        return bool(self.id or self.function.name)


def add_call(calls: list[ToolCall], part: ToolCall | ToolCallDelta) -> None:
    """Add a part of a call to calls: a new one, or more arguments of the last one."""
    if part.begins or not calls:
        calls.append(ToolCall(FunctionCall(part.function.name, ""), part.id))
    calls[-1].function.arguments += part.function.arguments


class Delta(Struct, omit_defaults=True):
    """The part of the answer that a chunk adds. `reasoning_content` is what the model thinks before it answers.

    `reasoning` repeats it, for clients that know it by this name.
    """

    role: str | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @property
    def says(self) -> bool:
        """Whether it has a part of the answer."""
        return bool(self.content or self.tool_calls or self.reasoning_content)


class Alternative(Struct, omit_defaults=True):
    """A token and its log-probability. `octets` are the bytes of its text, None if they are not known."""

    token: str
    logprob: float
    octets: list[int] | None = field(default=None, name="bytes")


class TokenScore(Struct):
    """A token of the answer, with its log-probability and the likeliest tokens in its place, most likely first."""

    token: str
    logprob: float
    octets: list[int] | None = field(default=None, name="bytes")
    top_logprobs: list[Alternative] = field(default_factory=list)


class Logprobs(Struct):
    """The log-probabilities of the tokens of an answer, or of a part of it."""

    content: list[TokenScore] = field(default_factory=list)


class ChunkChoice(Struct):
    """The only choice of a chunk. Another engine can resume the answer from `token_ids`, the tokens of its text."""

    delta: Delta
    index: int = 0
    finish_reason: FinishReason | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: Logprobs | msgspec.UnsetType = msgspec.UNSET


class Chunk(Struct, tag_field="object", tag="chat.completion.chunk"):
    """A part of a streamed answer. `seq` counts the chunks of the request from 0, across attempts."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    seq: int
    attempt: int


class AssistantMessage(Struct):
    """The complete answer. `reasoning` repeats `reasoning_content`."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    reasoning: str | msgspec.UnsetType = msgspec.UNSET


class Choice(Struct):
    """The only choice of a completion. `stop_reason` is the stop string that ended it, if the engine tells it."""

    message: AssistantMessage
    finish_reason: FinishReason
    index: int = 0
    stop_reason: str | msgspec.UnsetType = msgspec.UNSET
    logprobs: Logprobs | msgspec.UnsetType = msgspec.UNSET


class PromptDetails(Struct):
    """Of a prompt's tokens, those that the engine did not compute, because an earlier request had left them."""

    cached_tokens: int = 0


class CompletionDetails(Struct):
    """Of the answer's tokens, those of reasoning and of the marks around it."""

    reasoning_tokens: int = 0


class Usage(Struct):
    """Exact token counts. `completion_tokens_details` is present if the engine tells reasoning from the answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails = field(default_factory=PromptDetails)
    completion_tokens_details: CompletionDetails | msgspec.UnsetType = msgspec.UNSET

    @property
    def computed_prompt_tokens(self) -> int:
        """The tokens of the prompt that the engine computed."""
        return self.prompt_tokens - self.prompt_tokens_details.cached_tokens


class Account(Struct):
    """How a request was served: the `headrace` object of its last message. Times are in milliseconds.

    `preempted` is how many times the worker that wrote it suspended the request in favour of more urgent ones.
    `reason` is the reason why this engine answered. `spilled` is whether the request was moved to Ollama, even if MLX
    answered it in the end. `models` is present if several models wrote the text, and names them in order. `simulated`
    is present, and true, only if no model ran. `dialect` is present, and `openai`, only if a server of OpenAI's API
    answered in Ollama's place. `notes` is present if parameters of the request were not taken as they
    were written; each note is a sentence.
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
    preempted: int = 0
    simulated: bool | msgspec.UnsetType = msgspec.UNSET
    dialect: Dialect | msgspec.UnsetType = msgspec.UNSET
    notes: list[str] | msgspec.UnsetType = msgspec.UNSET
    models: list[str] | msgspec.UnsetType = msgspec.UNSET


class Completion(Struct, tag_field="object", tag="chat.completion"):
    """The last message of a chat request that was answered."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    headrace: Account


class Embedding(Struct):
    """The vector of one text: a list of numbers, or base64 of 32-bit floats in little-endian order."""

    embedding: list[float] | str
    index: int
    object: Literal["embedding"] = "embedding"


class EmbeddingUsage(Struct):
    """Exact token counts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Struct, tag_field="object", tag="list"):
    """The last message of an embeddings request that was answered.

    `data` is the JSON of a list of `Embedding`, in the order of the texts. Only `embeddings` decodes it: it can hold a
    million numbers, which would block a process that only forwards the message.
    """

    id: str
    created: int
    model: str
    data: msgspec.Raw
    usage: EmbeddingUsage
    headrace: Account

    def embeddings(self) -> list[Embedding]:
        """Decode `data`; raises msgspec.DecodeError."""
        return _embeddings_decoder.decode(self.data)


class ErrorBody(Struct):
    """An error in the form that OpenAI's clients read."""

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
    """The last message of a request that ended with an error."""

    id: str
    created: int
    error: ErrorBody


Success = Completion | EmbeddingList
Last = Success | ErrorAnswer
Answer = Status | Chunk | Last

_embeddings_decoder = msgspec.json.Decoder(list[Embedding])
_answer_decoder: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Answer)


def decode_answer(data: bytes) -> Answer:
    """Decode one message of a reply subject; raises msgspec.DecodeError or UnicodeError for a foreign message."""
    return _answer_decoder.decode(data)


def read_answer(data: bytes) -> Answer | None:
    """Decode one message of a reply subject, or None if it is no part of an answer."""
    try:
        found = decode_answer(data)
    except UNREADABLE:
        return None
    return None if isinstance(found, Chunk) and not found.choices else found


def is_last(message: Answer) -> bool:
    """Whether message is the last one of its answer."""
    return isinstance(message, Last)
