"""From a body of Ollama's API to the engine's work, and from its errors to Ollama's."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from pipeline.engine import Work
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.ollama import ChatBody, GenerateBody, response_format
from pipeline.wire.requests import ChatRequest

_T = TypeVar("_T")


class ApiError(Exception):
    """What goes back as `{"error": message}` with a status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


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


def work_of(body: ChatBody | GenerateBody, model: str) -> Work:
    """The engine's work for a chat or a prompt; raises ApiError for what this server does not do."""
    for feature in body.unsupported().values():
        raise ApiError(400, f'"{body.model}" does not support {feature}')
    fields = body.fields()
    options = _options(body.options or {})
    seed = options.pop("seed", -1)
    fields |= options
    try:
        form = response_format(body.format)
    except ValueError as error:
        raise ApiError(500, f"invalid format: {error}") from None
    if form is not None:
        fields["response_format"] = form
    try:
        request = msgspec.convert(fields, ChatRequest)
    except msgspec.ValidationError as error:
        raise ApiError(400, str(error)) from None
    return Work(_request_id(), request, model, seed if seed >= 0 else random.getrandbits(31))


def _request_id() -> str:
    return f"standin-{random.getrandbits(64):016x}"


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
    """The options as the request's fields. Others are ignored, as Ollama does; a wrong type is its status 500."""
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


def api_error(error: HeadraceError, model: str) -> ApiError:
    """What Ollama's clients read of an engine's refusal or failure."""
    if error.code in (ErrorCode.UNAVAILABLE, ErrorCode.ENGINE_FAILED):
        return ApiError(500, error.message)
    if error.code is ErrorCode.UNSUPPORTED_PARAMETER and error.param == "tools":
        return ApiError(400, f"{model} does not support tools")
    if error.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED:
        return ApiError(400, f"the input length exceeds the context length: {error.message}")
    return ApiError(400, error.message)
