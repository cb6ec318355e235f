"""A body of Ollama's API as work for the engine, and the engine's errors as Ollama's."""

from __future__ import annotations

import random
from typing import TypeVar

import msgspec

from pipeline.engine import Work
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.ollama import BadOptionError, ChatBody, GenerateBody, read_options, response_format
from pipeline.wire.requests import ChatRequest
from pipeline.wire.validation import NotValid, explain
from pipeline.wire.validation import decode as decode_json

_T = TypeVar("_T")


class ApiError(Exception):
    """An error of the server's, sent as `{"error": message}` with a status."""

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
        return decode_json(body, kind)
    except NotValid as error:
        raise ApiError(400, error.sentence) from None


def work_of(body: ChatBody | GenerateBody, model: str) -> Work:
    """A chat or a prompt as work for the engine; raises ApiError for features that this server does not have."""
    fields = body.fields()
    if fields.pop("think", None):
        raise ApiError(400, f'"{body.model}" does not support thinking')
    if particulars := body.particulars():
        fields["ollama"] = particulars
    try:
        fields |= read_options(body.options or {})
    except BadOptionError as error:
        raise ApiError(500, str(error)) from None
    seed = fields.pop("seed", -1)
    try:
        form = response_format(body.format)
    except ValueError as error:
        raise ApiError(500, f"invalid format: expected {error}") from None
    if form is not None:
        fields["response_format"] = form
    try:
        request = msgspec.convert(fields, ChatRequest)
    except msgspec.ValidationError as error:
        raise ApiError(400, explain(error, ChatRequest, fields).sentence()) from None
    if needed := request.needs_ollama:
        raise ApiError(400, f'"{body.model}" does not support {"insert" if needed == "suffix" else needed}')
    return Work(_request_id(), request, model, seed if seed >= 0 else random.getrandbits(31))


def _request_id() -> str:
    return f"standin-{random.getrandbits(64):016x}"


def api_error(error: HeadraceError, model: str) -> ApiError:
    """An engine's error, as Ollama's clients expect it."""
    if error.code in (ErrorCode.UNAVAILABLE, ErrorCode.ENGINE_FAILED):
        return ApiError(500, error.message)
    if error.code is ErrorCode.UNSUPPORTED_PARAMETER and error.param == "tools":
        return ApiError(400, f"{model} does not support tools")
    if error.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED:
        return ApiError(400, f"the input length exceeds the context length: {error.message}")
    return ApiError(400, error.message)
