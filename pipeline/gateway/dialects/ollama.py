"""Ollama's dialect: its requests as the pipeline's, the pipeline's answers as its responses. No I/O.

The shapes, options and tool calls are in `pipeline.wire.ollama`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET

from pipeline.core.models import same_model, spelled
from pipeline.gateway.dialects.shapes import Asked, decode_body, expected
from pipeline.wire.errors import ErrorCode, HeadraceError, quoted
from pipeline.wire.messages import AssistantMessage, Chunk, Completion, EmbeddingList, ErrorBody, Success
from pipeline.wire.ollama import (
    NEVER,
    OPTIONS,
    AssistantTurn,
    BadOptionError,
    ChatBody,
    EmbedBody,
    EmbeddingBody,
    GenerateBody,
    OllamaCall,
    Part,
    ShowBody,
    read_options,
    response_format,
    time_text,
    write_call,
)
from pipeline.wire.requests import decode_chat, decode_embedding
from pipeline.wire.validation import shown

NDJSON = "application/x-ndjson"
# The version of Ollama's API that is implemented here. Clients read it to learn which features they can use.
API_VERSION = "0.12.0"
_NS_PER_MS = 1_000_000
# The types of options, as Ollama names them, in a sentence.
_KINDS = {"integer": "an integer", "float32": "a number", "array": "a list of strings"}

# ---- requests --------------------------------------------------------------------------------------------------------


def read_chat(body: bytes, max_body_bytes: int, listed: Sequence[str] = ()) -> Asked | Loaded:
    """The body of `POST /api/chat`; a body without messages only loads the model.

    Raises:
        HeadraceError: as `decode_chat`.
    """
    chat = decode_body(body, ChatBody)
    if not chat.messages:
        return Loaded(spelled(chat.model, listed), "chat", unload=chat.keep_alive in (0, "0", "0s"))
    return _asked(chat, OllamaChat(chat.model), max_body_bytes, listed)


def read_generate(body: bytes, max_body_bytes: int, listed: Sequence[str] = ()) -> Asked | Loaded:
    """The body of `POST /api/generate`; a body without a prompt only loads the model.

    Raises:
        HeadraceError: as `decode_chat`.
    """
    given = decode_body(body, GenerateBody)
    if not given.prompt:
        return Loaded(spelled(given.model, listed), "generate", unload=given.keep_alive in (0, "0", "0s"))
    return _asked(given, OllamaGenerate(given.model), max_body_bytes, listed)


def read_embed(body: bytes, max_body_bytes: int, listed: Sequence[str] = ()) -> Asked | Loaded:
    """The body of `POST /api/embed`; a body without a text only loads the model.

    Raises:
        HeadraceError: as `decode_embedding`.
    """
    given = decode_body(body, EmbedBody)
    if not given.input:
        return Loaded(spelled(given.model, listed), "embed", unload=False)
    fields = {"input": given.input, "dimensions": given.dimensions, "truncate": given.truncate}
    return _embedded(given.model, fields, OllamaEmbed(given.model), max_body_bytes, listed)


def read_embedding(body: bytes, max_body_bytes: int, listed: Sequence[str] = ()) -> Asked | Loaded:
    """The body of `POST /api/embeddings`, the predecessor of `embed`, which takes one text.

    Raises:
        HeadraceError: as `decode_embedding`.
    """
    given = decode_body(body, EmbeddingBody)
    if not given.prompt:
        return Loaded(spelled(given.model, listed), "embedding", unload=False)
    return _embedded(given.model, {"input": given.prompt}, OllamaEmbedding(given.model), max_body_bytes, listed)


def _embedded(
    model: str, fields: dict[str, Any], shape: OllamaChat, max_body_bytes: int, listed: Sequence[str]
) -> Asked:
    if model:
        fields["model"] = spelled(model, listed)
    written = msgspec.json.encode(fields)
    return Asked(decode_embedding(written, max_body_bytes=max_body_bytes), written, shape, stream=False)


def read_show(body: bytes) -> str:
    """The model that a body of `POST /api/show` names."""
    given = decode_body(body, ShowBody)
    if not (given.model or given.name):
        raise HeadraceError(ErrorCode.INVALID_REQUEST, "`model` is required.", param="model")
    return given.model or given.name


def _asked(body: ChatBody | GenerateBody, shape: OllamaChat, max_body_bytes: int, listed: Sequence[str]) -> Asked:
    for name, feature in body.unsupported().items():
        message = f"{quoted(body.model) if body.model else 'The model'} does not support {feature}. Leave out `{name}`."
        raise HeadraceError(ErrorCode.UNSUPPORTED_PARAMETER, message, param=name)
    fields = body.fields() | _options(body.options or {})
    fields["stream"] = body.stream is not False
    if body.model:
        fields["model"] = spelled(body.model, listed)
    try:
        form = response_format(body.format)
    except ValueError as error:
        raise HeadraceError(ErrorCode.INVALID_REQUEST, f"`format` must be {error}.", param="format") from None
    if form is not None:
        fields["response_format"] = form
    # Encoded and decoded once more, so that one place checks every request.
    written = msgspec.json.encode(fields)
    try:
        request = decode_chat(written, max_body_bytes=max_body_bytes)
    except HeadraceError as error:
        raise _in_ollamas_words(error, body.options or {}) from None
    return Asked(request, written, shape, stream=request.streams)


def _in_ollamas_words(error: HeadraceError, options: Mapping[str, Any]) -> HeadraceError:
    """The same error with the option's name in its message, where the request's field was made from an option."""
    for name, option in OPTIONS.items():
        if name in options and option.field == error.param:
            message = error.message.replace(f"`{option.field}", f"`options.{name}")
            return HeadraceError(error.code, message, param=error.param)
    return error


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options as fields of the request. A single `stop` string is accepted too, as OpenAI's clients send it."""
    stop = given.get("stop")
    try:
        return read_options({**given, "stop": [stop]} if isinstance(stop, str) else given)
    except BadOptionError as error:
        kind = _KINDS[error.kind]
        message = f"`options.{error.name}` must be {kind}, not {shown(given[error.name])}."
        raise HeadraceError(ErrorCode.INVALID_REQUEST, message, param=error.field) from None


