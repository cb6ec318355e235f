"""Ollama's API as its server sees it: what clients may send, and what they read.

It is written apart from the client's side in `consumers.ollama_engine`, so that a misreading of the protocol
cannot cancel itself out between the two. Source: Ollama's API reference (`/api/chat`, `/api/generate`,
`/api/tags`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from msgspec import Struct, field

from pipeline.errors import ErrorCode, HeadraceError
from pipeline.requests import ChatRequest
from pipeline.worker.engine import Work

_T = TypeVar("_T")


class ApiError(Exception):
    """What goes back as `{"error": message}` with a status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


# ---- requests ----------------------------------------------------------------------------------------------


class FunctionIn(Struct):
    """A function that was called: its arguments are an object here, not a string."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


class CallIn(Struct):
    """A tool call in the conversation."""

    function: FunctionIn
    id: str = ""


class Turn(Struct):
    """A message of the conversation."""

    role: str
    content: str | None = None
    images: list[Any] | None = None
    tool_calls: list[CallIn] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class Body(Struct):
    """What chat and generate have in common. Fields that nobody knows are ignored, as Ollama does."""

    model: str = ""
    stream: bool | None = None
    format: Any = None
    keep_alive: float | str | None = None
    options: dict[str, Any] | None = None
    think: bool | str | None = None
    logprobs: bool | None = None


class ChatBody(Body):
    """The body of `POST /api/chat`."""

    messages: list[Turn] | None = None
    tools: list[Any] | None = None


class GenerateBody(Body):
    """The body of `POST /api/generate`."""

    prompt: str | None = None
    system: str | None = None
    suffix: str | None = None
    template: str | None = None
    context: list[int] | None = None
    raw: bool | None = None
    images: list[Any] | None = None


class ShowBody(Struct):
    """The body of `POST /api/show`; `name` is its old field."""

    model: str = ""
    name: str = ""


def decode(body: bytes, kind: type[_T]) -> _T:
    """Read a body.

    Raises:
        ApiError: 400.
    """
    if not body:
        raise ApiError(400, "missing request body")
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ApiError(400, str(error)) from None


def chat_work(body: ChatBody, model: str) -> Work:
    """The engine's work for a chat; raises ApiError for what this server does not do."""
    turns = body.messages or []
    _refuse(body, {"images": any(turn.images for turn in turns)})
    fields: dict[str, Any] = {"messages": [_message(turn) for turn in turns]}
    if body.tools:
        fields["tools"] = body.tools
    return _work(body, model, fields)


def generate_work(body: GenerateBody, model: str) -> Work:
    """The engine's work for a prompt; raises ApiError for what this server does not do."""
    names = ("images", "template", "context", "raw")
    _refuse(body, {"insert": bool(body.suffix)} | {name: bool(getattr(body, name)) for name in names})
    turns = [Turn("system", body.system)] if body.system else []
    turns.append(Turn("user", body.prompt))
    return _work(body, model, {"messages": [_message(turn) for turn in turns]})


def _refuse(body: Body, wanted: dict[str, bool]) -> None:
    if body.think not in (None, False):
        raise ApiError(400, f'"{body.model}" does not support thinking')
    for name, is_wanted in {**wanted, "logprobs": bool(body.logprobs)}.items():
        if is_wanted:
            raise ApiError(400, f'"{body.model}" does not support {name}')


def _message(turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role.lower(), "content": turn.content or ""}
    if turn.tool_calls:
        message["tool_calls"] = [_call_in(index, call) for index, call in enumerate(turn.tool_calls)]
    if turn.tool_name:
        message["name"] = turn.tool_name
    if turn.tool_call_id:
        message["tool_call_id"] = turn.tool_call_id
    return message


def _call_in(index: int, call: CallIn) -> dict[str, Any]:
    arguments = msgspec.json.encode(call.function.arguments).decode()
    return {"id": call.id or f"call_{index}", "function": {"name": call.function.name, "arguments": arguments}}


