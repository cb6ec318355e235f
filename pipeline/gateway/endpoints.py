"""Every endpoint of the gateway, each declared once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.config import Config
from pipeline.core.statistics import QueueStatistics
from pipeline.gateway import files, schemas
from pipeline.gateway.asking import Asking, Reader
from pipeline.gateway.batches import BatchCalls
from pipeline.gateway.counting import TokenCounts
from pipeline.gateway.dialects import anthropic, ollama, openai
from pipeline.gateway.dialects.anthropic_body import MessagesBody
from pipeline.gateway.dialects.response_object import ResponseObject
from pipeline.gateway.dialects.responses import read_response
from pipeline.gateway.document import ERRORS
from pipeline.gateway.endpoint import (
    BODY_ERRORS,
    JSON,
    JSONL,
    MULTIPART,
    SSE,
    USUAL_ERRORS,
    Access,
    Endpoint,
    Handler,
    Kind,
    Schema,
)
from pipeline.gateway.fetching import ModelFetches
from pipeline.gateway.letters import Letters
from pipeline.gateway.live import Watch
from pipeline.gateway.models import Models
from pipeline.gateway.operating import OperatorCalls
from pipeline.gateway.probes import Probes
from pipeline.gateway.queue import Queue
from pipeline.gateway.schemas import ANSWER, ID
from pipeline.gateway.uploads import Uploads
from pipeline.gateway.usage import UsageView
from pipeline.wire import ollama as ollama_wire
from pipeline.wire.answers import Completion, EmbeddingList
from pipeline.wire.batches import BatchCall, BatchObject, FileDeleted, FileObject
from pipeline.wire.messages import Cancelled, Position
from pipeline.wire.pauses import MoveAllCall, MoveReport, PausedState, PriorityCall, ScopeCall
from pipeline.wire.requests import EmbeddingRequest
from pipeline.wire.usage import UsageReport

_NDJSON = "application/x-ndjson"


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of one gateway that have handlers."""

    asking: Asking
    models: Models
    fetches: ModelFetches
    counts: TokenCounts
    queue: Queue
    usage: UsageView
    letters: Letters
    operator: OperatorCalls
    uploads: Uploads
    batches: BatchCalls
    watch: Watch
    probes: Probes


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


def _get(path: str, kind: Kind, summary: str, serve: Callable[[Parts], Handler], **more: Any) -> Endpoint[Parts]:
    return Endpoint("GET", path, kind, summary, serve, **more)