# ---- answers ---------------------------------------------------------------------------------------------------------


class AccountedPart(Part):
    """An answer of Ollama's, with the pipeline's own account of the request."""

    headrace: Any = UNSET


class OllamaChat:
    """The responses to a chat.

    Args:
        model: as the request spells it, because Ollama's clients compare it; empty for the model that answers.
    """

    stream_type = NDJSON
    request_id = ""

    def __init__(self, model: str = "") -> None:
        self._model = model

    @property
    def keep_alive(self) -> bytes:
        """A part without text: Ollama's clients accept it, and have no comments."""
        part = AccountedPart(model=self._model or "auto", created_at=time_text(time.time()), done=False)
        return _line(self._fill(part, "", []))

    def part(self, chunk: Chunk) -> bytes:
        """One line; nothing for a chunk without text or tool calls: how the answer ended stands in the last line."""
        delta = chunk.choices[0].delta
        if not (delta.content or delta.tool_calls):
            return b""
        calls = [write_call(call.index, call.id, call.function) for call in delta.tool_calls or ()]
        part = AccountedPart(model=self._named(chunk.model), created_at=time_text(chunk.created), done=False)
        return _line(self._fill(part, delta.content or "", calls))

    def end(self, completion: Completion) -> bytes:
        """The last line: no text, the durations and token counts."""
        return _line(self._closing(completion, AssistantMessage(content="")))

    def whole(self, answer: Success) -> bytes:
        """The body of a whole response; raises as `expected`."""
        completion = expected(answer, Completion)
        return msgspec.json.encode(self._closing(completion, completion.choices[0].message))

    def error(self, error: ErrorBody) -> bytes:
        """The body of an error's response."""
        return error_body(error)

    def error_part(self, error: ErrorBody) -> bytes:
        """An error in a stream that has begun. Ollama's clients raise it."""
        return error_body(error) + b"\n"

    def _named(self, answering: str) -> str:
        """The answering model: as the client spells it, if it asked for this one."""
        return self._model if same_model(self._model, answering) else answering

    def _closing(self, completion: Completion, message: AssistantMessage) -> AccountedPart:
        calls = [write_call(index, call.id, call.function) for index, call in enumerate(message.tool_calls or ())]
        account, usage = completion.headrace, completion.usage
        part = AccountedPart(
            model=self._named(completion.model),
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

    def _fill(self, part: AccountedPart, text: str, calls: list[OllamaCall]) -> AccountedPart:
        part.message = AssistantTurn("assistant", text, calls or None)
        return part


class OllamaGenerate(OllamaChat):
    """The responses to a prompt. A prompt has no tools."""

    def _fill(self, part: AccountedPart, text: str, _calls: list[OllamaCall]) -> AccountedPart:
        part.response = text
        return part


class OllamaEmbed(OllamaChat):
    """The response to a call for embeddings."""

    def whole(self, answer: Success) -> bytes:
        """As `OllamaChat.whole`."""
        vectors = expected(answer, EmbeddingList)
        account = vectors.headrace
        fields = {
            "model": self._named(vectors.model),
            "embeddings": [item.embedding for item in vectors.embeddings()],
            "total_duration": int(account.total_ms * _NS_PER_MS),
            "load_duration": int(account.queue_ms * _NS_PER_MS),
            "prompt_eval_count": vectors.usage.prompt_tokens,
            "headrace": account,
        }
        return msgspec.json.encode(fields)


class OllamaEmbedding(OllamaChat):
    """The response to a call for the embedding of one text."""

    def whole(self, answer: Success) -> bytes:
        """As `OllamaChat.whole`."""
        return msgspec.json.encode({"embedding": expected(answer, EmbeddingList).embeddings()[0].embedding})


class Loaded(NamedTuple):
    """A request that only loads or unloads a model. Here no client decides that: the answer comes at once."""

    model: str
    call: Literal["chat", "generate", "embed", "embedding"]
    unload: bool

    @property
    def embeds(self) -> bool:
        """Whether the request is for embeddings."""
        return self.call in ("embed", "embedding")

    def body(self, now: float) -> bytes:
        """The response at `now` (UTC, unix seconds)."""
        if self.call == "embed":
            return msgspec.json.encode({"model": self.model, "embeddings": []})
        if self.call == "embedding":
            return msgspec.json.encode({"embedding": []})
        part = AccountedPart(model=self.model, created_at=time_text(now), done=True)
        part.done_reason = "unload" if self.unload else "load"
        if self.call == "chat":
            part.message = AssistantTurn("assistant", "")
        else:
            part.response = ""
        return msgspec.json.encode(part)


def _line(part: AccountedPart) -> bytes:
    return msgspec.json.encode(part) + b"\n"


def error_body(error: ErrorBody) -> bytes:
    """Ollama's error envelope, with the pipeline's `code` beside the text."""
    return msgspec.json.encode({"error": error.message, "code": error.code})


# ---- lists -----------------------------------------------------------------------------------------------------------


def _entry(name: str) -> dict[str, Any]:
    """A model as lists show it. The gateway knows no model files, so the digest is that of the name."""
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
    """The body of `GET /api/tags`. `since` (UTC, unix seconds) is shown as the time of the last change."""
    return {"models": [_entry(name) | {"modified_at": time_text(since)} for name in names]}


def ps(names: Iterable[str]) -> dict[str, Any]:
    """The body of `GET /api/ps`."""
    return {"models": [_entry(name) | {"expires_at": NEVER, "size_vram": 0} for name in names]}


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
