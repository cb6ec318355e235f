"""Ollama's API: the bodies of its requests and answers, its options and tool calls, and how they translate. No I/O.

Three programs use it: two servers, the gateway (in front of the pipeline) and the stand-in (in front of one engine),
and one client, the Ollama engine. What all three translate (options, tool calls, `format`) stands here once.

Source of the shapes: Ollama's API reference (`/api/chat`, `/api/generate`, `/api/embed`, `/api/tags`,
`/api/show`, `/api/ps`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET, Struct, UnsetType, field

from pipeline.wire.answers import FunctionCall, TokenScore, ToolCall, ToolCallDelta, add_call
from pipeline.wire.constraints import ResponseFormat
from pipeline.wire.requests import NO_LIMIT, ChatRequest

NEVER = "2318-01-01T00:00:00Z"  # when a model that is never unloaded expires

# ---- options ---------------------------------------------------------------------------------------------------------


class BadOptionError(ValueError):
    """An option of the wrong type. `kind` is the type, as Ollama's own error names it; `field` is the request's."""

    def __init__(self, name: str, field: str, kind: str) -> None:
        super().__init__(f'option "{name}" must be of type {kind}')
        self.name = name
        self.field = field
        self.kind = kind


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    return value


def _integer(value: Any) -> int:
    """Ollama cuts the fraction off: some clients write every number as 5.0."""
    return int(_number(value))


def _strings(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TypeError
    return [item for item in value if item]


def _limit(value: Any) -> int:
    """0, -1 and -2 (until the context is full) are no limit."""
    return NO_LIMIT if (limit := _integer(value)) < 1 else limit


def _seed(value: Any) -> int | None:
    """-1 draws a seed."""
    return None if (seed := _integer(value)) == -1 else seed


def _top_k(value: Any) -> int:
    """0 and below are all tokens."""
    return max(0, _integer(value))


class Option(NamedTuple):
    """One of Ollama's options.

    Attributes:
        field: of `ChatRequest`.
        read: gives the field's value, None for its default; raises TypeError.
        kind: the option's type, as Ollama's errors name it.
    """

    field: str
    read: Callable[[Any], Any]
    kind: str


OPTIONS: dict[str, Option] = {
    "num_predict": Option("max_tokens", _limit, "integer"),
    "seed": Option("seed", _seed, "integer"),
    "stop": Option("stop", _strings, "array"),
    "temperature": Option("temperature", _number, "float32"),
    "top_p": Option("top_p", _number, "float32"),
    "top_k": Option("top_k", _top_k, "integer"),
    "min_p": Option("min_p", _number, "float32"),
    "repeat_penalty": Option("repetition_penalty", _number, "float32"),
    "presence_penalty": Option("presence_penalty", _number, "float32"),
    "frequency_penalty": Option("frequency_penalty", _number, "float32"),
}


# Options without a field of the pipeline's requests. A wrong type in one of them is an error.
_RUNNERS = frozenset(
    "num_ctx num_batch num_gpu num_keep main_gpu use_mmap repeat_last_n typical_p mirostat mirostat_tau".split()  # noqa: SIM905 - names
)


def read_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options as fields of `ChatRequest`. Unknown ones are ignored, as Ollama ignores those of other runners.

    Raises:
        BadOptionError: an option of the wrong type.
    """
    fields: dict[str, Any] = {}
    for name, option in OPTIONS.items():
        if (value := given.get(name)) is None:
            continue
        try:
            read = option.read(value)
        except (TypeError, OverflowError, ValueError):
            raise BadOptionError(name, option.field, option.kind) from None
        if read is not None:
            fields[option.field] = read
    return fields


def write_options(request: ChatRequest) -> dict[str, Any]:
    """The options that a request sets. The others keep the values of the model's Modelfile."""
    values = {name: getattr(request, option.field) for name, option in OPTIONS.items()}
    limit = -1 if request.token_limit == NO_LIMIT else request.token_limit
    values |= {"num_predict": limit, "stop": request.stops or None}
    return {name: value for name, value in values.items() if value is not None}


# ---- tool calls ------------------------------------------------------------------------------------------------------


