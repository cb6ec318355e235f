"""OpenAI's Responses API: its calls as the pipeline's requests, the pipeline's answers as its responses. No I/O.

Source of the shapes: the OpenAI API reference (responses). The items of the input are in `response_items`, the tools in
`response_tools`, the response in `response_object`, and the events of a stream in `response_events`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import Struct, structs

from pipeline.gateway.dialects.openai import SSE, error_body
from pipeline.gateway.dialects.response_events import ResponseEvents
from pipeline.gateway.dialects.response_items import Turn, referred_to, turns
from pipeline.gateway.dialects.response_object import Frame
from pipeline.gateway.dialects.response_tools import ResponseTool, ToolChoice, offered
from pipeline.gateway.dialects.shapes import Asked, decode_body, expected
from pipeline.wire.answers import Chunk, Completion, ErrorBody, Success
from pipeline.wire.decoding import decode_chat
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.habits import mended
from pipeline.wire.requests import ChatRequest
from pipeline.wire.validation import explain


class TextFormat(Struct, omit_defaults=True):
    """The form of the answer's text."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextOptions(Struct, omit_defaults=True):
    """What is asked of the answer's text."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningOptions(Struct):
    """What is asked of the model's reasoning."""

    effort: str | None = None
    summary: str | None = None


class ResponseCall(Struct):
    """The parameters of a call that a chat does not have, or has in another form. The chat checks the others."""

    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: ToolChoice | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    include: list[str] | None = None
    metadata: dict[str, Any] | None = None
    max_tool_calls: int | float | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None


# The chat's name of each parameter that has another name here.
_OURS = {
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "verbosity": "text.verbosity",
}
_THEIRS = re.compile(rf"`({'|'.join(_OURS)})\b|\b(response_format)\b")
# The chat's fields that are made here, not carried.
_MADE = frozenset({*_OURS, "prompt", "suffix", "ollama", "tools", "tool_choice", "reasoning", "headrace.notes"})
_CARRIED = tuple(field.encode_name for field in structs.fields(ChatRequest) if field.encode_name not in _MADE)
# The part of `include` that changes the answer. The others are about hosted tools and reasoning.
_LOGPROBS = "message.output_text.logprobs"
# Parameters that would need a server with a memory, and what to do instead.
_STATEFUL = {
    "background": "Send the header `Prefer: respond-async`.",
    "conversation": "Send the whole conversation in `input`.",
    "prompt": "Send the text in `input` and `instructions`.",
}
# The fields of the response that repeat the call's as they are.
_REPEATED = (
    "instructions",
    "max_tool_calls",
    "metadata",
    "parallel_tool_calls",
    "previous_response_id",
    "prompt_cache_key",
    "safety_identifier",
    "temperature",
    "tool_choice",
    "tools",
    "top_p",
    "truncation",
    "user",
)


class Continued(NamedTuple):
    """A call that continues an earlier response, or refers to its items.

    Attributes:
        previous: the id of the response that it continues, as the client has it; empty for none.
        referred: the ids of the responses to whose items it refers.
        fields: of the chat, without its messages.
        instructions: the messages before the conversation.
        input: the new items.
        frame: of the response.
        limit: of the body's size, bytes.
        keep: whether this response can be continued in turn.
    """

    previous: str
    referred: list[str]
    fields: dict[str, Any]
    instructions: list[Turn]
    input: str | list[dict[str, Any]]
    frame: Frame
    limit: int
    keep: bool

    def after(self, earlier: list[Turn], answers: Mapping[str, Completion]) -> Asked:
        """The request, after the earlier conversation and with the answers that are referred to, by their ids.

        Raises:
            HeadraceError: as `read_response`, and `invalid_request` for an answer that is missing.
        """
        conversation = earlier + turns(self.input, answers)
        body = msgspec.json.encode(self.fields | {"messages": self.instructions + conversation})
        try:
            request = decode_chat(body, max_body_bytes=self.limit)
        except HeadraceError as error:
            raise HeadraceError(error.code, renamed(error.message), param=_renamed_param(error.param)) from None
        kept = msgspec.json.encode(conversation) if self.keep else b""
        return Asked(request, body, ResponseShape(self.frame), stream=request.streams, conversation=kept)


def read_response(body: bytes, max_body_bytes: int, _listed: Sequence[str] = ()) -> Asked | Continued:
    """The body of `POST /v1/responses`.

    Raises:
        HeadraceError: as `decode_chat`, with the parameters under the names that they have here.
    """
    given = _decoded(body)
    try:
        call = msgspec.convert(given, ResponseCall)
    except msgspec.ValidationError as error:
        problem = explain(error, ResponseCall, given)
        raise HeadraceError(ErrorCode.INVALID_REQUEST, problem.sentence(), param=problem.param) from None
    _refuse_unsupported(given)
    if not call.input:
        raise HeadraceError(ErrorCode.INVALID_REQUEST, "`input` is required.", param="input")
    tools = offered(call.tools or (), call.tool_choice)
    fields = {name: given[name] for name in _CARRIED if given.get(name) is not None} | _fields(call, given)
    if tools.tools:
        fields["tools"] = tools.tools
    if tools.choice is not None:
        fields["tool_choice"] = tools.choice
    frame = Frame(_repeated(call, given), str(given.get("model") or "auto"), tools.named, tools.notes)
    instructions = [{"role": "system", "content": call.instructions}] if call.instructions else []
    previous = call.previous_response_id or ""
    continued = Continued(
        previous,
        referred_to(call.input),
        fields,
        instructions,
        call.input,
        frame,
        max_body_bytes,
        keep=call.store is not False,
    )
    return continued if previous or continued.referred else continued.after([], {})


