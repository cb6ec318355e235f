"""The endpoints of other servers' APIs: OpenAI's with files and batches, Anthropic's, Ollama's; each declared once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pipeline.config import Config
from pipeline.gateway import schemas
from pipeline.gateway.asking import Reader
from pipeline.gateway.dialects import anthropic, ollama, openai
from pipeline.gateway.dialects.anthropic_body import MessagesBody
from pipeline.gateway.dialects.response_object import ResponseObject
from pipeline.gateway.dialects.responses import read_response
from pipeline.gateway.document import ERRORS
from pipeline.gateway.endpoint import BODY_ERRORS, JSON, JSONL, MULTIPART, SSE, USUAL_ERRORS, Endpoint, Kind, Schema
from pipeline.gateway.parts import Parts, get
from pipeline.gateway.schemas import ANSWER, ID
from pipeline.wire import ollama as ollama_wire
from pipeline.wire.answers import Completion, EmbeddingList
from pipeline.wire.batches import BatchCall, BatchObject, FileDeleted, FileObject
from pipeline.wire.requests import EmbeddingRequest

_NDJSON = "application/x-ndjson"


def _ask(
    path: str,
    read: Reader,
    summary: str,
    tag: str,
    body: Schema,
    *required: str,
    stream: str = "",
    answer: Schema | None = None,
    by: Callable[[Config], Reader] | None = None,
) -> Endpoint[Parts]:
    """An endpoint that queues a request and responds with its answer. `stream` is the media type of a streamed one.

    `by` chooses another reader than `read` by the settings.
    """
    return Endpoint(
        "POST",
        path,
        Kind.ANSWERS,
        summary,
        lambda parts: parts.asking.handler(by(parts.asking.config) if by else read),
        tag=tag,
        parameters=schemas.ASKING,
        body=body,
        required=required,
        answer=answer or {},
        media=(JSON, stream) if stream else (JSON,),
        also={202: {"description": "Queued. Read the answer at the given URL.", "content": {JSON: {"schema": {}}}}},
        errors=frozenset(ERRORS),
    )


_LISTS, _STATISTICS = Kind.LISTS, Kind.STATISTICS
_OPENAI: tuple[Endpoint[Parts], ...] = (
    _ask(
        "/v1/chat/completions",
        openai.read_chat,
        "Chat",
        "OpenAI",
        schemas.CHAT,
        "messages",
        stream=SSE,
        answer=ANSWER[Completion],
    ),
    _ask(
        "/v1/responses",
        read_response,
        "Response",
        "OpenAI",
        schemas.RESPONSE,
        "input",
        stream=SSE,
        answer=ANSWER[ResponseObject],
    ),
    _ask(
        "/v1/completions",
        openai.read_text,
        "Text completion",
        "OpenAI",
        schemas.COMPLETION,
        "prompt",
        stream=SSE,
        by=lambda config: partial(openai.read_text, raw=not config.completions_as_chat),
    ),
    _ask(
        "/v1/embeddings",
        openai.read_embeddings,
        "Embeddings",
        "OpenAI",
        schemas.fields(EmbeddingRequest),
        "input",
        answer=ANSWER[EmbeddingList],
    ),
    get("/v1/models", _LISTS, "The available models", lambda parts: parts.models.v1_list, tag="OpenAI"),
    get(
        "/v1/models/{id:path}",
        _LISTS,
        "One model",
        lambda parts: parts.models.v1_one,
        tag="OpenAI",
        parameters=(schemas.MODEL_ID,),
    ),
)
_BATCHES: tuple[Endpoint[Parts], ...] = (
    Endpoint(
        "POST",
        "/v1/files",
        _STATISTICS,
        "Store an input file",
        lambda parts: parts.uploads.create,
        tag="OpenAI",
        body=schemas.UPLOAD,
        required=("file", "purpose"),
        takes=MULTIPART,
        answer=ANSWER[FileObject],
        errors=USUAL_ERRORS | BODY_ERRORS,
    ),
    get(
        "/v1/files",
        _STATISTICS,
        "The stored files",
        lambda parts: parts.uploads.list_all,
        tag="OpenAI",
        parameters=(schemas.AFTER, schemas.FILES_LIMIT),
    ),
    get(
        "/v1/files/{id}",
        _STATISTICS,
        "One file",
        lambda parts: parts.uploads.show,
        tag="OpenAI",
        parameters=(ID,),
        answer=ANSWER[FileObject],
    ),
    get(
        "/v1/files/{id}/content",
        _STATISTICS,
        "A file's content",
        lambda parts: parts.uploads.content,
        tag="OpenAI",
        parameters=(ID,),
        media=(JSONL,),
    ),
    Endpoint(
        "DELETE",
        "/v1/files/{id}",
        _STATISTICS,
        "Delete a file",
        lambda parts: parts.uploads.delete,
        tag="OpenAI",
        parameters=(ID,),
        answer=ANSWER[FileDeleted],
    ),
    Endpoint(
        "POST",
        "/v1/batches",
        _STATISTICS,
        "Run the lines of an input file",
        lambda parts: parts.batches.create,
        tag="OpenAI",
        body=schemas.fields(BatchCall),
        required=("input_file_id", "endpoint", "completion_window"),
        answer=ANSWER[BatchObject],
        errors=USUAL_ERRORS | BODY_ERRORS,
    ),
    get(
        "/v1/batches",
        _STATISTICS,
        "Batches, newest first",
        lambda parts: parts.batches.list_all,
        tag="OpenAI",
        parameters=(schemas.AFTER, schemas.BATCHES_LIMIT),
    ),
    get(
        "/v1/batches/{id}",
        _STATISTICS,
        "One batch",
        lambda parts: parts.batches.show,
        tag="OpenAI",
        parameters=(ID,),
        answer=ANSWER[BatchObject],
    ),
    Endpoint(
        "POST",
        "/v1/batches/{id}/cancel",
        _STATISTICS,
        "Cancel a batch",
        lambda parts: parts.batches.cancel,
        tag="OpenAI",
        parameters=(ID,),
        answer=ANSWER[BatchObject],
    ),
)
_ANTHROPIC: tuple[Endpoint[Parts], ...] = (
    _ask(
        "/v1/messages",
        anthropic.read_messages,
        "Message",
        "Anthropic",
        schemas.fields(MessagesBody),
        "messages",
        stream=SSE,
    ),
    Endpoint(
        "POST",
        "/v1/messages/count_tokens",
        _LISTS,
        "The number of tokens of a message's prompt",
        lambda parts: parts.counts.count,
        tag="Anthropic",
        body=schemas.fields(MessagesBody),
        required=("messages",),
        answer=schemas.TOKENS,
        errors=USUAL_ERRORS | BODY_ERRORS | {502},
    ),
)
_OLLAMA: tuple[Endpoint[Parts], ...] = (
    _ask(
        "/api/chat",
        ollama.read_chat,
        "Chat",
        "Ollama",
        schemas.fields(ollama_wire.ChatBody),
        stream=_NDJSON,
        answer=ANSWER[ollama_wire.Part],
    ),
    _ask(
        "/api/generate",
        ollama.read_generate,
        "Answer a prompt",
        "Ollama",
        schemas.fields(ollama_wire.GenerateBody),
        stream=_NDJSON,
        answer=ANSWER[ollama_wire.Part],
    ),
    _ask("/api/embed", ollama.read_embed, "Embeddings", "Ollama", schemas.fields(ollama_wire.EmbedBody)),
    _ask(
        "/api/embeddings",
        ollama.read_embedding,
        "The embedding of one text",
        "Ollama",
        schemas.fields(ollama_wire.EmbeddingBody),
    ),
    get("/api/tags", _LISTS, "The available models", lambda parts: parts.models.tags, tag="Ollama"),
    get("/api/ps", _LISTS, "The loaded models", lambda parts: parts.models.ps, tag="Ollama"),
    Endpoint(
        "POST",
        "/api/show",
        _LISTS,
        "One model's details",
        lambda parts: parts.models.show,
        tag="Ollama",
        body=schemas.SHOW,
        required=("model",),
        errors=USUAL_ERRORS | BODY_ERRORS,
    ),
    Endpoint(
        "POST",
        "/api/pull",
        _LISTS,
        "Fetch a model",
        lambda parts: parts.fetches.pull,
        tag="Ollama",
        body=schemas.PULL,
        required=("model",),
        media=(JSON, _NDJSON),
        errors=USUAL_ERRORS | BODY_ERRORS | {502},
    ),
    get(
        "/api/version",
        _LISTS,
        "The implemented version of Ollama's API",
        lambda parts: parts.models.version,
        tag="Ollama",
    ),
)
DIALECT_ENDPOINTS = (*_OPENAI, *_BATCHES, *_ANTHROPIC, *_OLLAMA)
