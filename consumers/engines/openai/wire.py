"""The client's side of OpenAI's API: pieces from the events of an answer, embeddings, and errors. No I/O.

Source of the shapes: the OpenAI API reference (`POST /v1/chat/completions` and `POST /v1/completions` streamed,
`POST /v1/embeddings`), and what `mlx_lm.server`, vLLM and llama.cpp's server add to it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from consumers.engines.openai.resuming import Beginning
from consumers.engines.openai.scores import read_scores
from consumers.engines.server.errors import BadAnswer, ServerError
from consumers.engines.server.plain import NO_CALL
from pipeline.core.server_pace import Timing
from pipeline.engine import Embedded, Piece
from pipeline.wire.answers import CompletionDetails, FinishReason, FunctionCall, PromptDetails, ToolCall, Usage
from pipeline.wire.errors import quoted
from pipeline.wire.validation import UNREADABLE, explain

_T = TypeVar("_T")

_NO_SCORES = "The server reports no log-probabilities."
_NO_COUNTS = "The server reports no token counts: `usage` counts the parts of the answer."
_NOT_JSON = "The answer is not JSON: the server ignored `response_format`."
_NO_CHOICE = "The answer is none of the choices: the server ignored `structured_outputs`."
_LONGEST_ERROR = 300
# Reasons of vLLM and SGLang for an answer that they have given up.
_GIVEN_UP = frozenset({"abort", "error"})


def converted(answer: Any, kind: type[_T]) -> _T:
    """An answer in the shape of kind; raises BadAnswer."""
    try:
        return msgspec.convert(answer, kind, strict=False)
    except msgspec.ValidationError as error:
        problem = explain(error, kind, answer)
        raise BadAnswer(f"The server sent a malformed answer. {problem.sentence(whole='It')}") from None


# ---- answers ---------------------------------------------------------------------------------------------------------


class _DeltaFunction(Struct):
    """A part of a call. Some servers send the arguments as an object. null is read as left out, here and below."""

    name: str | None = None
    arguments: str | dict[str, Any] | None = None


class _DeltaCall(Struct):
    index: int | None = None
    id: str | None = None
    function: _DeltaFunction | None = None


class _AnswerDelta(Struct):
    """What an event adds. Servers name a model's thoughts in one of two ways, and some in both."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_DeltaCall] | None = None

    @property
    def thoughts(self) -> str:
        return self.reasoning_content or self.reasoning or ""


class _DeltaChoice(Struct):
    """`stop_reason` is vLLM's: the stop string that ended the answer, or the number of a token."""

    delta: _AnswerDelta | None = None
    text: str | None = None
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None
    stop_reason: Any = None


class _Cached(Struct):
    cached_tokens: int | None = None


class _Thought(Struct):
    reasoning_tokens: int | None = None


