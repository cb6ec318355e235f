"""The lines of a batch, as calls of the endpoints that they name. No I/O.

Source of the shapes: the OpenAI API reference (batch input and output).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from pipeline.gateway.dialects import openai
from pipeline.gateway.dialects.responses import Continued, read_response
from pipeline.gateway.dialects.shapes import Asked
from pipeline.gateway.statuses import status_of
from pipeline.wire.answers import ErrorBody, Success
from pipeline.wire.batches import LineBody, LineResponse, LineResult
from pipeline.wire.errors import ErrorCode, HeadraceError

READERS: dict[str, Callable[[bytes, int, Sequence[str]], Asked | Continued]] = {
    "/v1/chat/completions": openai.read_chat,
    "/v1/responses": read_response,
    "/v1/completions": openai.read_text,
    "/v1/embeddings": openai.read_embeddings,
}


def read_call(line: LineBody, max_body_bytes: int) -> Asked:
    """The request of a line.

    Raises:
        HeadraceError: as the endpoint's reader, and `unsupported_parameter` for what only a call over HTTP can have.
    """
    body = bytes(line.body)
    if len(body) > max_body_bytes:
        raise HeadraceError(
            ErrorCode.REQUEST_TOO_LARGE, f"The body has {len(body)} bytes. The limit is {max_body_bytes} bytes."
        )
    asked = READERS[line.url](body, max_body_bytes, ())
    if isinstance(asked, Continued):
        message = "A line of a batch cannot continue an earlier response. Send the whole conversation in `input`."
        raise HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, message, param="previous_response_id")
    if asked.stream:
        message = "The response to a line of a batch cannot be streamed. Leave `stream` out."
        raise HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, message, param="stream")
    if asked.others:
        message = "The response to a line of a batch has one choice. Write a line for each."
        raise HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, message, param="n")
    return asked


def succeeded(line: LineBody, asked: Asked, request_id: str, answer: Success) -> LineResult:
    """The result of a line that was answered.

    Raises:
        HeadraceError: the answer belongs to another request.
    """
    asked.shape.request_id = request_id
    return _result(line, request_id, 200, asked.shape.whole(answer))


def failed(line: LineBody, request_id: str, error: HeadraceError) -> LineResult:
    """The result of a line that failed."""
    return _result(line, request_id, status_of(error), openai.error_body(ErrorBody.of(error)))


def _result(line: LineBody, request_id: str, status: int, body: bytes) -> LineResult:
    response = LineResponse(status, request_id, msgspec.Raw(body))
    return LineResult(f"batch_req_{request_id.removeprefix('batch_')}", line.custom_id, response)
