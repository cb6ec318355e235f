"""The OpenAPI document of the gateway, made from the declarations of its endpoints. No I/O."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pipeline import __version__
from pipeline.gateway.endpoint import Endpoint, Schema
from pipeline.gateway.schemas import COMPONENTS

# Every error status, for the document's components.
ERRORS = {
    400: "The request is not valid.",
    401: "The API key is missing or unknown.",
    403: "The API key does not permit this.",
    404: "No such model, request or path.",
    408: "The body did not arrive in time.",
    409: "The request is not in a state in which this is possible.",
    413: "The request is too large.",
    415: "The body is compressed.",
    429: "Rate limit exceeded. `Retry-After` has the seconds until the next call fits.",
    499: "The request was cancelled.",
    502: "The request failed on every attempt.",
    503: "The queue is full, or the pipeline is unavailable. `Retry-After` has the seconds to wait.",
    504: "The deadline passed before the answer was complete.",
}


def openapi(endpoints: Iterable[Endpoint[Any]], *, with_keys: bool) -> Schema:
    """The document; with_keys is whether an API key is required."""
    paths: dict[str, Schema] = {}
    for endpoint in endpoints:
        if endpoint.summary:
            path = endpoint.path.replace(":path}", "}")
            paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint)
    responses = {str(status): {"description": text} for status, text in ERRORS.items()}
    components: Schema = {"responses": responses, "schemas": COMPONENTS}
    document: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": "headrace",
            "version": __version__,
            "description": "A priority queue for local LLM engines, with the APIs of OpenAI, Anthropic and Ollama.",
        },
        "paths": paths,
        "components": components,
    }
    if with_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _operation(endpoint: Endpoint[Any]) -> Schema:
    operation: Schema = {
        "summary": endpoint.summary,
        "tags": [endpoint.tag],
        "parameters": list(endpoint.parameters),
    }
    if endpoint.body is not None:
        body = {"type": "object", "properties": endpoint.body, "required": list(endpoint.required)}
        operation["requestBody"] = {"required": True, "content": {endpoint.takes: {"schema": body}}}
    content = {media: {"schema": {} if index else endpoint.answer} for index, media in enumerate(endpoint.media)}
    responses: Schema = {str(endpoint.status): {"description": "Done.", "content": content}}
    responses |= {str(status): response for status, response in endpoint.also.items()}
    responses |= {str(status): {"$ref": f"#/components/responses/{status}"} for status in sorted(endpoint.errors)}
    return operation | {"responses": responses}
