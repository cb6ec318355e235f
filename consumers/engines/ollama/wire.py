"""The client's side of Ollama's API: request bodies from work, pieces from the parts of an answer. No I/O.

Options and tool calls are translated by `pipeline.wire.ollama`. Source of the shapes: Ollama's API reference
(`POST /api/chat`, `POST /api/embed`, `GET /api/tags`, `GET /api/ps`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from pipeline.core.server_pace import Timing
from pipeline.engine import Embedded, Piece, Work
from pipeline.wire.errors import quoted
from pipeline.wire.messages import FinishReason, FunctionCall, ToolCall, Usage
from pipeline.wire.ollama import format_of, write_call, write_options
from pipeline.wire.requests import ChatMessage, EmbeddingRequest
from pipeline.wire.validation import explain

_T = TypeVar("_T")

# Ollama's sampler takes a seed of 32 bits, and -1 draws one.
_SEED_MODULUS = 2**31
_TOO_LONG = re.compile(r"context (length|size|window)|longer than the context|available context", re.IGNORECASE)
# Faults of a request that Ollama answers with status 500 or 501, the statuses of a server's own fault.
_BLAMES_REQUEST = re.compile(
    r"^(invalid format|invalid JSON schema|option \")|no input provided|does not support", re.IGNORECASE
)
_CHAT = "completion"
_TOOLS = "tools"
_EMBEDDING = "embedding"
_EMBEDDING_FAMILIES = frozenset({"bert", "nomic-bert"})


# ---- requests --------------------------------------------------------------------------------------------------------


def chat_body(work: Work, *, default_max_tokens: int) -> dict[str, Any]:
    """The body of `POST /api/chat` for work.

    Ollama must refuse a prompt that does not fit, and not cut it (`truncate`, `shift`). Thinking is off: it would use
    up the answer's tokens, and the client would not see it.

    Raises:
        HeadraceError: `invalid_request`: the arguments of a tool call in the conversation are not a JSON object.
    """
    request = work.request
    body: dict[str, Any] = {
        "model": work.model,
        "messages": _messages(request.chat),
        "stream": True,
        "think": False,
        "truncate": False,
        "shift": False,
        "options": {
            "num_predict": default_max_tokens,
            **write_options(request),
            "seed": work.seed % _SEED_MODULUS,
        },
    }
    if request.tools and request.tool_choice != "none":
        body["tools"] = msgspec.to_builtins(request.tools)
    if (form := format_of(request.response_format)) is not None:
        body["format"] = form
    return body


def embed_body(request: EmbeddingRequest, model: str) -> dict[str, Any]:
    """The body of `POST /api/embed` for a request."""
    body: dict[str, Any] = {"model": model, "input": request.texts}
    if request.dimensions is not None:
        body["dimensions"] = request.dimensions
    if request.truncate is not None:
        body["truncate"] = request.truncate
    return body


def _messages(chat: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """The conversation. A tool's result has its tool's name at Ollama and its call's id at OpenAI, hence `names`."""
    names: dict[str, str] = {}
    messages = []
    for turn in chat:
        message: dict[str, Any] = {
            "role": "system" if turn.role == "developer" else turn.role,
            "content": turn.text(),
        }
        if turn.tool_calls:
            names |= {call.id: call.function.name for call in turn.tool_calls}
            calls = [write_call(index, call.id, call.function) for index, call in enumerate(turn.tool_calls)]
            message["tool_calls"] = msgspec.to_builtins(calls)
        if turn.role == "tool":
            message["tool_name"] = names.get(turn.tool_call_id or "", turn.name or "")
            message["tool_call_id"] = turn.tool_call_id or ""
        messages.append(message)
    return messages


# ---- answers ---------------------------------------------------------------------------------------------------------


class BadAnswer(ValueError):
    """An answer of the server that is not Ollama's. The message is a sentence."""


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
    except (msgspec.DecodeError, UnicodeError, RecursionError):
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
    tool_calls: list[_LineCall] | None = None


class _AnswerLine(Struct):
    """One line of a streamed answer. Ollama leaves out fields that are zero or empty. null is read as left out, as
    Ollama's own client reads it.
    """

    message: _LineMessage | None = None
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


class PartReader:
    """Turns the parts of one answer into pieces. Only its generation uses it.

    Attributes:
        timing: the server's figures, once its last part was read; None before.
    """

    def __init__(self, request_id: str) -> None:
        self.timing: Timing | None = None
        self._request_id = request_id
        self._calls = 0

    def read(self, part: dict[str, Any]) -> Piece:
        """A part of the answer as a piece.

        Raises:
            BadAnswer: the part does not have the shape of Ollama's.
        """
        read = _converted(part, _AnswerLine)
        message = read.message or _LineMessage()
        piece = Piece(
            text=message.content or "", tool_calls=[self._tool_call(call) for call in message.tool_calls or ()]
        )
        if read.done:
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
        call_id = call.id or f"call_{self._request_id}_{self._calls}"
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


def join(first: Piece, then: Piece) -> Piece:
    """Two consecutive pieces as one."""
    return Piece(
        text=first.text + then.text,
        tool_calls=first.tool_calls + then.tool_calls,
        finish_reason=then.finish_reason,
        usage=then.usage,
    )


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
    except (msgspec.DecodeError, UnicodeError):
        text = None
    return (text if isinstance(text, str) and text else body)[:300]


# ---- models ----------------------------------------------------------------------------------------------------------


class _Details(Struct):
    family: str = ""


class OllamaModel(Struct):
    """A model in Ollama's list. `capabilities` is None if the server is too old to report them. `standin` is set by
    headrace's own stand-in alone.
    """

    name: str = ""
    details: _Details | None = None
    capabilities: list[str] | None = None
    remote_host: str = ""
    standin: bool = False

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
    def family(self) -> str:
        """The architecture, as Ollama names it."""
        return self.details.family if self.details else ""


class _Tags(Struct):
    """The answer of `GET /api/tags`."""

    models: list[OllamaModel] | None = None


def read_models(answer: dict[str, Any]) -> list[OllamaModel]:
    """The models in an answer of `GET /api/tags`; raises BadAnswer for another shape."""
    return _converted(answer, _Tags).models or []


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
