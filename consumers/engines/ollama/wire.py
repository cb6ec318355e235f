"""Between the pipeline's words and those of Ollama's API: bodies out, parts in. No I/O.

Source of the shapes: Ollama's API reference (`POST /api/chat`, `POST /api/embed`, `GET /api/tags`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct, field

from pipeline.engine import Embedded, Piece, Work
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import FinishReason, FunctionCall, ToolCall, Usage
from pipeline.wire.requests import ChatMessage, ChatRequest, EmbeddingRequest

# Ollama hands the seed to a sampler of 32 bits and reads -1 as "draw one".
_SEED_MODULUS = 2**31
_TOO_LONG = re.compile(r"context (length|size|window)|longer than the context|available context", re.IGNORECASE)
# Faults of a request that Ollama answers with status 500 or 501, as if they were its own.
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

    Nothing is cut silently: a prompt that does not fit is to be refused (`truncate`, `shift`), and thinking is off,
    because it would use up the answer's tokens and nobody is shown it.

    Raises:
        HeadraceError: `invalid_request` for a tool call in the conversation whose arguments are no JSON object.
    """
    request = work.request
    body: dict[str, Any] = {
        "model": work.model,
        "messages": _messages(request.chat),
        "stream": True,
        "think": False,
        "truncate": False,
        "shift": False,
        "options": _options(work, default_max_tokens),
    }
    if request.tools and request.tool_choice != "none":
        body["tools"] = msgspec.to_builtins(request.tools)
    if (form := _format(request)) is not None:
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
    """The conversation. A tool's result names its tool at Ollama, and its call's id at OpenAI: hence the memory."""
    names: dict[str, str] = {}
    messages = []
    for turn in chat:
        message: dict[str, Any] = {
            "role": "system" if turn.role == "developer" else turn.role,
            "content": turn.text(),
        }
        if turn.tool_calls:
            names |= {call.id: call.function.name for call in turn.tool_calls}
            message["tool_calls"] = [_call_out(index, call) for index, call in enumerate(turn.tool_calls)]
        if turn.role == "tool":
            message["tool_name"] = names.get(turn.tool_call_id or "", turn.name or "")
            message["tool_call_id"] = turn.tool_call_id or ""
        messages.append(message)
    return messages


def _call_out(index: int, call: ToolCall) -> dict[str, Any]:
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeError) as error:
        raise HeadraceError(
            ErrorCode.INVALID_REQUEST,
            f"the arguments of the tool call {call.function.name[:80]!r} are no JSON object: {error}",
            param="messages",
        ) from None
    return {"id": call.id, "function": {"index": index, "name": call.function.name, "arguments": arguments}}


def _options(work: Work, default_max_tokens: int) -> dict[str, Any]:
    """What the request sets; the rest is the model's own, as its Modelfile has it."""
    request = work.request
    options = {
        "seed": work.seed % _SEED_MODULUS,
        "num_predict": request.token_limit or default_max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "min_p": request.min_p,
        "repeat_penalty": request.repetition_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "stop": request.stops or None,
    }
    return {name: value for name, value in options.items() if value is not None}


def _format(request: ChatRequest) -> str | dict[str, Any] | None:
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_schema" and wanted.json_schema is not None and wanted.json_schema.schema:
        return wanted.json_schema.schema
    return "json"


# ---- answers ---------------------------------------------------------------------------------------------------------


class _Function(Struct):
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


class _Call(Struct):
    function: _Function
    id: str = ""


class _Message(Struct):
    content: str = ""
    tool_calls: list[_Call] | None = None


class _Part(Struct):
    """One line of a streamed answer. Ollama leaves out what is zero or empty."""

    message: _Message = field(default_factory=_Message)
    done: bool = False
    done_reason: str = ""
    prompt_eval_count: int = 0
    eval_count: int = 0


