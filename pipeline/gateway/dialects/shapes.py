"""What the two dialects have in common: a request as it was asked, and the shape that its responses take."""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeVar

import msgspec

from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import (
    Chunk,
    ChunkChoice,
    Completion,
    Delta,
    EmbeddingList,
    ErrorBody,
    Success,
    ToolCallDelta,
)
from pipeline.wire.requests import Request

_T = TypeVar("_T")
_Answer = TypeVar("_Answer", Completion, EmbeddingList)
_MAX_ERROR_CHARS = 300


class Shape(Protocol):
    """Turns the messages of a record into one response, in one dialect.

    Attributes:
        stream_type: the media type of a streamed response.
        keep_alive: what may be sent while there is nothing to say, or nothing.
    """

    @property
    def stream_type(self) -> str:
        """The media type of a streamed response."""
        ...

    @property
    def keep_alive(self) -> bytes:
        """What may be sent while there is nothing to say; empty where the dialect has no such thing."""
        ...

    def part(self, chunk: Chunk) -> bytes:
        """What a chunk is in a stream; empty for nothing."""
        ...

    def end(self, completion: Completion) -> bytes:
        """What ends a stream."""
        ...

    def whole(self, answer: Success) -> bytes:
        """The body of a response that is not streamed; raises as `expected`."""
        ...

    def error(self, error: ErrorBody) -> bytes:
        """The body of an error's response."""
        ...

    def error_part(self, error: ErrorBody) -> bytes:
        """An error in a stream that has begun."""
        ...


class Asked(NamedTuple):
    """A request, read: as the pipeline understands it, as it is published, and how it wants its answer."""

    request: Request
    body: bytes
    shape: Shape
    stream: bool


def expected(answer: Success, kind: type[_Answer]) -> _Answer:
    """The answer, which is of that kind.

    Raises:
        HeadraceError: `invalid_request` for an id under which something else was asked before.
    """
    if not isinstance(answer, kind):
        raise HeadraceError(
            ErrorCode.INVALID_REQUEST, f"under the id {answer.id} something else was asked and answered: use another"
        )
    return answer


def as_chunk(completion: Completion) -> Chunk:
    """A whole answer as the one chunk of a stream: for a reader who streams what was asked for whole."""
    choice = completion.choices[0]
    calls = [ToolCallDelta(index, call.id, call.function) for index, call in enumerate(choice.message.tool_calls or ())]
    delta = Delta("assistant", choice.message.content, calls or None)
    choices = [ChunkChoice(delta, finish_reason=choice.finish_reason)]
    return Chunk(completion.id, completion.created, completion.model, choices, seq=0, attempt=1)


def decode_body(body: bytes, kind: type[_T]) -> _T:
    """Read a JSON body.

    Raises:
        HeadraceError: `invalid_request`.
    """
    if not body.strip():
        raise HeadraceError(ErrorCode.INVALID_REQUEST, "the request has no body: a JSON object is expected")
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise HeadraceError(ErrorCode.INVALID_REQUEST, str(error)[:_MAX_ERROR_CHARS] or "bad JSON") from None
