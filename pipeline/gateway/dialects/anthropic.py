"""Anthropic's dialect: its requests as the pipeline's, the pipeline's answers as its messages. No I/O.

Source of the shapes: Anthropic's API reference (Messages, Streaming messages, Errors).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import msgspec

from pipeline.core.models import spelled
from pipeline.gateway.dialects.anthropic_body import MessagesBody
from pipeline.gateway.dialects.shapes import Asked, decode_body, expected
from pipeline.gateway.statuses import STATUS_OF
from pipeline.wire.answers import Account, Chunk, Completion, ErrorBody, FunctionCall, Success, ToolCallDelta
from pipeline.wire.decoding import decode_chat
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatRequest

SSE = "text/event-stream; charset=utf-8"
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
}
# The name here of each field that has another one in a chat.
_FIELDS = {"stop": "stop_sequences", "reasoning_effort": "thinking"}
# Clients send it back with a block of thinking. It is not checked.
_SIGNATURE = "aGVhZHJhY2U="
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}

# ---- requests --------------------------------------------------------------------------------------------------------


def read_messages(body: bytes, max_body_bytes: int, listed: Sequence[str] = ()) -> Asked:
    """The body of `POST /v1/messages`.

    Raises:
        HeadraceError: as `decode_chat`, with the names of Anthropic's fields.
    """
    request, written = read_prompt(body, max_body_bytes, listed)
    return Asked(request, written, AnthropicMessages(), stream=request.streams)


def read_prompt(body: bytes, max_body_bytes: int, listed: Sequence[str] = ()) -> tuple[ChatRequest, bytes]:
    """The body of `POST /v1/messages/count_tokens`: the request as a chat completion, decoded and encoded.

    Raises:
        HeadraceError: as `read_messages`.
    """
    given = decode_body(body, MessagesBody)
    fields = given.fields()
    if given.model:
        fields["model"] = spelled(given.model, listed)
    # Encoded and decoded once more, so that one place checks every request.
    written = msgspec.json.encode(fields)
    try:
        return decode_chat(written, max_body_bytes=max_body_bytes), written
    except HeadraceError as error:
        raise _in_anthropics_words(error) from None


def _in_anthropics_words(error: HeadraceError) -> HeadraceError:
    return HeadraceError(error.code, _renamed(error.message), param=_FIELDS.get(error.param or "", error.param))


def _renamed(text: str) -> str:
    """A text with the fields under the names that they have here."""
    for ours, theirs in _FIELDS.items():
        text = text.replace(f"`{ours}", f"`{theirs}")
    return text


# ---- answers ---------------------------------------------------------------------------------------------------------


class AnthropicMessages:
    """The responses to one call for a message.

    A stream consists of blocks: the thinking is one, the text is one, and each tool call is one. The shape remembers
    which one is open, so each response has its own.

    Attributes:
        request_id: of the pipeline's request; empty until it has one.
    """

    stream_type = SSE
    keep_alive = b'event: ping\ndata: {"type":"ping"}\n\n'

    def __init__(self) -> None:
        self.request_id = ""
        self._begun = False
        self._blocks = 0
        self._inside: Literal["text", "thinking", "call", ""] = ""
        self._call = FunctionCall("", "")  # the one that is open
        self._shown = False  # whether a part of its arguments was sent

    def part(self, chunk: Chunk) -> bytes:
        """The events that a chunk adds."""
        delta = chunk.choices[0].delta
        events = [] if self._begun else [_start(chunk.id, chunk.model)]
        self._begun = True
        if delta.reasoning_content:
            events += self._enter("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            events.append(self._delta({"type": "thinking_delta", "thinking": delta.reasoning_content}))
        if delta.content:
            events += self._enter("text", {"type": "text", "text": ""})
            events.append(self._delta({"type": "text_delta", "text": delta.content}))
        for call in delta.tool_calls or ():
            events += self._part_of_call(call)
        return _events(events)

    def end(self, completion: Completion) -> bytes:
        """The end of a stream: why it stopped, and the usage."""
        last = {"type": "message_delta", "delta": _stopped(completion), "usage": _usage(completion)}
        account = _account(completion)
        return _events([*self._close(), last | {"headrace": account}, {"type": "message_stop"}])

    def whole(self, answer: Success) -> bytes:
        """The body of a whole response; raises as `expected`."""
        completion = expected(answer, Completion)
        message = completion.choices[0].message
        content: list[dict[str, Any]] = []
        if thought := message.reasoning_content:
            content.append({"type": "thinking", "thinking": thought, "signature": _SIGNATURE})
        if message.content:
            content.append({"type": "text", "text": message.content})
        content += [_tool_use(call.id, call.function, call.function.as_object()) for call in message.tool_calls or ()]
        fields = _message(completion.id, completion.model) | {"content": content} | _stopped(completion)
        return msgspec.json.encode(fields | {"usage": _usage(completion), "headrace": _account(completion)})

    def error(self, error: ErrorBody) -> bytes:
        """The body of an error's response."""
        return error_body(_named(error), self.request_id)

    def error_part(self, error: ErrorBody) -> bytes:
        """An error in a stream that has begun. Anthropic's clients raise it."""
        return b"event: error\ndata: " + error_body(_named(error), self.request_id) + b"\n\n"

    def _enter(self, kind: Literal["text", "thinking"], block: dict[str, Any]) -> list[dict[str, Any]]:
        """Begins a block of a kind, unless it is open."""
        if self._inside == kind:
            return []
        events = [*self._close(), self._open(block)]
        self._inside = kind
        return events

    def _part_of_call(self, part: ToolCallDelta) -> list[dict[str, Any]]:
        """A call that begins, or more of its arguments. Those that are no object are shown when they are complete."""
        events = []
        if part.begins or self._inside != "call":
            events = [*self._close(), self._open(_tool_use(part.id, part.function, {}))]
            self._inside, self._call, self._shown = "call", FunctionCall(part.function.name, ""), False
        self._call.arguments += part.function.arguments
        if not self._call.arguments.lstrip().startswith("{"):
            return events
        shown = part.function.arguments if self._shown else self._call.arguments
        self._shown = True
        return [*events, self._delta({"type": "input_json_delta", "partial_json": shown})]

    def _close(self) -> list[dict[str, Any]]:
        """Ends the block that is open, if one is."""
        was_inside, self._inside = self._inside, ""
        if not was_inside:
            return []
        if was_inside == "thinking":
            return [self._delta({"type": "signature_delta", "signature": _SIGNATURE}), self._stop()]
        if was_inside == "call" and not self._shown:
            arguments = msgspec.json.encode(self._call.as_object()).decode()
            return [self._delta({"type": "input_json_delta", "partial_json": arguments}), self._stop()]
        return [self._stop()]

    def _open(self, block: dict[str, Any]) -> dict[str, Any]:
        self._blocks += 1
        return {"type": "content_block_start", "index": self._blocks - 1, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._blocks - 1, "delta": delta}

    def _stop(self) -> dict[str, Any]:
        return {"type": "content_block_stop", "index": self._blocks - 1}


