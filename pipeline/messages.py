"""The messages of the wire contract as msgspec structs, and their strict decoding.

Requests are OpenAI chat completions; answers are told apart by their `object`. Sources of the shapes: the OpenAI API
reference (chat completions) and this project's `docs/protocol.md`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, field

from pipeline.errors import ErrorCode, HeadraceError
from pipeline.subjects import Priority, Task

# ---- requests -------------------------------------------------------------------------------------------------------

MAX_STOPS = 16
MAX_TOOLS = 128
MAX_NESTING = 64
_MAX_ERROR_CHARS = 300


class FunctionCall(Struct):
    """A function's name and its arguments, JSON as a string, as OpenAI has it."""

    name: str
    arguments: str = "{}"


class ToolCall(Struct):
    """One call that the assistant made."""

    function: FunctionCall
    id: str = ""
    type: Literal["function"] = "function"


class ContentPart(Struct):
    """One part of a message's content; only text is understood."""

    type: str
    text: str = ""


class ChatMessage(Struct, omit_defaults=True):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    def text(self) -> str:
        """The content as one string.

        Raises:
            HeadraceError: `unsupported_parameter` for a part that is not text.
        """
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        for part in self.content:
            if part.type != "text":
                raise HeadraceError(
                    ErrorCode.UNSUPPORTED_PARAMETER,
                    f"content of type {part.type[:40]!r} is not supported: send text",
                    param="messages",
                )
        return "".join(part.text for part in self.content)


class FunctionSpec(Struct, omit_defaults=True):
    """A function the model may call: its JSON schema is passed to the chat template as it is."""

    name: Annotated[str, Meta(min_length=1, max_length=128)]
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)


class Tool(Struct):
    """A tool the model may call."""

    function: FunctionSpec
    type: Literal["function"] = "function"


class NamedFunction(Struct):
    """The name in a forced tool choice."""

    name: str


class NamedToolChoice(Struct):
    """`tool_choice` that names one function."""

    function: NamedFunction
    type: Literal["function"] = "function"


class JsonSchemaFormat(Struct, omit_defaults=True):
    """The schema in `response_format`."""

    name: str = ""
    schema: dict[str, Any] = field(default_factory=dict)


class ResponseFormat(Struct, omit_defaults=True):
    """What form the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


_Stop = Annotated[str, Meta(min_length=1, max_length=256)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]
_Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]


class ChatRequest(Struct, omit_defaults=True):
    """The body of a request: what OpenAI's chat completion takes, plus `prompt` for short and a few sampling
    parameters of MLX and Ollama (`top_k`, `min_p`, `repetition_penalty`). Absent and null are the same.
    """

    messages: Annotated[list[ChatMessage], Meta(min_length=1)] | None = None
    prompt: Annotated[str, Meta(min_length=1)] | None = None
    model: Annotated[str, Meta(max_length=256)] | None = None
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    stop: _Stop | Annotated[list[_Stop], Meta(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stream: bool | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    response_format: ResponseFormat | None = None
    # Understood only so far as to refuse what would silently change the answer.
    n: int | None = None
    best_of: int | None = None
    logprobs: bool | int | None = None
    top_logprobs: int | None = None
    logit_bias: dict[str, float] | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    suffix: str | None = None
    echo: bool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    web_search_options: Any = None

    @property
    def streams(self) -> bool:
        """Whether the client wants chunks."""
        return bool(self.stream)

    @property
    def token_limit(self) -> int | None:
        """The most tokens the answer may have, or None for the engine's default."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> list[str]:
        """Strings that end the answer; they are not part of it."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def wanted_model(self) -> str | None:
        """The model asked for by name, or None where any engine may answer."""
        return None if self.model in (None, "", "auto") else self.model

    @property
    def chat(self) -> list[ChatMessage]:
        """The conversation, also where only a `prompt` was given."""
        if self.messages is not None:
            return self.messages
        return [ChatMessage(role="user", content=self.prompt)]


# Parameters that would change the answer and cannot be honoured: with these values, beside null, they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "suffix": ("",),
    "echo": (False,),
    "parallel_tool_calls": (True,),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "tool_choice": ("none", "auto"),
}

_request_decoder = msgspec.json.Decoder(ChatRequest)


def decode_request(body: bytes, *, max_body_bytes: int) -> ChatRequest:
    """Read a request's body: JSON when its first character is `{`, plain text (the prompt) otherwise.

    Raises:
        HeadraceError: `request_too_large`, `invalid_request` (with the field in `param`), or
            `unsupported_parameter` for what would change the answer and cannot be honoured by any engine.
    """
    if len(body) > max_body_bytes:
        raise HeadraceError(
            ErrorCode.REQUEST_TOO_LARGE,
            f"the request has {len(body)} bytes; at most {max_body_bytes} are accepted",
        )
    if not body.startswith(b"{"):
        return ChatRequest(prompt=_decode_text(body))
    try:
        request = _request_decoder.decode(body)
    except msgspec.ValidationError as error:
        raise HeadraceError(ErrorCode.INVALID_REQUEST, _short(str(error)), param=_param_at_fault(str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HeadraceError(ErrorCode.INVALID_REQUEST, f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise HeadraceError(ErrorCode.INVALID_REQUEST, "the body is nested too deeply") from None
    _check(request)
    return request


def _decode_text(body: bytes) -> str:
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise HeadraceError(ErrorCode.INVALID_REQUEST, f"the body is not UTF-8: {error.reason}") from None
    if not text.strip():
        raise HeadraceError(ErrorCode.INVALID_REQUEST, "the body is empty: send a prompt or a chat completion")
    return text


def _short(message: str) -> str:
    """The message without its middle, where the client's own words make it longer than an answer should be."""
    half = _MAX_ERROR_CHARS // 2
    return message if len(message) <= _MAX_ERROR_CHARS else f"{message[:half]} ... {message[-half:]}"