class OllamaFunction(Struct):
    """A function that was called. Its arguments are an object, where OpenAI has a string. A conversation can also hold
    what a model wrote that is no object, or nothing.
    """

    name: str
    arguments: Any = field(default_factory=dict)
    index: int | UnsetType | None = UNSET


class OllamaCall(Struct):
    """A tool call, in the conversation or in an answer."""

    function: OllamaFunction
    id: str | None = ""


def read_call(call: OllamaCall, default_id: str) -> ToolCall:
    """A tool call as the pipeline has it. Ollama numbers its calls since 0.12; default_id is for one without an id."""
    given = call.function.arguments
    arguments = given if isinstance(given, str) else msgspec.json.encode(given or {}).decode()
    return ToolCall(FunctionCall(call.function.name, arguments), id=call.id or default_id)


def write_call(index: int, call_id: str | None, function: FunctionCall) -> OllamaCall:
    """A tool call as Ollama has it."""
    return OllamaCall(OllamaFunction(function.name, function.as_object(), index), call_id or "")


class WholeCalls:
    """The calls of one answer, from their parts: Ollama's clients take a call as a whole."""

    def __init__(self) -> None:
        self._open: list[ToolCall] = []
        self._sent = 0

    def take(self, parts: Iterable[ToolCall | ToolCallDelta], *, ended: bool) -> list[OllamaCall]:
        """The calls that these parts complete. A call is complete when the next one begins, or the answer ends."""
        for part in parts:
            add_call(self._open, part)
        ready = self._open if ended else self._open[:-1]
        self._open = self._open[len(ready) :]
        whole = [write_call(self._sent + at, call.id, call.function) for at, call in enumerate(ready)]
        self._sent += len(whole)
        return whole


# ---- requests --------------------------------------------------------------------------------------------------------