def _named(error: ErrorBody) -> ErrorBody:
    """An error with the names that fields have here."""
    param = _FIELDS.get(error.param or "", error.param)
    return msgspec.structs.replace(error, message=_renamed(error.message), param=param)


def _account(completion: Completion) -> Account:
    """The pipeline's account, its notes with the names that fields have here."""
    notes = completion.headrace.notes
    if not notes:
        return completion.headrace
    return msgspec.structs.replace(completion.headrace, notes=[_renamed(note) for note in notes])


def _start(message_id: str, model: str) -> dict[str, Any]:
    """The first event. The tokens are counted at the end, and stand in the event `message_delta`."""
    usage = {"input_tokens": 0, "output_tokens": 0}
    message = _message(message_id, model) | {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
    return {"type": "message_start", "message": message}


def _message(message_id: str, model: str) -> dict[str, Any]:
    return {"id": message_id, "type": "message", "role": "assistant", "model": model}


def _stopped(completion: Completion) -> dict[str, Any]:
    choice = completion.choices[0]
    if choice.stop_reason:
        return {"stop_reason": "stop_sequence", "stop_sequence": choice.stop_reason}
    return {"stop_reason": _STOP_REASONS[choice.finish_reason], "stop_sequence": None}


def _usage(completion: Completion) -> dict[str, Any]:
    # Anthropic counts the tokens that came from a cache apart.
    usage = completion.usage
    cached = {
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.prompt_tokens_details.cached_tokens,
    }
    return {"input_tokens": usage.computed_prompt_tokens, **cached, "output_tokens": usage.completion_tokens}


def _tool_use(call_id: str, function: FunctionCall, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": function.name, "input": arguments}


def _events(events: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(
        b"event: " + event["type"].encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n" for event in events
    )


# ---- the rest --------------------------------------------------------------------------------------------------------


def models(names: Sequence[str]) -> dict[str, Any]:
    """The body of `GET /v1/models`: all of them on one page."""
    data = [model(name) for name in names]
    ends = {"first_id": names[0], "last_id": names[-1]} if names else {"first_id": None, "last_id": None}
    return {"data": data, "has_more": False, **ends}


def model(name: str) -> dict[str, Any]:
    """The body of `GET /v1/models/{id}`. Anthropic gives the epoch as the time of a release that is not known."""
    return {"type": "model", "id": name, "display_name": name, "created_at": "1970-01-01T00:00:00Z"}


def error_body(error: ErrorBody, request_id: str = "", *, status: int | None = None) -> bytes:
    """Anthropic's error envelope, with the pipeline's `code` and `param` beside the type.

    Args:
        error: what failed.
        request_id: of the request; empty where none was accepted.
        status: of the response, where it is not the code's own.
    """
    if error.code is ErrorCode.QUEUE_FULL:
        kind = "overloaded_error"
    else:
        status = status or STATUS_OF[error.code]
        kind = _TYPES.get(status, "invalid_request_error" if status < 499 else "api_error")
    message = error.message
    if error.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED:
        # The words by which agents recognise that they have to shorten the conversation.
        message = f"prompt is too long: {message}"
    fields = {"type": kind, "message": message, "code": error.code, "param": error.param}
    return msgspec.json.encode({"type": "error", "error": fields, "request_id": request_id or None})