def _operator(path: str, summary: str, serve: Callable[[Parts], Handler], body: type) -> Endpoint[Parts]:
    """An endpoint for operators."""
    of_request = "{id}" in path
    return Endpoint(
        "POST",
        path,
        Kind.STATISTICS,
        summary,
        serve,
        tag="queue",
        parameters=(ID,) if of_request else (),
        body=schemas.fields(body),
        required=("priority",) if body in (MoveAllCall, PriorityCall) else (),
        answer=ANSWER[PausedState if body is ScopeCall else MoveReport],
        errors=USUAL_ERRORS | BODY_ERRORS | ({409} if of_request else frozenset()),
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
    _get("/v1/models", _LISTS, "The available models", lambda parts: parts.models.v1_list, tag="OpenAI"),
    _get(
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
    _get(
        "/v1/files",
        _STATISTICS,
        "The stored files",
        lambda parts: parts.uploads.list_all,
        tag="OpenAI",
        parameters=(schemas.AFTER, schemas.FILES_LIMIT),
    ),
    _get(
        "/v1/files/{id}",
        _STATISTICS,
        "One file",
        lambda parts: parts.uploads.show,
        tag="OpenAI",
        parameters=(ID,),
        answer=ANSWER[FileObject],
    ),
    _get(
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
    _get(
        "/v1/batches",
        _STATISTICS,
        "Batches, newest first",
        lambda parts: parts.batches.list_all,
        tag="OpenAI",
        parameters=(schemas.AFTER, schemas.BATCHES_LIMIT),
    ),
    _get(
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
    _get("/api/tags", _LISTS, "The available models", lambda parts: parts.models.tags, tag="Ollama"),
    _get("/api/ps", _LISTS, "The loaded models", lambda parts: parts.models.ps, tag="Ollama"),
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
    _get(
        "/api/version",
        _LISTS,
        "The implemented version of Ollama's API",
        lambda parts: parts.models.version,
        tag="Ollama",
    ),
)
_QUEUE: tuple[Endpoint[Parts], ...] = (
    _get(
        "/queue/stats",
        _STATISTICS,
        "Counts and waits per priority, and each engine's load",
        lambda parts: parts.queue.stats,
        tag="queue",
        answer=ANSWER[QueueStatistics],
    ),
    _get(
        "/queue/usage",
        _STATISTICS,
        "Requests and tokens of each tenant and key, by hour, day and month",
        lambda parts: parts.usage.show,
        tag="queue",
        answer=ANSWER[UsageReport],
    ),
    _get(
        "/queue/requests/{id}",
        _STATISTICS,
        "A request's state and position, and its answer",
        lambda parts: parts.queue.show,
        tag="queue",
        parameters=(ID,),
        answer=ANSWER[Position],
    ),
    Endpoint(
        "DELETE",
        "/queue/requests/{id}",
        _STATISTICS,
        "Cancel a request",
        lambda parts: parts.queue.cancel,
        tag="queue",
        parameters=(ID,),
        answer=ANSWER[Cancelled],
    ),
    _get(
        "/queue/requests/{id}/events",
        _STATISTICS,
        "A request's messages, as they come",
        lambda parts: parts.queue.events,
        tag="queue",
        parameters=(ID, schemas.LAST_EVENT_ID),
        media=(SSE,),
        also={204: {"description": "No event follows that one."}},
    ),
    _get(
        "/queue/live",
        _STATISTICS,
        "The dashboard's data: everything at first, then every change",
        lambda parts: parts.watch.live,
        tag="queue",
        media=(SSE,),
    ),
    _get("/queue/dead", _STATISTICS, "Dead letters, newest first", lambda parts: parts.letters.list_all, tag="queue"),
    _get(
        "/queue/dead/{id}",
        _STATISTICS,
        "A dead letter with its request",
        lambda parts: parts.letters.show,
        tag="queue",
        parameters=(ID,),
    ),
    Endpoint(
        "DELETE",
        "/queue/dead/{id}",
        _STATISTICS,
        "Delete a dead letter",
        lambda parts: parts.letters.purge,
        tag="queue",
        parameters=(ID,),
    ),
    Endpoint(
        "POST",
        "/queue/dead/{id}/replay",
        _STATISTICS,
        "Queue a dead letter's request again",
        lambda parts: parts.letters.replay,
        tag="queue",
        parameters=(ID,),
        status=202,
    ),
    _get(
        "/load",
        _STATISTICS,
        "Each engine's load, at every change",
        lambda parts: parts.queue.load,
        tag="queue",
        media=(SSE,),
    ),
)
_OPERATOR: tuple[Endpoint[Parts], ...] = (
    _get(
        "/queue/paused",
        _STATISTICS,
        "The paused lanes and tenants",
        lambda parts: parts.operator.paused,
        tag="queue",
        answer=ANSWER[PausedState],
    ),
    _operator("/queue/pause", "Pause a lane or a tenant", lambda parts: parts.operator.pause, ScopeCall),
    _operator("/queue/resume", "Resume a lane or a tenant", lambda parts: parts.operator.resume, ScopeCall),
    _operator(
        "/queue/priority",
        "Change the priority of the queued requests of a tenant or a batch",
        lambda parts: parts.operator.move_all,
        MoveAllCall,
    ),
    _operator(
        "/queue/requests/{id}/priority",
        "Change the priority of a queued request",
        lambda parts: parts.operator.move,
        PriorityCall,
    ),
)
_ITSELF: tuple[Endpoint[Parts], ...] = (
    _get(
        "/metrics",
        _STATISTICS,
        "Metrics for Prometheus",
        lambda parts: parts.probes.metrics,
        tag="gateway",
        media=("text/plain",),
    ),
    _get(
        "/healthz",
        Kind.PROBES,
        "Whether the gateway is alive",
        lambda parts: parts.probes.healthz,
        tag="gateway",
        access=Access.OPEN,
        errors=frozenset(),
    ),
    _get(
        "/readyz",
        Kind.PROBES,
        "Whether requests are answered now",
        lambda parts: parts.probes.readyz,
        tag="gateway",
        access=Access.OPEN,
        errors=frozenset({503}),
    ),
    _get(
        "/openapi.json",
        _LISTS,
        "This document",
        lambda parts: parts.probes.document,
        tag="gateway",
        access=Access.OPEN,
        errors=frozenset({429}),
    ),
)


def _page(path: str, handler: Handler) -> Endpoint[Parts]:
    return _get(path, _LISTS, "", lambda _: handler, access=Access.OPEN)


_PAGES = tuple(_page(path, handler) for path, handler in files.handlers().items())
ENDPOINTS = (*_OPENAI, *_BATCHES, *_ANTHROPIC, *_OLLAMA, *_QUEUE, *_OPERATOR, *_ITSELF, *_PAGES)
