"""Schemas of bodies and answers for the OpenAPI document, from the structs that read and write them. No I/O."""

from __future__ import annotations

from typing import Any

import msgspec

from pipeline.core.statistics import QueueStatistics
from pipeline.gateway.dialects.anthropic_body import MessagesBody
from pipeline.gateway.dialects.openai import MAX_CHOICES
from pipeline.gateway.dialects.response_object import ResponseObject
from pipeline.gateway.dialects.responses import ResponseCall
from pipeline.gateway.endpoint import Schema
from pipeline.wire.answers import Completion, Embedding, EmbeddingList
from pipeline.wire.batches import BatchCall, BatchObject, FileDeleted, FileObject
from pipeline.wire.messages import Cancelled, Position
from pipeline.wire.ollama import ChatBody, EmbedBody, EmbeddingBody, GenerateBody, Part
from pipeline.wire.pauses import MoveAllCall, MoveReport, PausedState, PriorityCall, ScopeCall
from pipeline.wire.requests import ChatRequest, EmbeddingRequest
from pipeline.wire.usage import UsageReport

_BODIES = (
    *(ChatRequest, EmbeddingRequest, ChatBody, GenerateBody, EmbedBody, EmbeddingBody, ResponseCall, MessagesBody),
    *(BatchCall, ScopeCall, PriorityCall, MoveAllCall),
)
_ANSWERS = (
    *(Completion, ResponseObject, EmbeddingList, Embedding, Part, QueueStatistics, Position, Cancelled),
    *(FileObject, FileDeleted, BatchObject, PausedState, MoveReport, UsageReport),
)
_REFS, _SCHEMAS = msgspec.json.schema_components((*_BODIES, *_ANSWERS), ref_template="#/components/schemas/{name}")
ANSWER = dict(zip(_ANSWERS, _REFS[len(_BODIES) :], strict=True))
# The struct keeps its vectors as raw JSON and has no type for them.
_SCHEMAS["EmbeddingList"]["properties"]["data"] = {"type": "array", "items": ANSWER[Embedding]}
# Bodies are described where they are used, by the fields that the endpoint reads.
COMPONENTS: Schema = {name: each for name, each in _SCHEMAS.items() if name not in {body.__name__ for body in _BODIES}}

TEXT: Schema = {"type": "string"}
# The sampling parameters that an engine can honour. The struct has more fields, to refuse them by name.
_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "seed", "exact", "stream")
_FORM = ("tools", "tool_choice", "parallel_tool_calls", "response_format", "structured_outputs")
_CHAT = ("messages", "model", "max_completion_tokens", *_SAMPLING, *_FORM)
_PARTICULAR = ("logprobs", "top_logprobs", "logit_bias", "think", "reasoning_effort", "chat_template_kwargs")
_USAGE: Schema = {"stream_options": {"type": "object", "properties": {"include_usage": {"type": "boolean"}}}}


def fields(body: type, *names: str) -> Schema:
    """The properties of a body's struct: those that are named, or all."""
    properties = _SCHEMAS[body.__name__]["properties"]
    return {name: properties[name] for name in names or properties}


def header(name: str, description: str, **schema: Any) -> Schema:
    """A header as a parameter."""
    return {"name": name, "in": "header", "description": description, "schema": {"type": "string", **schema}}


_CHOICES: Schema = {"n": {"type": "integer", "minimum": 1, "maximum": MAX_CHOICES}}
_PROMPTS: Schema = {
    "prompt": {"anyOf": [TEXT, {"type": "array", "items": TEXT, "minItems": 1, "maxItems": MAX_CHOICES}]}
}
CHAT: Schema = fields(ChatRequest, *_CHAT, *_PARTICULAR) | _CHOICES | _USAGE
RESPONSE: Schema = (
    fields(ResponseCall)
    | fields(ChatRequest, "model", "temperature", "top_p", "stream")
    | {"max_output_tokens": fields(ChatRequest, "max_completion_tokens")["max_completion_tokens"]}
)
COMPLETION: Schema = (
    _PROMPTS | fields(ChatRequest, "model", *_SAMPLING, "logprobs", "logit_bias", "suffix", "raw") | _CHOICES | _USAGE
)
TOKENS: Schema = {"type": "object", "properties": {"input_tokens": {"type": "integer"}}, "required": ["input_tokens"]}
UPLOAD: Schema = {"file": TEXT | {"format": "binary"}, "purpose": TEXT | {"enum": ["batch"]}}
SHOW: Schema = {"model": TEXT | {"minLength": 1}}
PULL: Schema = SHOW | {"stream": {"type": "boolean", "default": True}}
ID: Schema = {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "maxLength": 128}}
MODEL_ID: Schema = {"name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
AFTER: Schema = {"name": "after", "in": "query", "schema": TEXT, "description": "List what follows this id."}
# Of a page of a list.
MOST_BATCHES, MOST_FILES = 100, 10_000
BATCHES_LIMIT, FILES_LIMIT = (
    {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": most}}
    for most in (MOST_BATCHES, MOST_FILES)
)
LAST_EVENT_ID = header("Last-Event-ID", "Send only the events after this one.", pattern="^[0-9]{0,18}$")
ASKING = (
    header("X-Priority", "The priority. The default is the key's, or medium.", enum=["high", "medium", "low"]),
    header("X-Request-Timeout", "The timeout in seconds.", pattern=r"^[0-9]{1,7}(\.[0-9]{1,6})?$"),
    header("X-Exact", "Whether the text must be exact, as with the field `exact`.", enum=["true", "false"]),
    header("Idempotency-Key", "Makes the request's id. Within two minutes the same key is the same request."),
    header("Prefer", "`respond-async`: respond with 202 at once, and keep the answer for a later read."),
    header("X-Headrace-Status", "`1`: a stream says where the request stands."),
    header("X-Headrace-Keep-Alive", "`1`: a whole response begins with white space while it waits."),
    header("traceparent", "W3C trace context. The request's spans join that trace."),
)
