"""The OpenAPI document of the gateway, as data. Bodies are described by the structs that read and write them."""

from __future__ import annotations

from typing import Any

import msgspec

from pipeline.core.statistics import QueueStatistics
from pipeline.wire import ollama as ollama_api
from pipeline.wire.messages import Cancelled, Completion, Embedding, EmbeddingList, Position
from pipeline.wire.requests import ChatRequest, EmbeddingRequest

Schema = dict[str, Any]

_REQUESTS = (
    ChatRequest,
    EmbeddingRequest,
    ollama_api.ChatBody,
    ollama_api.GenerateBody,
    ollama_api.EmbedBody,
    ollama_api.EmbeddingBody,
)
_ANSWERS = (Completion, EmbeddingList, Embedding, ollama_api.Part, QueueStatistics, Position, Cancelled)
_REFS, _SCHEMAS = msgspec.json.schema_components((*_REQUESTS, *_ANSWERS), ref_template="#/components/schemas/{name}")
_ANSWER = dict(zip(_ANSWERS, _REFS[len(_REQUESTS) :], strict=True))
# Passed on unread, so that the struct does not say what it is.
_SCHEMAS["EmbeddingList"]["properties"]["data"] = {"type": "array", "items": _ANSWER[Embedding]}

_ID = {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "maxLength": 128}}
_MODEL_ID = {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _header(name: str, text: str, **schema: Any) -> Schema:
    return {"name": name, "in": "header", "description": text, "schema": {"type": "string", **schema}}


_ASKING = [
    _header("X-Priority", "Urgency; by default the key's, or medium.", enum=["high", "medium", "low"]),
    _header(
        "X-Request-Timeout", "Seconds after which nobody wants the answer.", pattern=r"^[0-9]{1,7}(\.[0-9]{1,6})?$"
    ),
    _header("Idempotency-Key", "The request's id; twice within two minutes it is one request, with one body."),
    _header("Prefer", "`respond-async`: answer 202 at once, and keep the answer to be read."),
    _header("traceparent", "W3C trace context that the request's spans join."),
]
_TEXT: Schema = {"type": "string"}
# What any engine may honour; the struct has more, to refuse it by name.
_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "seed", "stream")
_CHAT = ("messages", "model", "max_completion_tokens", *_SAMPLING, "tools", "tool_choice", "response_format")


def _fields(struct: type, *names: str) -> Schema:
    """The fields of a request's struct, all of them or those that are named."""
    properties = _SCHEMAS[struct.__name__]["properties"]
    return {name: properties[name] for name in names or properties}


_USAGE: Schema = {"stream_options": {"type": "object", "properties": {"include_usage": {"type": "boolean"}}}}
_ERRORS = {
    "400": "The request cannot be used.",
    "401": "No API key, or one that is not known.",
    "403": "The key may not ask for this.",
    "404": "No such model or request.",
    "408": "The request did not come in time.",
    "413": "The request is too large.",
    "415": "The body is compressed.",
    "429": "Too many calls of this kind; Retry-After says when one more fits.",
    "499": "The request was cancelled.",
    "502": "The engines have failed at this request.",
    "503": "The lane is full, or the pipeline is away; Retry-After says when to try again.",
    "504": "The request's time is up.",
}


def _operation(
    summary: str,
    tag: str,
    *,
    answer: str = "application/json",
    schema: Schema | None = None,
    body: Schema | None = None,
    required: tuple[str, ...] = (),
    parameters: list[Schema] | None = None,
    statuses: tuple[str, ...] = ("400", "401", "403", "404", "429", "503"),
) -> Schema:
    operation: Schema = {"summary": summary, "tags": [tag], "parameters": parameters or []}
    if body is not None:
        wanted = {"type": "object", "properties": body, "required": list(required)}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": wanted}}}
        statuses = (*statuses, "408", "413")
    responses: Schema = {"200": {"description": "Done.", "content": {answer: {"schema": schema or {}}}}}
    responses |= {status: {"$ref": f"#/components/responses/{status}"} for status in sorted(set(statuses))}
    return operation | {"responses": responses}


def _ask(summary: str, tag: str, body: Schema, *required: str, schema: Schema | None = None) -> Schema:
    operation = _operation(
        summary, tag, schema=schema, body=body, required=required, parameters=_ASKING, statuses=tuple(_ERRORS)
    )
    if "stream" in body:
        stream = "text/event-stream" if tag == "OpenAI" else "application/x-ndjson"
        operation["responses"]["200"]["content"][stream] = {"schema": {}}
    operation["responses"]["202"] = {
        "description": "Accepted; the answer is read at the given URL.",
        "content": {"application/json": {"schema": {}}},
    }
    return operation