def _work(body: Body, model: str, fields: dict[str, Any]) -> Work:
    options = _options(body.options or {})
    seed = options.pop("seed", -1)
    fields |= options
    if (form := _form(body.format)) is not None:
        fields["response_format"] = form
    try:
        request = msgspec.convert(fields, ChatRequest)
    except msgspec.ValidationError as error:
        raise ApiError(400, str(error)) from None
    return Work(_request_id(), request, model, seed if seed >= 0 else random.getrandbits(31))


def _request_id() -> str:
    return f"standin-{random.getrandbits(64):016x}"


def _form(wanted: Any) -> dict[str, Any] | None:
    if wanted in (None, ""):
        return None
    if wanted == "json":
        return {"type": "json_object"}
    if isinstance(wanted, dict):
        return {"type": "json_schema", "json_schema": {"schema": wanted}}
    raise ApiError(500, 'invalid format: expected "json" or a JSON schema')


def _integer(value: Any) -> int:
    return int(_number(value))


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    return value


def _strings(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TypeError
    return [item for item in value if item]


# Each option: the request's field, how to read it, and what Ollama calls its type.
_OPTIONS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "seed": ("seed", _integer, "integer"),
    "num_predict": ("max_tokens", _integer, "integer"),
    "temperature": ("temperature", _number, "float32"),
    "top_p": ("top_p", _number, "float32"),
    "top_k": ("top_k", _integer, "integer"),
    "min_p": ("min_p", _number, "float32"),
    "repeat_penalty": ("repetition_penalty", _number, "float32"),
    "presence_penalty": ("presence_penalty", _number, "float32"),
    "frequency_penalty": ("frequency_penalty", _number, "float32"),
    "stop": ("stop", _strings, "array"),
}


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """The options as the request's fields. Others are ignored, as Ollama does; a wrong type is its status
    500.
    """
    read: dict[str, Any] = {}
    for name, value in given.items():
        if name not in _OPTIONS or value is None:
            continue
        target, reader, kind = _OPTIONS[name]
        try:
            read[target] = reader(value)
        except (TypeError, OverflowError, ValueError):
            raise ApiError(500, f'option "{name}" must be of type {kind}') from None
    if read.get("max_tokens", 1) < 1:  # Ollama's "until the model stops"
        del read["max_tokens"]
    return read


# ---- answers -----------------------------------------------------------------------------------------------


class FunctionOut(Struct):
    """A function that the model calls."""

    index: int
    name: str
    arguments: dict[str, Any]


class CallOut(Struct):
    """A tool call of the model's."""

    id: str
    function: FunctionOut


class Message(Struct, omit_defaults=True):
    """The assistant's message, or a part of it."""

    role: str
    content: str
    tool_calls: list[CallOut] | None = None


class Part(Struct, omit_defaults=True, kw_only=True):
    """One line of an answer, or all of it. Durations are in nanoseconds. `message` stands in a chat's,
    `response` in a generated text's.
    """

    model: str
    created_at: str
    message: Message | msgspec.UnsetType = msgspec.UNSET
    response: str | msgspec.UnsetType = msgspec.UNSET
    done: bool
    done_reason: str = ""
    total_duration: int = 0
    load_duration: int = 0
    prompt_eval_count: int = 0
    prompt_eval_duration: int = 0
    eval_count: int = 0
    eval_duration: int = 0


def api_error(error: HeadraceError, model: str) -> ApiError:
    """What Ollama's clients read of an engine's refusal or failure."""
    if error.code in (ErrorCode.UNAVAILABLE, ErrorCode.ENGINE_FAILED):
        return ApiError(500, error.message)
    if error.code is ErrorCode.UNSUPPORTED_PARAMETER and error.param == "tools":
        return ApiError(400, f"{model} does not support tools")
    if error.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED:
        return ApiError(400, f"the input length exceeds the context length: {error.message}")
    return ApiError(400, error.message)
