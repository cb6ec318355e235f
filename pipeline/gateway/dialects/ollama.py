"""Ollama's dialect: its requests as the pipeline's, the pipeline's answers as its responses. No I/O.

The shapes are in `pipeline.wire.ollama`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET

from pipeline.gateway.dialects.shapes import Asked, decode_body, expected
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import AssistantMessage, Chunk, Completion, EmbeddingList, ErrorBody, FunctionCall, Success
from pipeline.wire.ollama import (
    FOR_EVER,
    CallOut,
    ChatBody,
    EmbedBody,
    EmbeddingBody,
    FunctionOut,
    GenerateBody,
    Message,
    Part,
    ShowBody,
    response_format,
    time_text,
)
from pipeline.wire.requests import decode_chat, decode_embedding

NDJSON = "application/x-ndjson"
# The version of Ollama's API that is spoken here: clients look at it to know what they may ask for.
API_VERSION = "0.12.0"
_NS_PER_MS = 1_000_000

# ---- requests --------------------------------------------------------------------------------------------------------


def read_chat(body: bytes, max_body_bytes: int, listed: Sequence[str] = ()) -> Asked | Loaded:
    """The body of `POST /api/chat`; one without messages only asks that the model be there.

    Raises:
        HeadraceError: as `decode_chat`.
    """
    chat = decode_body(body, ChatBody)
    if not chat.messages:
        return Loaded(spelled(chat.model, listed), "chat", unload=chat.keep_alive in (0, "0", "0s"))
    return _asked(chat, Chat(chat.model), max_body_bytes, listed)


def read_generate(body: bytes, max_body_bytes: int, listed: Sequence[str] = ()) -> Asked | Loaded:
    """The body of `POST /api/generate`; one without a prompt only asks that the model be there.

    Raises:
        HeadraceError: as `decode_chat`.
    """
    given = decode_body(body, GenerateBody)
    if not given.prompt:
        return Loaded(spelled(given.model, listed), "generate", unload=given.keep_alive in (0, "0", "0s"))
    return _asked(given, Generate(given.model), max_body_bytes, listed)


def read_embed(body: bytes, max_body_bytes: int, listed: Sequence[str] = ()) -> Asked | Loaded:
    """The body of `POST /api/embed`; one without a text only asks that the model be there.

    Raises:
        HeadraceError: as `decode_embedding`.
    """
    given = decode_body(body, EmbedBody)
    if not given.input:
        return Loaded(spelled(given.model, listed), "embed", unload=False)
    fields = {"input": given.input, "dimensions": given.dimensions, "truncate": given.truncate}
    return _embedded(given.model, fields, Embed(given.model), max_body_bytes, listed)


def read_embedding(body: bytes, max_body_bytes: int, listed: Sequence[str] = ()) -> Asked | Loaded:
    """The body of `POST /api/embeddings`, which came before `embed` and takes one text.

    Raises:
        HeadraceError: as `decode_embedding`.
    """
    given = decode_body(body, EmbeddingBody)
    if not given.prompt:
        return Loaded(spelled(given.model, listed), "embedding", unload=False)
    return _embedded(given.model, {"input": given.prompt}, Embedding(given.model), max_body_bytes, listed)


def _embedded(model: str, fields: dict[str, Any], shape: Chat, max_body_bytes: int, listed: Sequence[str]) -> Asked:
    if model:
        fields["model"] = spelled(model, listed)
    written = msgspec.json.encode(fields)
    return Asked(decode_embedding(written, max_body_bytes=max_body_bytes), written, shape, stream=False)


def read_show(body: bytes) -> str:
    """The model that `POST /api/show` asks for."""
    given = decode_body(body, ShowBody)
    if not (given.model or given.name):
        raise HeadraceError(ErrorCode.INVALID_REQUEST, "model is required", param="model")
    return given.model or given.name


def _asked(body: ChatBody | GenerateBody, shape: Chat, max_body_bytes: int, listed: Sequence[str]) -> Asked:
    for name, feature in body.unsupported().items():
        raise HeadraceError(
            ErrorCode.UNSUPPORTED_PARAMETER, f"{body.model or 'the model'} does not support {feature}", param=name
        )
    fields = body.fields() | _options(body.options or {})
    fields["stream"] = body.stream is not False
    if body.model:
        fields["model"] = spelled(body.model, listed)
    try:
        form = response_format(body.format)
    except ValueError as error:
        raise HeadraceError(ErrorCode.INVALID_REQUEST, f"`format`: {error}", param="format") from None
    if form is not None:
        fields["response_format"] = form
    # Written and read once more, so that everything is checked in one place.
    written = msgspec.json.encode(fields)
    request = decode_chat(written, max_body_bytes=max_body_bytes)
    return Asked(request, written, shape, stream=request.streams)


def _as_given(value: Any) -> Any:
    return value


def _limit(value: Any) -> Any:
    """No limit is Ollama's 0, its -1, and its -2 (until the context is full)."""
    return None if isinstance(value, int | float) and value <= 0 else _whole(value)