class _Counts(Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Cached | None = None
    completion_tokens_details: _Thought | None = None

    @property
    def cached_tokens(self) -> int:
        """The tokens of the prompt that were found in a cache."""
        details = self.prompt_tokens_details or _Cached()
        return min(max(0, details.cached_tokens or 0), self.prompt_tokens)

    @property
    def thought(self) -> CompletionDetails | msgspec.UnsetType:
        """The tokens of reasoning, if the server tells them."""
        details = self.completion_tokens_details or _Thought()
        return msgspec.UNSET if details.reasoning_tokens is None else CompletionDetails(details.reasoning_tokens)


class _AnswerEvent(Struct):
    choices: list[_DeltaChoice] | None = None
    usage: _Counts | None = None


class DeltaReader:
    """Turns the events of one answer into pieces. Only its generation uses it.

    Args:
        request_id: the request's id.
        notes: for the last piece.
        scores: whether the request asks for log-probabilities.
        form: whether the request asks for JSON.
        choices: the texts of which the request asks for one.
        forced: whether the request asks for a tool call.

    Attributes:
        timing: the counts of the answer, once it was read; the server measures no times.
        beginning: what another attempt has written; None for a new answer. The parts' generator sets it.
    """

    def __init__(
        self,
        request_id: str,
        notes: Sequence[str] = (),
        *,
        scores: bool = False,
        form: bool = False,
        choices: Collection[str] = (),
        forced: bool = False,
    ) -> None:
        self.timing: Timing | None = None
        self.beginning: Beginning | None = None
        self._request_id = request_id
        self._notes = list(notes)
        self._waits_for_scores = scores
        self._form = form
        self._choices = choices
        self._forced = forced
        self._text: list[str] = []
        self._calls: list[ToolCall] = []
        self._numbered: dict[int, ToolCall] = {}
        self._parts = 0
        self._finish_reason: FinishReason | None = None
        self._stop = ""
        self._counts: _Counts | None = None

    def read(self, part: dict[str, Any]) -> Piece:
        """An event as a piece. The empty object is the end of the stream: it makes the last piece.

        Raises:
            BadAnswer: the event does not have the shape of OpenAI's, or the answer was given up or has no end.
            HeadraceError: the answer does not begin as the other attempt wrote it.
        """
        event = converted(part, _AnswerEvent)
        self._counts = event.usage or self._counts
        piece = Piece()
        for choice in event.choices or ():
            delta = choice.delta or _AnswerDelta()
            piece.text += delta.content or choice.text or ""
            piece.reasoning += delta.thoughts
            piece.scores += read_scores(choice.logprobs)
            for call in delta.tool_calls or ():
                self._add(call)
            self._note_finish(choice)
        self._parts += bool(piece.text or piece.reasoning)
        self._waits_for_scores = self._waits_for_scores and not piece.scores
        self._text.append(piece.text)
        if self.beginning is not None:
            self.beginning.cut(piece)
        if not part or (self._finish_reason is not None and self._counts is not None):
            self._end(piece)
        return piece

    def _note_finish(self, choice: _DeltaChoice) -> None:
        if choice.finish_reason in _GIVEN_UP:
            raise BadAnswer(f"The server gave the answer up: its `finish_reason` is `{choice.finish_reason}`.")
        if choice.finish_reason:  # some servers write an empty one before the end
            self._finish_reason = "length" if choice.finish_reason == "length" else "stop"
            self._stop = choice.stop_reason if isinstance(choice.stop_reason, str) else ""

    def _end(self, piece: Piece) -> None:
        if self._finish_reason is None:
            raise BadAnswer("The answer ended without a `finish_reason`.")
        counts, notes = self._counts, self._notes
        if counts is None:
            counts = _Counts(completion_tokens=self._parts)
            notes = [*notes, _NO_COUNTS]
        if self.beginning is not None:
            self.beginning.check_reached()
        self.timing = Timing(counts.completion_tokens, None, prompt_tokens=counts.prompt_tokens - counts.cached_tokens)
        earlier = self.beginning.prompted_tokens if self.beginning is not None else 0
        prompt, answer = max(0, counts.prompt_tokens - earlier), counts.completion_tokens + earlier
        for call in self._calls if self._finish_reason == "stop" else ():
            call.function.arguments = call.function.arguments or "{}"
        piece.tool_calls = self._calls
        piece.finish_reason = "tool_calls" if self._calls and self._finish_reason == "stop" else self._finish_reason
        piece.stop = self._stop
        piece.usage = Usage(
            prompt, answer, prompt + answer, PromptDetails(min(counts.cached_tokens, prompt)), counts.thought
        )
        piece.notes = [*notes, *self._ignored()]

    def _ignored(self) -> list[str]:
        """Notes on what the request asks for and the server did not do."""
        ended, text = self._finish_reason == "stop", "".join(self._text)
        notes = {
            _NO_SCORES: self._waits_for_scores,
            _NOT_JSON: self._form and ended and not self._calls and not _is_json(text),
            _NO_CHOICE: bool(self._choices) and ended and text.strip() not in self._choices,
            NO_CALL: self._forced and ended and not self._calls,
        }
        return [note for note, applies in notes.items() if applies]

    def _add(self, part: _DeltaCall) -> None:
        """A call comes in parts: its name, then pieces of its arguments.

        A part without an index begins a call, and so does another name with another id: servers number their calls from
        0 or from 1, or all as 0.
        """
        number = len(self._calls) if part.index is None else part.index
        call, function = self._numbered.get(number), part.function or _DeltaFunction()
        said = function.arguments
        if call is None or part.index is None or _is_another(part, call):
            call = ToolCall(FunctionCall("", ""), id=f"call_{self._request_id}_{len(self._calls) + 1}")
            self._calls.append(call)
            self._numbered[number] = call
        call.id = part.id or call.id
        call.function.name += function.name or ""
        call.function.arguments += said if isinstance(said, str) else msgspec.json.encode(said).decode() if said else ""


def _is_another(part: _DeltaCall, call: ToolCall) -> bool:
    """Whether a part begins another call than the one with its number. Some servers give each part an id of its own."""
    named = part.function is not None and part.function.name and call.function.name
    return bool(named and part.id and part.id != call.id)


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text.encode(errors="replace"))
    except UNREADABLE:
        return False
    return True