def _decoded(body: bytes) -> dict[str, Any]:
    """The body, with halved characters replaced as in a chat."""
    try:
        return decode_body(body, dict[str, Any])
    except HeadraceError:
        try:
            return decode_body(mended(body)[0], dict[str, Any])
        except (TypeError, ValueError, RecursionError):
            pass
        raise


def _refuse_unsupported(given: dict[str, Any]) -> None:
    for name, instead in _STATEFUL.items():
        if given.get(name):
            message = f"`{name}` is not supported. {instead}"
            raise HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, message, param=name)
    for name, ours in _OURS.items():
        if given.get(name) is not None:
            message = f"`{name}` is a parameter of chat completions. Use `{ours}`."
            raise HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, message, param=name)


def _fields(call: ResponseCall, given: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a chat that have another name or form here."""
    fields: dict[str, Any] = {}
    if (limit := given.get("max_output_tokens")) is not None:
        fields["max_completion_tokens"] = limit
    if given.get("top_logprobs") or _LOGPROBS in (call.include or ()):
        fields["logprobs"] = True
    if call.text is not None and (form := call.text.format) is not None:
        fields["response_format"] = _response_format(form)
    if call.text is not None and call.text.verbosity is not None:
        fields["verbosity"] = call.text.verbosity
    if call.reasoning is not None and call.reasoning.effort is not None:
        fields["reasoning_effort"] = call.reasoning.effort
    return fields


def _response_format(form: TextFormat) -> dict[str, Any]:
    if form.type != "json_schema":
        return {"type": form.type}
    if form.schema is None:
        raise HeadraceError(ErrorCode.INVALID_REQUEST, "`text.format.schema` is required.", param="text.format")
    schema = {name: value for name, value in structs.asdict(form).items() if name != "type" and value is not None}
    return {"type": "json_schema", "json_schema": schema}


def _repeated(call: ResponseCall, given: dict[str, Any]) -> dict[str, Any]:
    """The fields of the response that repeat the call's."""
    fields = {name: given[name] for name in _REPEATED if given.get(name) is not None}
    fields["store"] = call.store is not False
    limit = given.get("max_output_tokens")
    fields["max_output_tokens"] = limit if isinstance(limit, int) and limit > 0 else None
    if call.reasoning is not None:
        fields["reasoning"] = structs.asdict(call.reasoning)
    if call.text is not None:
        fields["text"] = structs.asdict(structs.replace(call.text, format=call.text.format or TextFormat("text")))
    return fields


def renamed(text: str) -> str:
    """A message with the parameters under the names that they have here."""
    return _THEIRS.sub(lambda found: f"`{_OURS[found[1]]}" if found[1] else _OURS[found[2]], text)


def _renamed_param(param: str | None) -> str | None:
    return None if param is None else _OURS.get(param, param)


class ResponseShape:
    """The responses to a call of the Responses API.

    Args:
        frame: of the response.

    Attributes:
        request_id: of the pipeline's request, which is also the id of the response; empty until it has one.
    """

    stream_type = SSE

    def __init__(self, frame: Frame) -> None:
        self.request_id = ""
        self._frame = frame

    @cached_property
    def _events(self) -> ResponseEvents:
        """The events of the stream. It begins once the request has an id."""
        return ResponseEvents(self._frame, self.request_id)

    @property
    def keep_alive(self) -> bytes:
        """The next event that says that the response is in progress. Each has a number, so read it once for each."""
        return self._events.waiting()

    def part(self, chunk: Chunk) -> bytes:
        """The events of a chunk."""
        return self._events.chunk(chunk)

    def end(self, completion: Completion) -> bytes:
        """The last events."""
        return self._events.end(_noted(completion))

    def whole(self, answer: Success) -> bytes:
        """The body of a whole response; raises as `expected`."""
        return msgspec.json.encode(self._frame.whole(_noted(expected(answer, Completion))))

    def error(self, error: ErrorBody) -> bytes:
        """The body of an error's response."""
        return error_body(_in_our_words(error))

    def error_part(self, error: ErrorBody) -> bytes:
        """An error in a stream that has begun."""
        return self._events.failed(_in_our_words(error))


def _in_our_words(error: ErrorBody) -> ErrorBody:
    return structs.replace(error, message=renamed(error.message), param=_renamed_param(error.param))


def _noted(completion: Completion) -> Completion:
    """The completion, its notes with the names that parameters have here."""
    notes = completion.headrace.notes
    if not notes:
        return completion
    account = structs.replace(completion.headrace, notes=[renamed(note) for note in notes])
    return structs.replace(completion, headrace=account)
