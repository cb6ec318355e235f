"""What the dialects share: a request as it was read, and the shape of its responses."""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeVar

from pipeline.wire.answers import (
    Chunk,
    ChunkChoice,
    Completion,
    Delta,
    EmbeddingList,
    ErrorBody,
    Success,
    ToolCallDelta,
)
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.habits import BYTE_ORDER_MARK, with_whole_characters
from pipeline.wire.requests import Request
from pipeline.wire.validation import NotValid, decode

_T = TypeVar("_T")
_Answer = TypeVar("_Answer", Completion, EmbeddingList)


class Shape(Protocol):
    """Turns the messages of a record into one response, in one dialect.

    Attributes:
        stream_type: the media type of a streamed response.
        keep_alive: sent while a client waits; empty where the dialect has no such message.
        request_id: of the request. It is set once the request has one, before any method is called.
    """

    request_id: str

    @property
    def stream_type(self) -> str:
        """The media type of a streamed response."""
        ...

    @property
    def keep_alive(self) -> bytes:
        """Sent while a client waits; empty where the dialect has no such message."""
        ...

    def part(self, chunk: Chunk) -> bytes:
        """A chunk as a part of a stream; empty where it has nothing to show."""
        ...

    def end(self, completion: Completion) -> bytes:
        """The end of a stream."""
        ...

    def whole(self, answer: Success) -> bytes:
        """The body of a whole response; raises as `expected`."""
        ...

    def error(self, error: ErrorBody) -> bytes:
        """The body of an error's response."""
        ...

    def error_part(self, error: ErrorBody) -> bytes:
        """An error in a stream that has begun."""
        ...


class Asked(NamedTuple):
    """A request from a client.

    Attributes:
        request: decoded.
        body: as it is published.
        shape: of its responses.
        stream: whether the response is streamed.
        conversation: the messages as JSON, kept for a call that continues the response; empty if none can.
        others: the requests for the other choices of the response, each with its own shape.
    """

    request: Request
    body: bytes
    shape: Shape
    stream: bool
    conversation: bytes = b""
    others: tuple[Asked, ...] = ()


def expected(answer: Success, kind: type[_Answer]) -> _Answer:
    """The answer, checked to be of a kind.

    Raises:
        HeadraceError: `invalid_request`: the id was used before, for a request of another kind.
    """
    if not isinstance(answer, kind):
        raise HeadraceError(
            ErrorCode.INVALID_REQUEST, f"Request id {answer.id} was used for a different request. Use a new id."
        )
    return answer


def as_chunk(completion: Completion) -> Chunk:
    """A whole answer as the one chunk of a stream, for a client that streams a request which was first sent whole."""
    choice = completion.choices[0]
    calls = [ToolCallDelta(index, call.id, call.function) for index, call in enumerate(choice.message.tool_calls or ())]
    message = choice.message
    thought = message.reasoning_content or None
    delta = Delta("assistant", message.content, calls or None, reasoning_content=thought, reasoning=thought)
    choices = [ChunkChoice(delta, finish_reason=choice.finish_reason)]
    return Chunk(completion.id, completion.created, completion.model, choices, seq=0, attempt=1)


def decode_body(body: bytes, kind: type[_T]) -> _T:
    """Read a JSON body. A byte order mark is no part of it, and half a character becomes U+FFFD.

    Raises:
        HeadraceError: `invalid_request`.
    """
    body = body.removeprefix(BYTE_ORDER_MARK)
    if not body.strip():
        raise HeadraceError(ErrorCode.INVALID_REQUEST, "The request has no body. Send a JSON object.")
    try:
        return decode(body, kind)
    except NotValid as strict:
        refusal = HeadraceError(ErrorCode.INVALID_REQUEST, strict.sentence, param=strict.problem.param)
    # Half a character can only be written as an escape. Other bodies are not read again.
    if b"\\u" not in body:
        raise refusal
    try:
        return decode(with_whole_characters(body), kind)
    except (NotValid, ValueError, RecursionError):
        raise refusal from None