class _Vector(Struct):
    embedding: list[float]
    index: int


class _Vectors(Struct):
    """The answer of `POST /v1/embeddings`."""

    data: list[_Vector]
    usage: _Counts | None = None


def read_vectors(answer: dict[str, Any], texts: int) -> Embedded:
    """The vectors in an answer of `POST /v1/embeddings`, in the order of the texts.

    Raises:
        BadAnswer: another shape, or not one vector for each text.
    """
    read = converted(answer, _Vectors)
    vectors = {each.index: each.embedding for each in read.data}
    if sorted(vectors) != list(range(texts)):
        raise BadAnswer(f"The server sent {len(read.data)} embeddings for {texts} texts.")
    return Embedded([vectors[index] for index in range(texts)], (read.usage or _Counts()).prompt_tokens)


class _WholeAnswer(Struct):
    usage: _Counts


def read_prompt_tokens(answer: dict[str, Any]) -> int:
    """How many tokens the prompt of a whole answer has; raises BadAnswer."""
    return converted(answer, _WholeAnswer).usage.prompt_tokens


# ---- errors ----------------------------------------------------------------------------------------------------------


class _Fault(Struct):
    """OpenAI's error. Servers put words or numbers in its `code`."""

    message: str | None = None
    type: str | None = None
    code: str | int | None = None
    param: str | None = None


class _ErrorBody(Struct):
    """An error as servers write it: OpenAI's object, a text in its place, or one of a web framework's."""

    error: _Fault | str | None = None
    message: str | None = None
    detail: Any = None


def read_error(body: bytes, status: int | None, *, away: bool = False) -> ServerError:
    """The error in the body of a response, or in an event of a stream. Long texts are cut."""
    try:
        said = msgspec.json.decode(body, type=_ErrorBody, strict=False)
    except UNREADABLE:
        said = _ErrorBody(message=body.decode(errors="replace").strip())
    fault = said.error if isinstance(said.error, _Fault) else _Fault(said.error)
    text = fault.message or said.message or _words(said.detail) or f"status {status}"
    code = str(fault.code or "")
    if status is None and code.isdecimal():
        status = int(code)
    return ServerError(text[:_LONGEST_ERROR], status, away=away, code=code or fault.type or "", param=fault.param)


def _words(detail: Any) -> str:
    return detail if isinstance(detail, str) else msgspec.json.encode(detail).decode() if detail else ""


def read_event(line: bytes) -> dict[str, Any] | None:
    """The object in a line of a stream of events; the empty object for its end; None for a line without data.

    Raises:
        BadAnswer: the data are not an object in JSON.
        ServerError: they are an error.
    """
    if not line.startswith(b"data:"):
        return None
    data = line[len(b"data:") :].strip()
    if data == b"[DONE]":
        return {}
    try:
        event = msgspec.json.decode(data, type=dict[str, Any])
    except UNREADABLE:
        text = quoted(data.decode(errors="replace"))
        raise BadAnswer(f"The server sent an event that is not a JSON object: {text}.") from None
    if event.get("error"):
        raise read_error(data, None)
    return event
