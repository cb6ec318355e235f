"""The client's side of Ollama's API: pieces from the parts of an answer, and the lists of models. No I/O.

Source of the shapes: Ollama's API reference (`POST /api/chat`, `POST /api/generate`, `POST /api/embed`,
`GET /api/tags`, `GET /api/ps`, `POST /api/show`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec
from msgspec import Struct

from consumers.engines.server.errors import BadAnswer
from pipeline.core.server_pace import Timing
from pipeline.engine import Embedded, Piece
from pipeline.wire.answers import FinishReason, FunctionCall, TokenScore, ToolCall, Usage
from pipeline.wire.errors import quoted
from pipeline.wire.validation import UNREADABLE, explain

_T = TypeVar("_T")

_TOO_LONG = re.compile(r"context (length|size|window)|longer than the context|available context", re.IGNORECASE)
# Faults of a request that Ollama answers with status 500 or 501, the statuses of a server's own fault.
_BLAMES_REQUEST = re.compile(
    r"^(invalid format|invalid JSON schema|option \")|no input provided|does not support", re.IGNORECASE
)
_CHAT = "completion"
_TOOLS = "tools"
_THINKING = "thinking"
_VISION = "vision"
_EMBEDDING = "embedding"
_EMBEDDING_FAMILIES = frozenset({"bert", "nomic-bert"})
_SIZES = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


# ---- answers ---------------------------------------------------------------------------------------------------------


def _converted(answer: dict[str, Any], kind: type[_T]) -> _T:
    try:
        return msgspec.convert(answer, kind)
    except msgspec.ValidationError as error:
        problem = explain(error, kind, answer)
        raise BadAnswer(f"Ollama sent a malformed answer. {problem.sentence(whole='It')}") from None


def read_line(line: bytes) -> dict[str, Any]:
    """One line of a streamed answer; raises BadAnswer, which quotes a line that is not an object in JSON."""
    try:
        return msgspec.json.decode(line, type=dict[str, Any])
    except UNREADABLE:
        raise BadAnswer(
            f"Ollama sent a line that is not a JSON object: {quoted(line.decode(errors='replace'))}."
        ) from None


class _LineFunction(Struct):
    """A function that the model calls. Servers like Ollama send its arguments as a string, or leave them out."""

    name: str
    arguments: dict[str, Any] | str | None = None


class _LineCall(Struct):
    function: _LineFunction
    id: str | None = None


class _LineMessage(Struct):
    content: str | None = None
    thinking: str | None = None
    tool_calls: list[_LineCall] | None = None


class _AnswerLine(Struct):
    """One line of a streamed answer. Ollama leaves out fields that are zero or empty. null is read as left out, as
    Ollama's own client reads it.
    """

    message: _LineMessage | None = None
    response: str | None = None
    thinking: str | None = None
    logprobs: list[TokenScore] | None = None
    done: bool | None = None
    done_reason: str | None = None
    prompt_eval_count: int | None = None
    eval_count: int | None = None
    load_duration: int | None = None
    prompt_eval_duration: int | None = None
    eval_duration: int | None = None

    @property
    def timing(self) -> Timing:
        """The figures of a last line. Ollama counts nanoseconds."""
        return Timing(
            tokens=self.eval_count or 0,
            writing_s=(self.eval_duration or 0) / 1e9,
            prompt_tokens=self.prompt_eval_count or 0,
            reading_s=(self.prompt_eval_duration or 0) / 1e9,
            loading_s=(self.load_duration or 0) / 1e9,
        )


# The `done_reason` of an answer without a text: the model was loaded for it.
_LOADED = "load"
_NO_SCORES = "This server reports no log-probabilities. Ollama does from version 0.12.11."


class LineReader:
    """Turns the parts of one answer into pieces. Only its generation uses it.

    Args:
        request_id: the request's id.
        notes: for the last piece.
        scores: whether the request asks for log-probabilities.
        asks: whether there is something to answer. An empty prompt only loads the model.

    Attributes:
        timing: the server's figures, once its last part was read; None before.
    """

    def __init__(self, request_id: str, notes: Sequence[str] = (), *, scores: bool = False, asks: bool = True) -> None:
        self.timing: Timing | None = None
        self._unanswered = asks
        self._request_id = request_id
        self._notes = list(notes)
        self._waits_for_scores = scores
        self._calls = 0

    def read(self, part: dict[str, Any]) -> Piece:
        """A part of the answer as a piece.

        Raises:
            BadAnswer: the part does not have the shape of Ollama's, or is the end of an answer that has only loaded the
                model.
        """
        read = _converted(part, _AnswerLine)
        message = read.message or _LineMessage()
        piece = Piece(
            text=message.content or read.response or "",
            tool_calls=[self._tool_call(call) for call in message.tool_calls or ()],
            reasoning=message.thinking or read.thinking or "",
            scores=read.logprobs or [],
        )
        if piece.scores:
            self._waits_for_scores = False
        if piece.text or piece.tool_calls or piece.reasoning:
            self._unanswered = False
        if read.done:
            if self._unanswered and read.done_reason == _LOADED:
                raise BadAnswer("Ollama loaded the model and did not answer.")
            piece.notes = [*self._notes, *([_NO_SCORES] if self._waits_for_scores else [])]
            prompt, answer = read.prompt_eval_count or 0, read.eval_count or 0
            self.timing = read.timing
            piece.finish_reason = self._finish_reason(read.done_reason or "")
            piece.usage = Usage(prompt, answer, prompt + answer)
        return piece

    def _tool_call(self, call: _LineCall) -> ToolCall:
        self._calls += 1
        said = call.function.arguments
        arguments = said if isinstance(said, str) else msgspec.json.encode(said or {}).decode()
        # A client answers a call by its id. Ollama numbers its calls since 0.12.
        call_id = call.id or f"call_{self._request_id.replace('.', '_')}_{self._calls}"
        return ToolCall(FunctionCall(call.function.name, arguments or "{}"), id=call_id)

    def _finish_reason(self, done_reason: str) -> FinishReason:
        if done_reason == "length":
            return "length"
        return "tool_calls" if self._calls else "stop"


class _Embeddings(Struct):
    """The answer of `POST /api/embed`."""

    embeddings: list[list[float]]
    prompt_eval_count: int | None = None


def read_embedded(answer: dict[str, Any], texts: int) -> Embedded:
    """The vectors in an answer of `POST /api/embed`.

    Raises:
        BadAnswer: another shape, or not one vector for each text.
    """
    read = _converted(answer, _Embeddings)
    if len(read.embeddings) != texts:
        raise BadAnswer(f"Ollama sent {len(read.embeddings)} embeddings for {texts} texts.")
    return Embedded(read.embeddings, read.prompt_eval_count or 0)


def says_too_long(message: str) -> bool:
    """Whether an error of Ollama's means that the prompt exceeds the context. Ollama has no code for that."""
    return bool(_TOO_LONG.search(message))