def _whole(value: Any) -> Any:
    """Clients in whose language all numbers are of one kind write 5.0, which Ollama takes for 5."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _seed(value: Any) -> Any:
    return None if value == -1 else _whole(value)


def _top_k(value: Any) -> Any:
    """All tokens are Ollama's 0, and whatever is below."""
    return 0 if isinstance(value, int | float) and value < 0 else _whole(value)


def _stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    return [stop for stop in stops if stop] if isinstance(stops, list) else stops


# Each option that is understood: the request's field, and how its value is carried over. Others are ignored, as Ollama
# ignores those of other engines.
_OPTIONS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "num_predict": ("max_tokens", _limit),
    "seed": ("seed", _seed),
    "stop": ("stop", _stops),
    "temperature": ("temperature", _as_given),
    "top_p": ("top_p", _as_given),
    "top_k": ("top_k", _top_k),
    "min_p": ("min_p", _as_given),
    "repeat_penalty": ("repetition_penalty", _as_given),
    "presence_penalty": ("presence_penalty", _as_given),
    "frequency_penalty": ("frequency_penalty", _as_given),
}


def _options(given: dict[str, Any]) -> dict[str, Any]:
    read = {target: carry(given[name]) for name, (target, carry) in _OPTIONS.items() if name in given}
    return {target: value for target, value in read.items() if value is not None}


# ---- answers ---------------------------------------------------------------------------------------------------------


class _Part(Part):
    """With the pipeline's own account of the request."""

    headrace: Any = UNSET


class Chat:
    """The responses to a chat.

    Args:
        model: as the request names it, which is how Ollama's clients know it again; empty for the one that answers.
    """

    stream_type = NDJSON
    keep_alive = b""

    def __init__(self, model: str = "") -> None:
        self._model = model

    def part(self, chunk: Chunk) -> bytes:
        """One line; nothing for a chunk that only says how the answer ended, which the last line says."""
        delta = chunk.choices[0].delta
        if not (delta.content or delta.tool_calls):
            return b""
        calls = [_call_out(call.index, call.id, call.function) for call in delta.tool_calls or ()]
        part = _Part(model=self._model or chunk.model, created_at=time_text(chunk.created), done=False)
        return _line(self._fill(part, delta.content or "", calls))

    def end(self, completion: Completion) -> bytes:
        """The last line: no text, but what it took."""
        return _line(self._closing(completion, AssistantMessage(content="")))

    def whole(self, answer: Success) -> bytes:
        """All of it in one; raises as `expected`."""
        completion = expected(answer, Completion)
        return msgspec.json.encode(self._closing(completion, completion.choices[0].message))

    def error(self, error: ErrorBody) -> bytes:
        """The body of an error's response."""
        return error_body(error)

    def error_part(self, error: ErrorBody) -> bytes:
        """An error in a stream that has begun; Ollama's clients raise it."""
        return error_body(error) + b"\n"

    def _closing(self, completion: Completion, message: AssistantMessage) -> _Part:
        calls = [_call_out(index, call.id, call.function) for index, call in enumerate(message.tool_calls or ())]
        account, usage = completion.headrace, completion.usage
        part = _Part(
            model=self._model or completion.model,
            created_at=time_text(completion.created),
            done=True,
            done_reason="length" if completion.choices[0].finish_reason == "length" else "stop",
            total_duration=int(account.total_ms * _NS_PER_MS),
            load_duration=int(account.queue_ms * _NS_PER_MS),
            prompt_eval_count=usage.prompt_tokens,
            prompt_eval_duration=int(max(0.0, account.ttft_ms - account.queue_ms) * _NS_PER_MS),
            eval_count=usage.completion_tokens,
            eval_duration=int(max(0.0, account.total_ms - account.ttft_ms) * _NS_PER_MS),
            headrace=account,
        )
        return self._fill(part, message.content or "", calls)

    def _fill(self, part: _Part, text: str, calls: list[CallOut]) -> _Part:
        part.message = Message("assistant", text, calls or None)
        return part


