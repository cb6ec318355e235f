"""Ollama's dialect: its requests as the pipeline's, the pipeline's answers as its responses. No I/O.

The shapes, options and tool calls are in `pipeline.wire.ollama`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET

from pipeline.core.models import same_model, spelled
from pipeline.gateway.dialects.shapes import Asked, decode_body, expected
from pipeline.wire.answers import AssistantMessage, Chunk, Completion, EmbeddingList, ErrorBody, Success
from pipeline.wire.decoding import decode_chat, decode_embedding
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.fetches import FetchStep
from pipeline.wire.messages import ModelFacts
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
    PullBody,
    ShowBody,
    WholeCalls,
    read_options,
    response_format,
    time_text,
    write_call,
)
from pipeline.wire.validation import shown

NDJSON = "application/x-ndjson"
# The version of Ollama's API that is implemented here. Clients read it to learn which features they can use.
API_VERSION = "0.14.0"
_NS_PER_MS = 1_000_000
# Of a model whose files are not known.
_FAMILY = "headrace"
_CHATS = ["completion"]
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
    if not (given.prompt or given.suffix):
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
    fields: dict[str, Any] = {"input": given.input, "dimensions": given.dimensions, "truncate": given.truncate}
    if particulars := given.particulars():
        fields["ollama"] = particulars
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
    return _named(decode_body(body, ShowBody))


def read_pull(body: bytes) -> tuple[str, bool]:
    """The model that a body of `POST /api/pull` names, and whether the response is a stream."""
    given = decode_body(body, PullBody)
    return _named(given), given.stream is not False


def _named(given: ShowBody) -> str:
    if not given.model:
        raise HeadraceError(ErrorCode.INVALID_REQUEST, "`model` is required.", param="model")
    return given.model


def _asked(body: ChatBody | GenerateBody, shape: OllamaChat, max_body_bytes: int, listed: Sequence[str]) -> Asked:
    fields = body.fields() | _options(body.options or {})
    if particulars := body.particulars():
        fields["ollama"] = particulars
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
        self._calls = WholeCalls()

    @property
    def keep_alive(self) -> bytes:
        """A part without text: Ollama's clients accept it, and have no comments."""
        part = AccountedPart(model=self._model or "auto", created_at=time_text(time.time()), done=False)
        return _line(self._fill(part, "", []))

    def part(self, chunk: Chunk) -> bytes:
        """One line; nothing for a chunk without text or whole calls: how the answer ended stands in the last line."""
        delta = chunk.choices[0].delta
        scores = chunk.choices[0].logprobs
        calls = self._calls.take(delta.tool_calls or (), ended=chunk.choices[0].finish_reason is not None)
        if not (delta.content or calls or delta.reasoning_content or scores):
            return b""
        part = AccountedPart(model=self._named(chunk.model), created_at=time_text(chunk.created), done=False)
        part.logprobs = scores.content if scores else []
        return _line(self._fill(part, delta.content or "", calls, delta.reasoning_content or ""))

    def end(self, completion: Completion) -> bytes:
        """The last line: no text, the durations and token counts."""
        return _line(self._closing(completion, AssistantMessage(content="")))

    def whole(self, answer: Success) -> bytes:
        """The body of a whole response; raises as `expected`."""
        completion = expected(answer, Completion)
        choice = completion.choices[0]
        part = self._closing(completion, choice.message)
        part.logprobs = choice.logprobs.content if choice.logprobs else []
        return msgspec.json.encode(part)

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
        return self._fill(part, message.content or "", calls, message.reasoning_content or "")

    def _fill(self, part: AccountedPart, text: str, calls: list[OllamaCall], thinking: str = "") -> AccountedPart:
        part.message = AssistantTurn("assistant", text, calls or None, thinking)
        return part


class OllamaGenerate(OllamaChat):
    """The responses to a prompt. A prompt has no tools."""

    def _fill(self, part: AccountedPart, text: str, _calls: list[OllamaCall], thinking: str = "") -> AccountedPart:
        part.response, part.thinking = text, thinking
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


def _entry(name: str, facts: ModelFacts) -> dict[str, Any]:
    """A model as lists show it. Where the digest of the files is not known, it is that of the name."""
    digest = facts.digest or hashlib.sha256(name.encode()).hexdigest()
    return {"name": name, "model": name, "size": facts.size_bytes, "digest": digest, "details": _details(facts)}


def _details(facts: ModelFacts) -> dict[str, Any]:
    family = facts.family or _FAMILY
    return {
        "parent_model": facts.alias_of,
        "format": facts.format,
        "family": family,
        "families": [family],
        "parameter_size": facts.parameter_size,
        "quantization_level": facts.quantization,
    }


def tags(models: Mapping[str, ModelFacts], *, since: float) -> dict[str, Any]:
    """The body of `GET /api/tags`. `since` (UTC, unix seconds) is shown as the time of the last change."""
    also = {"modified_at": time_text(since)}
    entries = [
        _entry(name, facts) | also | {"capabilities": facts.capabilities or _CHATS} for name, facts in models.items()
    ]
    return {"models": entries}


def ps(models: Mapping[str, ModelFacts], *, now: float) -> dict[str, Any]:
    """The body of `GET /api/ps`: those that are loaded, and in a key of headrace's own those that are being loaded.

    Args:
        models: the facts of all, by name.
        now: UTC, unix seconds.
    """
    entries = [
        _entry(name, facts)
        | {
            "size": facts.memory_bytes or facts.size_bytes,
            "expires_at": time_text(facts.expires_at) if facts.expires_at else NEVER,
            "size_vram": facts.vram_bytes,
            "context_length": facts.context_tokens,
        }
        for name, facts in models.items()
        if facts.loaded
    ]
    loading = [
        {
            "model": name,
            "done_bytes": facts.loading_bytes,
            "total_bytes": facts.size_bytes,
            "seconds": round(max(0.0, now - facts.loading_since), 3),
        }
        for name, facts in models.items()
        if facts.loading_since and not facts.alias_of
    ]
    return {"models": entries} | ({"loading": loading} if loading else {})


def show(name: str, facts: ModelFacts, *, since: float) -> dict[str, Any]:
    """The body of `POST /api/show`."""
    family = facts.family or _FAMILY
    info: dict[str, Any] = {"general.architecture": family, "general.basename": name}
    if facts.context_tokens:
        info[f"{family}.context_length"] = facts.context_tokens
    return {
        "modelfile": "",
        "parameters": f"num_ctx {facts.context_tokens}" if facts.context_tokens else "",
        "template": "",
        "details": _details(facts),
        "model_info": info,
        "capabilities": facts.capabilities or _CHATS,
        "modified_at": time_text(since),
    }


PULLED = b'{"status":"success"}'
"""The body of `POST /api/pull` without a stream, and the last line of one."""

PULLED_BEFORE = b'{"status":"pulling manifest"}\n' + PULLED + b"\n"
"""The stream for a model that is here."""


def pull_line(step: FetchStep) -> bytes:
    """One line of the progress of `POST /api/pull`."""
    return msgspec.json.encode(step) + b"\n"