def blames_request(message: str) -> bool:
    """Whether an error of Ollama's is the request's fault, whatever its status."""
    return says_too_long(message) or bool(_BLAMES_REQUEST.search(message))


def error_text(body: str) -> str:
    """The text of an error body: the `error` in Ollama's JSON, else the body. Cut after 300 characters."""
    try:
        text = msgspec.json.decode(body, type=dict[str, Any]).get("error")
    except UNREADABLE:
        text = None
    return (text if isinstance(text, str) and text else body)[:300]


# ---- models ----------------------------------------------------------------------------------------------------------


class _Details(Struct):
    """Servers like Ollama write null for what they do not know."""

    family: str | None = None
    format: str | None = None
    parameter_size: str | None = None
    quantization_level: str | None = None


class OllamaModel(Struct):
    """A model in Ollama's list. `size` is that of its files, in bytes. `capabilities` is None while they are not known:
    the list has them since Ollama 0.30, and `/api/show` before. `context_tokens` is the longest conversation, 0 while
    it is not known. `standin` is set by headrace's own stand-in alone.
    """

    name: str = ""
    digest: str | None = None
    size: int | None = None
    details: _Details | None = None
    capabilities: list[str] | None = None
    remote_host: str = ""
    standin: bool = False
    context_tokens: int = 0

    @property
    def identity(self) -> tuple[str, str]:
        """What tells its files from those of another version of it."""
        return self.name, self.digest or ""

    @property
    def chats(self) -> bool:
        """Whether it answers chats on this machine. Embedding models do not chat. Models that Ollama runs in a cloud
        are excluded: a request must not leave the machine because a queue is full.
        """
        if self.capabilities is not None:
            return self._is_here and _CHAT in self.capabilities
        return self._is_here and self.family not in _EMBEDDING_FAMILIES

    @property
    def embeds(self) -> bool:
        """Whether it makes embeddings on this machine, and does not chat."""
        if self.capabilities is not None:
            return self._is_here and _EMBEDDING in self.capabilities and _CHAT not in self.capabilities
        return self._is_here and self.family in _EMBEDDING_FAMILIES

    @property
    def _is_here(self) -> bool:
        return bool(self.name) and not self.remote_host

    @property
    def calls_tools(self) -> bool:
        """Whether the server reports that it calls tools."""
        return _TOOLS in (self.capabilities or ())

    @property
    def sees(self) -> bool:
        """Whether it may read images: the server says so, or is too old to say."""
        return self.capabilities is None or _VISION in self.capabilities

    def thinks(self, *, assumed: bool) -> bool:
        """Whether it can think before it answers; `assumed` where the server is too old to say."""
        return assumed if self.capabilities is None else _THINKING in self.capabilities

    @property
    def family(self) -> str:
        """The architecture, as Ollama names it."""
        return (self.details.family if self.details else None) or ""

    @property
    def parameters(self) -> float:
        """How many parameters it has ("7.6B"); 0 if that is not known."""
        written = ((self.details.parameter_size if self.details else None) or "").strip().upper()
        unit = _SIZES.get(written[-1:], 0.0)
        try:
            return max(0.0, float(written[:-1]) * unit)
        except ValueError:
            return 0.0