def _param_at_fault(message: str) -> str | None:
    """The top-level field in msgspec's `... - at `$.field[0].x``."""
    _, found, path = message.rpartition("`$.")
    if not found:
        return None
    return path.rstrip("`").split(".")[0].split("[")[0]


def _check(request: ChatRequest) -> None:
    if (request.messages is None) == (request.prompt is None):
        raise HeadraceError(
            ErrorCode.INVALID_REQUEST, "give either `messages` or `prompt`, and only one of them", param="messages"
        )
    for name, neutral in _NEUTRAL.items():
        if (value := getattr(request, name)) is not None and value not in neutral:
            allowed = f": only {' or '.join(f'`{value}`' for value in neutral)}" if neutral else ""
            raise _unsupported(name, f"`{name}` is not supported{allowed}")
    for tool in request.tools or ():
        _check_nesting(tool.function.parameters, "tools")
    if request.response_format is not None and request.response_format.type == "json_schema":
        if request.response_format.json_schema is None:
            raise HeadraceError(ErrorCode.INVALID_REQUEST, "`json_schema` is missing", param="response_format")
        _check_nesting(request.response_format.json_schema.schema, "response_format")
    for message in request.chat:
        message.text()


def _check_nesting(value: Any, param: str) -> None:
    """Refuse what decodes here, but may exhaust the stack of whoever passes it on."""
    level = [value]
    for _ in range(MAX_NESTING):
        containers = [item.values() if isinstance(item, dict) else item for item in level]
        level = [item for items in containers for item in items if isinstance(item, dict | list)]
        if not level:
            return
    raise HeadraceError(ErrorCode.INVALID_REQUEST, f"`{param}` is nested too deeply", param=param)


def _unsupported(param: str, message: str) -> HeadraceError:
    return HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, message, param=param)


# ---- answers --------------------------------------------------------------------------------------------------------

EngineName = Literal["mlx", "ollama"]
StatusState = Literal["started", "restarted", "spilled"]
FinishReason = Literal["stop", "length", "tool_calls"]


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


Answer = Status | Chunk | Completion | ErrorAnswer
Last = Completion | ErrorAnswer

_answer_decoder: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Answer)


def decode_answer(data: bytes) -> Answer:
    """Read one message of a reply subject; raises msgspec.DecodeError for what is none of ours."""
    return _answer_decoder.decode(data)


def is_last(message: Answer) -> bool:
    """Whether nothing comes after message."""
    return isinstance(message, Completion | ErrorAnswer)


# ---- load and state -------------------------------------------------------------------------------------------------

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
    `kv_bytes_limit` what they may (0: unknown). `models` are the names it answers to, internal ones left out.
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


EventKind = Literal["started", "done", "failed", "cancelled", "expired", "spilled", "triaged", "returned"]


class RequestEvent(Struct, tag_field="object", tag="headrace.event", omit_defaults=True):
    """What just happened to one request; published for statistics and for whoever wants to watch."""

    id: str
    kind: EventKind
    priority: Priority
    engine: EngineName | None = None
    wait_ms: float | None = None
    ttft_ms: float | None = None
    total_ms: float | None = None
    code: ErrorCode | None = None
    reason: str = ""


_encoder = msgspec.json.Encoder()


def encode(message: Struct) -> bytes:
    """A message as JSON."""
    return _encoder.encode(message)
