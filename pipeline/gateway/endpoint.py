"""The declaration of an endpoint: its route, its kind for rate limits, who can call, and its OpenAPI. No I/O."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from re import Pattern
from typing import Any, Generic, TypeVar

from starlette.requests import Request
from starlette.routing import Route, compile_path
from starlette.types import ASGIApp

Schema = dict[str, Any]
Handler = Callable[[Request], Awaitable[ASGIApp]]
_Parts = TypeVar("_Parts")

JSON = "application/json"
SSE = "text/event-stream"
MULTIPART = "multipart/form-data"
JSONL = "application/jsonl"
# The errors that most endpoints have: bad request, no key, not permitted, not found, rate limit, unavailable.
USUAL_ERRORS = frozenset({400, 401, 403, 404, 429, 503})
# And those of endpoints that read a body: too slow, too large, compressed.
BODY_ERRORS = frozenset({408, 413, 415})


class Kind(StrEnum):
    """The purpose of a call. Each kind has its own rate limits."""

    ANSWERS = "answers"
    LISTS = "lists"
    STATISTICS = "statistics"
    PROBES = "probes"


class Access(StrEnum):
    """Who can call, where API keys are in use. What a key can see and cancel is decided by the handler."""

    KEY = "key"
    OPEN = "open"


@dataclass(frozen=True, slots=True)
class Endpoint(Generic[_Parts]):
    """One method of one path.

    Attributes:
        method: of HTTP.
        path: as Starlette writes it; `{id:path}` matches slashes too.
        kind: for rate limits. All endpoints of a path have the same.
        summary: for the OpenAPI document; empty for a page, which is not in the document.
        serve: gives the handler, from the parts of the gateway.
        tag: the group in the document.
        access: who can call.
        parameters: of the path and the headers, as OpenAPI has them.
        body: the properties of the JSON body; None without a body.
        required: the properties that the body must have.
        takes: the media type of the body.
        answer: the schema of the response with status 200.
        media: the media types of that response, the usual one first. Only the first has the schema.
        status: of the usual response.
        also: other responses without an error, by status.
        errors: the statuses of the errors.
    """

    method: str
    path: str
    kind: Kind
    summary: str
    serve: Callable[[_Parts], Handler]
    tag: str = ""
    access: Access = Access.KEY
    parameters: tuple[Schema, ...] = ()
    body: Schema | None = None
    required: tuple[str, ...] = ()
    takes: str = JSON
    answer: Schema = field(default_factory=dict)
    media: tuple[str, ...] = (JSON,)
    status: int = 200
    also: Mapping[int, Schema] = field(default_factory=dict)
    errors: frozenset[int] = USUAL_ERRORS

    def route(self, parts: _Parts) -> Route:
        """The route to the handler."""
        return Route(self.path, self.serve(parts), methods=[self.method])


class Directory:
    """Finds the endpoints of a path, with the patterns that Starlette routes by."""

    def __init__(self, endpoints: Iterable[Endpoint[Any]]) -> None:
        self._plain: dict[str, Endpoint[Any]] = {}
        self._patterns: list[tuple[Pattern[str], Endpoint[Any]]] = []
        for endpoint in endpoints:
            self._plain.setdefault(endpoint.path, endpoint)
            self._patterns.append((compile_path(endpoint.path)[0], endpoint))

    def find(self, path: str) -> Endpoint[Any] | None:
        """An endpoint of the path, in any method; None for an unknown path."""
        found = self._plain.get(path)
        return found or next((endpoint for pattern, endpoint in self._patterns if pattern.match(path)), None)
