"""The body of a request: OpenAI's chat completion, or its embeddings, as msgspec structs, decoded strictly.

What would change the answer and cannot be honoured is refused; a field nobody knows is ignored. Source of the shapes:
the OpenAI API reference (chat completions, embeddings) and this project's `docs/protocol.md`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct, field

from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import ToolCall

MAX_STOPS = 16
MAX_TOOLS = 128
MAX_NESTING = 64
# As at OpenAI.
MAX_INPUTS = 2048
_MAX_ERROR_CHARS = 300
# What msgspec says of an `input` of tokens, or of lists of them, which some of OpenAI's clients make of texts.
_TOKENS = re.compile(r"Expected `str`, got `(int|array)` - at `\$\.input\[")


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


_ModelName = Annotated[str, Meta(max_length=256)]


class ChatRequest(Struct, omit_defaults=True):
    """A request for an answer: what OpenAI's chat completion takes, plus `prompt` for short and a few sampling
    parameters of MLX and Ollama (`top_k`, `min_p`, `repetition_penalty`). Absent and null are the same.
    """

    messages: Annotated[list[ChatMessage], Meta(min_length=1)] | None = None
    prompt: Annotated[str, Meta(min_length=1)] | None = None
    model: _ModelName | None = None
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
        return _wanted(self.model)

    @property
    def chat(self) -> list[ChatMessage]:
        """The conversation, also where only a `prompt` was given."""
        if self.messages is not None:
            return self.messages
        return [ChatMessage(role="user", content=self.prompt)]


EncodingFormat = Literal["float", "base64"]
_Input = Annotated[str, Meta(min_length=1)]


class EmbeddingRequest(Struct, omit_defaults=True):
    """A request for embeddings: what OpenAI's takes, and `truncate` as Ollama has it (cut what is too long for the
    model, which is the default; else refuse it). Texts only: tokens belong to one model's vocabulary.
    """

    input: _Input | Annotated[list[_Input], Meta(min_length=1, max_length=MAX_INPUTS)]
    model: _ModelName | None = None
    dimensions: _Count | None = None
    encoding_format: EncodingFormat | None = None
    truncate: bool | None = None

    @property
    def wanted_model(self) -> str | None:
        """The model asked for by name, or None where any may embed."""
        return _wanted(self.model)

    @property
    def texts(self) -> list[str]:
        """What is to be embedded, in order."""
        return [self.input] if isinstance(self.input, str) else self.input


Request = ChatRequest | EmbeddingRequest


def _wanted(model: str | None) -> str | None:
    return None if model in (None, "", "auto") else model


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

_chat_decoder = msgspec.json.Decoder(ChatRequest)
_embedding_decoder = msgspec.json.Decoder(EmbeddingRequest)
_Read = TypeVar("_Read", ChatRequest, EmbeddingRequest)


def decode_request(body: bytes, *, max_body_bytes: int) -> Request:
    """Read a request's body: JSON when its first character is `{`, plain text (the prompt) otherwise.

    A request with an `input`, and neither `messages` nor a `prompt`, is one for embeddings.

    Raises:
        HeadraceError: `request_too_large`, `invalid_request` (with the field in `param`), or
            `unsupported_parameter` for what would change the answer and cannot be honoured by any engine.
    """
    chat = _read_chat(body, max_body_bytes)
    # Looked for first: to read a long body once more takes longer than all the rest.
    if chat.messages is None and chat.prompt is None and b'"input"' in body:
        return decode_embedding(body, max_body_bytes=max_body_bytes)
    _check(chat)
    return chat


def decode_chat(body: bytes, *, max_body_bytes: int) -> ChatRequest:
    """As `decode_request`, of a body that must be a chat's."""
    chat = _read_chat(body, max_body_bytes)
    _check(chat)
    return chat


def decode_embedding(body: bytes, *, max_body_bytes: int) -> EmbeddingRequest:
    """As `decode_request`, of a body that must be one for embeddings."""
    _check_size(body, max_body_bytes)
    try:
        return _decode(_embedding_decoder, body)
    except HeadraceError as error:
        if _TOKENS.match(error.message):
            raise _unsupported("input", "`input` must be text: tokens belong to one model's vocabulary") from None
        raise


def _read_chat(body: bytes, max_body_bytes: int) -> ChatRequest:
    _check_size(body, max_body_bytes)
    if not body.startswith(b"{"):
        return ChatRequest(prompt=_decode_text(body))
    return _decode(_chat_decoder, body)


def _check_size(body: bytes, max_body_bytes: int) -> None:
    if len(body) > max_body_bytes:
        raise HeadraceError(
            ErrorCode.REQUEST_TOO_LARGE,
            f"the request has {len(body)} bytes; at most {max_body_bytes} are accepted",
        )


def _decode(decoder: msgspec.json.Decoder[_Read], body: bytes) -> _Read:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise HeadraceError(ErrorCode.INVALID_REQUEST, _short(str(error)), param=_param_at_fault(str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HeadraceError(ErrorCode.INVALID_REQUEST, f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise HeadraceError(ErrorCode.INVALID_REQUEST, "the body is nested too deeply") from None


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
            allowed = f": only {' or '.join(f'`{_as_json(value)}`' for value in neutral)}" if neutral else ""
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


def _as_json(value: Any) -> str:
    return value if isinstance(value, str) and value else msgspec.json.encode(value).decode()


def _unsupported(param: str, message: str) -> HeadraceError:
    return HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, message, param=param)