class Reader:
    """Turns the parts of one answer into pieces. Its generation is its only user."""

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._calls = 0

    def read(self, part: dict[str, Any]) -> Piece:
        """The piece that a part of the answer is.

        Raises:
            msgspec.ValidationError: a part of another shape than Ollama's.
        """
        read = msgspec.convert(part, _Part)
        piece = Piece(
            text=read.message.content, tool_calls=[self._call(call) for call in read.message.tool_calls or ()]
        )
        if read.done:
            piece.finish_reason = self._finish_reason(read.done_reason)
            piece.usage = Usage(read.prompt_eval_count, read.eval_count, read.prompt_eval_count + read.eval_count)
        return piece

    def _call(self, call: _Call) -> ToolCall:
        self._calls += 1
        arguments = msgspec.json.encode(call.function.arguments).decode()
        # Ollama did not number its calls before 0.12, and clients answer a call by its id.
        name = call.id or f"call_{self._request_id}_{self._calls}"
        return ToolCall(FunctionCall(call.function.name, arguments), id=name)

    def _finish_reason(self, done_reason: str) -> FinishReason:
        if done_reason == "length":
            return "length"
        return "tool_calls" if self._calls else "stop"


class _Embeddings(Struct):
    """The answer of `POST /api/embed`."""

    embeddings: list[list[float]]
    prompt_eval_count: int = 0


def read_embedded(answer: dict[str, Any], texts: int) -> Embedded:
    """The vectors in an answer of `POST /api/embed`; raises msgspec.ValidationError for none, or others than asked."""
    read = msgspec.convert(answer, _Embeddings)
    if len(read.embeddings) != texts:
        raise msgspec.ValidationError(f"{len(read.embeddings)} vectors for {texts} texts")
    return Embedded(read.embeddings, read.prompt_eval_count)


def join(first: Piece, then: Piece) -> Piece:
    """Two pieces that follow each other, as one."""
    return Piece(
        text=first.text + then.text,
        tool_calls=first.tool_calls + then.tool_calls,
        finish_reason=then.finish_reason,
        usage=then.usage,
    )


def says_too_long(message: str) -> bool:
    """Whether an error of Ollama's says that the prompt exceeds the context; it has no code of its own for that."""
    return bool(_TOO_LONG.search(message))


def blames_request(message: str) -> bool:
    """Whether an error of Ollama's speaks of the request, whatever its status says."""
    return says_too_long(message) or bool(_BLAMES_REQUEST.search(message))


def error_text(body: str) -> str:
    """What an error body says: the `error` of Ollama's JSON, else the body, shortened."""
    try:
        text = msgspec.json.decode(body, type=dict[str, Any]).get("error")
    except (msgspec.DecodeError, UnicodeError):
        text = None
    return (text if isinstance(text, str) and text else body)[:300]


# ---- models ----------------------------------------------------------------------------------------------------------


class _Details(Struct):
    family: str = ""


class Model(Struct):
    """A model in Ollama's list. `capabilities` is None where the server is too old to say."""

    name: str = ""
    details: _Details | None = None
    capabilities: list[str] | None = None
    remote_host: str = ""

    @property
    def chats(self) -> bool:
        """Whether it answers chats on this machine: no embedding model, and none that Ollama runs in a cloud, since a
        request must not leave the machine because a queue was full.
        """
        if self.capabilities is not None:
            return self._is_here and _CHAT in self.capabilities
        return self._is_here and self.family not in _EMBEDDING_FAMILIES

    @property
    def embeds(self) -> bool:
        """Whether it is on this machine for embeddings, and nothing else."""
        if self.capabilities is not None:
            return self._is_here and _EMBEDDING in self.capabilities and _CHAT not in self.capabilities
        return self._is_here and self.family in _EMBEDDING_FAMILIES

    @property
    def _is_here(self) -> bool:
        return bool(self.name) and not self.remote_host

    @property
    def calls_tools(self) -> bool:
        """Whether the server says that it calls tools."""
        return _TOOLS in (self.capabilities or ())

    @property
    def family(self) -> str:
        """The architecture, as Ollama names it."""
        return self.details.family if self.details else ""


class ModelList(Struct):
    """The answer of `GET /api/tags`."""

    models: list[Model] | None = None


def read_models(answer: dict[str, Any]) -> list[Model]:
    """The models in an answer of `GET /api/tags`; raises msgspec.ValidationError for another shape."""
    return msgspec.convert(answer, ModelList).models or []
