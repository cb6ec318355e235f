"""The client's side of the API of llama.cpp's server: request bodies from work, pieces from the events of an answer.

Source of the shapes: llama.cpp's server documentation, `POST /v1/chat/completions` and `/v1/completions`. No I/O.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct, field

from pipeline.engine import Misbehaved, Piece, Work
from pipeline.wire.answers import FinishReason, FunctionCall, Logprobs, ToolCall, Usage
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatMessage, ChatRequest
from pipeline.wire.validation import UNREADABLE

# The sampler takes a seed of 32 bits, and the largest one draws one.
_SEED_MODULUS = 2**31
_DATA = b"data:"
_CHAT_PATH, _TEXT_PATH = "/v1/chat/completions", "/v1/completions"
_TOO_LONG = "exceed_context_size_error"
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty")
# Those of Ollama's options that the server has under the same name.
_OPTIONS = ("repeat_last_n", "typical_p", "mirostat", "mirostat_tau", "mirostat_eta")


def call_of(work: Work) -> tuple[str, dict[str, Any]]:
    """The path and the body of the call for work. Without a limit, the answer can fill the context."""
    if work.request.is_raw:
        return _TEXT_PATH, _body(work) | {"prompt": work.request.chat[0].text()}
    messages = [_message(turn) for turn in work.request.chat]
    return _CHAT_PATH, _body(work) | {"messages": messages} | _tools(work.request)


def _body(work: Work) -> dict[str, Any]:
    request = work.request
    body: dict[str, Any] = {
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_progress": True,
        "seed": work.seed % _SEED_MODULUS,
        "max_tokens": request.stated_limit or -1,
        "stop": request.stops,
    }
    body |= {name: value for name in _SAMPLING if (value := getattr(request, name)) is not None}
    if request.repetition_penalty is not None:
        body["repeat_penalty"] = request.repetition_penalty
    if request.ollama is not None:
        given = request.ollama.options
        body |= {name: given[name] for name in _OPTIONS if given.get(name) is not None}
    if request.alternatives is not None:
        body |= {"logprobs": True, "top_logprobs": request.alternatives}
    if request.logit_bias:
        body["logit_bias"] = [[int(token), value] for token, value in request.logit_bias.items()]
    if (form := request.response_format) is not None and form.type != "text":
        body["response_format"] = msgspec.to_builtins(form)
    return body


def _message(turn: ChatMessage) -> dict[str, Any]:
    message = {"role": "system" if turn.role == "developer" else turn.role, "content": turn.text()}
    if turn.tool_calls:
        message["tool_calls"] = msgspec.to_builtins(turn.tool_calls)
    if turn.tool_call_id:
        message["tool_call_id"] = turn.tool_call_id
    return message


def _tools(request: ChatRequest) -> dict[str, Any]:
    if not request.tools or request.tool_choice == "none":
        return {}
    tools: dict[str, Any] = {"tools": msgspec.to_builtins(request.tools)}
    if request.tool_choice is not None:
        tools["tool_choice"] = msgspec.to_builtins(request.tool_choice)
    return tools


class _Function(Struct):
    name: str | None = None
    arguments: str | None = None


class _CallPart(Struct):
    index: int = 0
    id: str | None = None
    function: _Function = field(default_factory=_Function)


class _Part(Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_CallPart] | None = None


class _Choice(Struct):
    """A choice of a chat has a `delta`, one of a completion a `text`."""

    text: str = ""
    delta: _Part = field(default_factory=_Part)
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None


class _Usage(Struct):
    prompt_tokens: int
    completion_tokens: int


class _Problem(Struct):
    message: str = ""
    type: str = ""
    code: int = 500


class _Progress(Struct):
    """Tokens of the prompt. The first event comes before the first step, the last one after the last."""

    total: int = 0
    processed: int = 0

    @property
    def goes_on(self) -> bool:
        return 0 < self.processed < self.total


class _Event(Struct):
    """One event of a streamed answer, or the body of an error."""

    choices: list[_Choice] = field(default_factory=list)
    usage: _Usage | None = None
    prompt_progress: _Progress | None = None
    error: _Problem | None = None


_decoder = msgspec.json.Decoder(_Event)


class EventReader:
    """Turns the lines of one streamed answer into pieces. Only its generation uses it."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._calls: dict[int, ToolCall] = {}
        self._finish_reason: FinishReason | None = None

    def read(self, line: bytes) -> Piece | None:
        """The piece that a line adds, if any. It is empty after a step of a long prompt. The last one has the counts.

        Raises:
            HeadraceError: the line is an error, or is not the server's.
        """
        if not line.startswith(_DATA) or line.endswith(b"[DONE]"):
            return None
        event = _decoded(line[len(_DATA) :])
        if event.error is not None:
            raise _error(event.error)
        piece = Piece()
        for choice in event.choices:
            piece.text += choice.delta.content or choice.text
            piece.reasoning += choice.delta.reasoning_content or ""
            piece.scores += choice.logprobs.content if choice.logprobs else []
            for part in choice.delta.tool_calls or ():
                self._add(part)
            self._finish_reason = choice.finish_reason or self._finish_reason
        if event.usage is None or self._finish_reason is None:
            reads = event.prompt_progress is not None and event.prompt_progress.goes_on
            return piece if piece.text or piece.reasoning or piece.scores or reads else None
        prompt, answer = event.usage.prompt_tokens, event.usage.completion_tokens
        piece.tool_calls = list(self._calls.values())
        piece.finish_reason, piece.usage = self._finish_reason, Usage(prompt, answer, prompt + answer)
        return piece

    def _add(self, part: _CallPart) -> None:
        """A call comes in parts: its name, then pieces of its arguments."""
        own = f"call_{self._request_id.replace('.', '_')}_{part.index + 1}"
        new = ToolCall(FunctionCall("", ""), id=part.id or own)
        call = self._calls.setdefault(part.index, new)
        call.function.name += part.function.name or ""
        call.function.arguments += part.function.arguments or ""


def refusal(body: bytes) -> HeadraceError:
    """The error in the body of a response with an error status."""
    return _error(_decoded(body).error or _Problem(body[:200].decode(errors="replace")))


def _decoded(data: bytes) -> _Event:
    try:
        return _decoder.decode(data)
    except UNREADABLE as error:
        raise Misbehaved(f"llama.cpp sent a malformed answer: {error}.") from None


def _error(problem: _Problem) -> HeadraceError:
    if problem.type == _TOO_LONG:
        return HeadraceError(ErrorCode.CONTEXT_LENGTH_EXCEEDED, problem.message, param="messages")
    if 400 <= problem.code < 500:
        return HeadraceError(ErrorCode.INVALID_REQUEST, problem.message)
    return Misbehaved(f"llama.cpp failed: {problem.message}")