class Generate(Chat):
    """The responses to a prompt; a prompt has no tools to be called."""

    def _fill(self, part: _Part, text: str, _calls: list[CallOut]) -> _Part:
        part.response = text
        return part


class Embed(Chat):
    """The response to a call for embeddings."""

    def whole(self, answer: Success) -> bytes:
        """As `Chat.whole`."""
        vectors = expected(answer, EmbeddingList)
        account = vectors.headrace
        fields = {
            "model": self._model or vectors.model,
            "embeddings": [item.embedding for item in vectors.embeddings()],
            "total_duration": int(account.total_ms * _NS_PER_MS),
            "load_duration": int(account.queue_ms * _NS_PER_MS),
            "prompt_eval_count": vectors.usage.prompt_tokens,
            "headrace": account,
        }
        return msgspec.json.encode(fields)


class Embedding(Chat):
    """The response to a call for the embedding of one text."""

    def whole(self, answer: Success) -> bytes:
        """As `Chat.whole`."""
        return msgspec.json.encode({"embedding": expected(answer, EmbeddingList).embeddings()[0].embedding})


class Loaded(NamedTuple):
    """A request that only asks for the model to be loaded, or unloaded: which is not a client's to decide here."""

    model: str
    call: Literal["chat", "generate", "embed", "embedding"]
    unload: bool

    @property
    def embeds(self) -> bool:
        """Whether the model is wanted for embeddings."""
        return self.call in ("embed", "embedding")

    def body(self, now: float) -> bytes:
        """The response, now being UTC unix seconds."""
        if self.call == "embed":
            return msgspec.json.encode({"model": self.model, "embeddings": []})
        if self.call == "embedding":
            return msgspec.json.encode({"embedding": []})
        part = _Part(model=self.model, created_at=time_text(now), done=True)
        part.done_reason = "unload" if self.unload else "load"
        if self.call == "chat":
            part.message = Message("assistant", "")
        else:
            part.response = ""
        return msgspec.json.encode(part)


def _call_out(index: int, call_id: str, function: FunctionCall) -> CallOut:
    try:
        arguments = msgspec.json.decode(function.arguments)
    except msgspec.DecodeError:
        arguments = {"arguments": function.arguments}  # what the model wrote is not JSON; better whole than lost
    return CallOut(call_id, FunctionOut(index, function.name, arguments))


def _line(part: _Part) -> bytes:
    return msgspec.json.encode(part) + b"\n"


def error_body(error: ErrorBody) -> bytes:
    """Ollama's error envelope, and beside it the pipeline's code for programs."""
    return msgspec.json.encode({"error": error.message, "code": error.code})


# ---- lists -----------------------------------------------------------------------------------------------------------


def _entry(name: str) -> dict[str, Any]:
    """A model as lists show it. Of its files nothing is known here: the digest is that of its name."""
    details = {
        "parent_model": "",
        "format": "",
        "family": "headrace",
        "families": ["headrace"],
        "parameter_size": "",
        "quantization_level": "",
    }
    digest = hashlib.sha256(name.encode()).hexdigest()
    return {"name": name, "model": name, "size": 0, "digest": digest, "details": details}


def tags(names: Iterable[str], *, since: float) -> dict[str, Any]:
    """The body of `GET /api/tags`; since when the models are known, UTC unix seconds."""
    return {"models": [_entry(name) | {"modified_at": time_text(since)} for name in names]}


def ps(names: Iterable[str]) -> dict[str, Any]:
    """The body of `GET /api/ps`."""
    return {"models": [_entry(name) | {"expires_at": FOR_EVER, "size_vram": 0} for name in names]}


def show(name: str, *, since: float, capabilities: list[str]) -> dict[str, Any]:
    """The body of `POST /api/show`."""
    return {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "details": _entry(name)["details"],
        "model_info": {"general.architecture": "headrace", "general.basename": name},
        "capabilities": capabilities,
        "modified_at": time_text(since),
    }


def same_model(one: str, other: str) -> bool:
    """Whether two names are one model's: Ollama takes the tag `latest` for granted."""
    return one.removesuffix(":latest") == other.removesuffix(":latest")


def spelled(requested: str, listed: Sequence[str]) -> str:
    """The name as the lists have it, where a client has added the tag that Ollama takes for granted."""
    bare = requested.removesuffix(":latest")
    return bare if requested not in listed and bare in listed else requested