def _paths() -> Schema:
    chat = _fields(ChatRequest, *_CHAT) | _USAGE
    text = {"prompt": _TEXT} | _fields(ChatRequest, "model", *_SAMPLING) | _USAGE
    part = _ANSWER[ollama_api.Part]
    show = {"model": _TEXT | {"minLength": 1}}
    queue, openai, ollama, itself = "queue", "OpenAI", "Ollama", "gateway"
    sse = "text/event-stream"
    last_id = _header("Last-Event-ID", "Begin behind this event.", pattern="^[0-9]{0,18}$")
    events = _operation("The messages of a request, as they come", queue, answer=sse, parameters=[_ID, last_id])
    replay = _operation("Queue the request of a dead letter again", queue, parameters=[_ID])
    replay["responses"]["202"] = replay["responses"].pop("200") | {"description": "Queued again."}
    events["responses"]["204"] = {"description": "There is nothing behind that event."}
    return {
        "/v1/chat/completions": {"post": _ask("Chat", openai, chat, "messages", schema=_ANSWER[Completion])},
        "/v1/completions": {"post": _ask("Text completion", openai, text, "prompt")},
        "/v1/embeddings": {
            "post": _ask("Embeddings", openai, _fields(EmbeddingRequest), "input", schema=_ANSWER[EmbeddingList])
        },
        "/v1/models": {"get": _operation("The models that answer", openai)},
        "/v1/models/{id}": {"get": _operation("One model", openai, parameters=[_MODEL_ID])},
        "/api/chat": {"post": _ask("Chat", ollama, _fields(ollama_api.ChatBody), schema=part)},
        "/api/generate": {"post": _ask("Answer a prompt", ollama, _fields(ollama_api.GenerateBody), schema=part)},
        "/api/embed": {"post": _ask("Embeddings", ollama, _fields(ollama_api.EmbedBody))},
        "/api/embeddings": {"post": _ask("The embedding of one text", ollama, _fields(ollama_api.EmbeddingBody))},
        "/api/tags": {"get": _operation("The models that answer", ollama)},
        "/api/ps": {"get": _operation("The models that are loaded", ollama)},
        "/api/show": {"post": _operation("About one model", ollama, body=show, required=("model",))},
        "/api/version": {"get": _operation("The version of Ollama's API that is spoken", ollama)},
        "/queue/stats": {
            "get": _operation(
                "Counts and waits per priority, and the load of each engine", queue, schema=_ANSWER[QueueStatistics]
            )
        },
        "/queue/requests/{id}": {
            "get": _operation(
                "Where a request stands, and its answer", queue, parameters=[_ID], schema=_ANSWER[Position]
            ),
            "delete": _operation("Cancel a request", queue, parameters=[_ID], schema=_ANSWER[Cancelled]),
        },
        "/queue/requests/{id}/events": {"get": events},
        "/queue/live": {"get": _operation("What the dashboard shows: all of it, then every change", queue, answer=sse)},
        "/queue/dead": {"get": _operation("Dead letters, the latest first", queue)},
        "/queue/dead/{id}": {
            "get": _operation("A dead letter whole", queue, parameters=[_ID]),
            "delete": _operation("Throw a dead letter away", queue, parameters=[_ID]),
        },
        "/queue/dead/{id}/replay": {"post": replay},
        "/load": {"get": _operation("The load of each engine at every change", queue, answer=sse)},
        "/metrics": {"get": _operation("For Prometheus", itself, answer="text/plain")},
        "/healthz": {"get": _operation("Whether the gateway lives", itself, statuses=())},
        "/readyz": {"get": _operation("Whether requests would be answered", itself, statuses=("503",))},
        "/openapi.json": {"get": _operation("This document", itself, statuses=("429",))},
    }


def openapi(*, with_keys: bool) -> Schema:
    """The document; with_keys says whether an API key is needed."""
    responses = {status: {"description": text} for status, text in _ERRORS.items()}
    kept = {name: schema for name, schema in _SCHEMAS.items() if name not in {each.__name__ for each in _REQUESTS}}
    components: Schema = {"responses": responses, "schemas": kept}
    document: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": "headrace",
            "version": "1.0.0",
            "description": "A priority queue in front of local LLM engines, in the dialects of OpenAI and Ollama.",
        },
        "paths": _paths(),
        "components": components,
    }
    if with_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document