class Turn(Struct):
    """A message of the conversation. Images are in base64."""

    role: str
    content: str | None = None
    images: list[str] | None = None
    tool_calls: list[OllamaCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    thinking: str | None = None


class ModelBody(Struct):
    """A body that can name a model."""

    # Clients that fill in a form send null for what was left out.
    named: str | None = field(name="model", default=None)

    @property
    def model(self) -> str:
        """The name; empty for none."""
        return self.named or ""


class Body(ModelBody):
    """The fields that chat and generate share. Unknown fields are ignored, as Ollama ignores them."""

    stream: bool | None = None
    format: Any = None
    keep_alive: float | str | None = None
    options: dict[str, Any] | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | float | None = None

    def _shared(self) -> dict[str, Any]:
        """The fields of the pipeline's requests that chat and generate make alike, options excepted."""
        fields = {name: getattr(self, name) for name in ("think", "logprobs", "top_logprobs")}
        return {name: value for name, value in fields.items() if value is not None}

    def particulars(self) -> dict[str, Any]:
        """What only Ollama has, as the pipeline's `ollama`."""
        return _particulars(self.options, self.keep_alive)


class ChatBody(Body):
    """The body of `POST /api/chat`."""

    messages: list[Turn] | None = None
    tools: list[Any] | None = None

    def fields(self) -> dict[str, Any]:
        """The body, without its options, as fields of the pipeline's requests."""
        tools = {"tools": self.tools} if self.tools else {}
        return {"messages": _conversation(self.messages or ()), **tools, **self._shared()}


class GenerateBody(Body):
    """The body of `POST /api/generate`."""

    prompt: str | None = None
    system: str | None = None
    suffix: str | None = None
    template: str | None = None
    context: list[int] | None = None
    raw: bool | None = None
    images: list[str] | None = None

    def particulars(self) -> dict[str, Any]:
        """As `Body.particulars`."""
        alike = {name: getattr(self, name) for name in ("raw", "template", "context")}
        return super().particulars() | {name: value for name, value in alike.items() if value}

    def fields(self) -> dict[str, Any]:
        """As `ChatBody.fields`."""
        turns = [Turn("system", self.system)] if self.system else []
        suffix = {"suffix": self.suffix} if self.suffix else {}
        messages = _conversation([*turns, Turn("user", self.prompt, self.images)])
        return {"messages": messages, **suffix, **self._shared()}


class EmbedBody(ModelBody):
    """The body of `POST /api/embed`."""

    input: str | list[str] | None = None
    truncate: bool | None = None
    dimensions: int | float | None = None
    keep_alive: float | str | None = None
    options: dict[str, Any] | None = None

    def particulars(self) -> dict[str, Any]:
        """What only Ollama has, as the pipeline's `ollama`."""
        return _particulars(self.options, self.keep_alive)


class EmbeddingBody(ModelBody):
    """The body of `POST /api/embeddings`, the predecessor of `embed`."""

    prompt: str | None = None
    keep_alive: float | str | None = None
    options: dict[str, Any] | None = None


class ShowBody(ModelBody):
    """The body of `POST /api/show`; `name` is its old field."""

    name: str | None = None

    @property
    def model(self) -> str:
        """As `ModelBody.model`."""
        return self.named or self.name or ""


class PullBody(ShowBody):
    """The body of `POST /api/pull`."""

    stream: bool | None = None


def response_format(wanted: Any) -> dict[str, Any] | None:
    """A body's `format` as the pipeline's `response_format`.

    Raises:
        ValueError: Ollama has no such format.
    """
    if wanted in (None, ""):
        return None
    if wanted == "json":
        return {"type": "json_object"}
    if isinstance(wanted, dict):
        return {"type": "json_schema", "json_schema": {"schema": wanted}}
    raise ValueError('"json" or a JSON schema')


def format_of(wanted: ResponseFormat | None) -> str | dict[str, Any] | None:
    """The pipeline's `response_format` as a body's `format`; None for text."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_schema" and wanted.json_schema is not None and wanted.json_schema.schema:
        return wanted.json_schema.schema
    return "json"


def _particulars(options: Mapping[str, Any] | None, keep_alive: float | str | None) -> dict[str, Any]:
    """The pipeline's `ollama`. Objects are no values of options: Ollama ignores an unknown option, whatever it has."""
    others = {
        name: value
        for name, value in (options or {}).items()
        if name not in OPTIONS and (name in _RUNNERS or not isinstance(value, dict | list))
    }
    given = {"options": others or None, "keep_alive": keep_alive}
    return {name: value for name, value in given.items() if value is not None}


def _conversation(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    return [_message(turn) for turn in turns]


def _message(turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role.lower(), "content": turn.content or ""}
    if turn.images:
        parts = [{"type": "text", "text": turn.content}] if turn.content else []
        message["content"] = parts + [{"type": "image_url", "image_url": _image_url(image)} for image in turn.images]
    if turn.tool_calls:
        calls = [read_call(call, f"call_{index}") for index, call in enumerate(turn.tool_calls)]
        message["tool_calls"] = [{"id": call.id, "function": msgspec.to_builtins(call.function)} for call in calls]
    if turn.thinking:
        message["reasoning_content"] = turn.thinking
    if turn.tool_name:
        message["name"] = turn.tool_name
    if turn.tool_call_id:
        message["tool_call_id"] = turn.tool_call_id
    return message


def _image_url(image: str) -> str:
    """An image as a `data:` URL. Ollama finds out the format of an image by itself."""
    return image if image.startswith("data:") else f"data:image/png;base64,{image}"


# ---- answers ---------------------------------------------------------------------------------------------------------


class AssistantTurn(Struct, omit_defaults=True):
    """The assistant's message, or a part of it."""

    role: str
    content: str
    tool_calls: list[OllamaCall] | None = None
    thinking: str = ""


class Part(Struct, omit_defaults=True, kw_only=True):
    """One line of a streamed answer, or a whole answer. Durations in nanoseconds. `message` is a chat's, `response` a
    generated text's. The last line has all durations and counts, those that are 0 too.
    """

    model: str
    created_at: str
    message: AssistantTurn | UnsetType = UNSET
    response: str | UnsetType = UNSET
    thinking: str = ""
    logprobs: list[TokenScore] = field(default_factory=list)
    done: bool
    done_reason: str = ""
    total_duration: int | UnsetType = UNSET
    load_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET
    prompt_eval_duration: int | UnsetType = UNSET
    eval_count: int | UnsetType = UNSET
    eval_duration: int | UnsetType = UNSET


def time_text(seconds: float) -> str:
    """A time (UTC, unix seconds) as Ollama writes it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