class _Tags(Struct):
    """The answer of `GET /api/tags`."""

    models: list[OllamaModel] | None = None


def read_models(answer: dict[str, Any]) -> list[OllamaModel]:
    """The models in an answer of `GET /api/tags`; raises BadAnswer for another shape."""
    return _converted(answer, _Tags).models or []


class _Shown(Struct):
    """The answer of `POST /api/show`. It has capabilities since Ollama 0.6.4."""

    capabilities: list[str] | None = None
    template: str | None = None
    model_info: dict[str, Any] | None = None


class ShownModel(NamedTuple):
    """What a server tells of one model. `capabilities` is None, and `context_tokens` 0, if it does not tell."""

    capabilities: list[str] | None
    context_tokens: int


def read_shown(answer: dict[str, Any]) -> ShownModel:
    """An answer of `POST /api/show`.

    Without a list of capabilities, the metadata of the model's file tell: Ollama runs a model with a pooling type as an
    embedding model, whatever its family, and every other one as a chat model.

    Raises:
        BadAnswer: another shape.
    """
    read = _converted(answer, _Shown)
    info = read.model_info or {}
    lengths = [value for key, value in info.items() if key.endswith(".context_length")]
    context = next((value for value in lengths if isinstance(value, int) and value > 0), 0)
    if read.capabilities is not None or not info:
        return ShownModel(read.capabilities, context)
    if any(key.endswith(".pooling_type") for key in info):
        return ShownModel([_EMBEDDING], context)
    return ShownModel([_CHAT, _TOOLS] if ".Tools" in (read.template or "") else [_CHAT], context)


class LoadedModel(Struct):
    """A model in the server's memory. `size_vram` is the part of it on a GPU, in bytes."""

    name: str = ""
    size_vram: int = 0


class _Loaded(Struct):
    """The answer of `GET /api/ps`."""

    models: list[LoadedModel] | None = None


def read_loaded(answer: dict[str, Any]) -> list[LoadedModel]:
    """The models in an answer of `GET /api/ps`; raises BadAnswer for another shape."""
    return _converted(answer, _Loaded).models or []
