"""Every endpoint of the gateway: those of other servers' APIs, and its own, each declared once."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.core.statistics import QueueStatistics
from pipeline.gateway import files, schemas
from pipeline.gateway.dialect_endpoints import DIALECT_ENDPOINTS
from pipeline.gateway.endpoint import BODY_ERRORS, SSE, USUAL_ERRORS, Access, Endpoint, Handler, Kind
from pipeline.gateway.parts import Parts, get
from pipeline.gateway.schemas import ANSWER, ID
from pipeline.wire.messages import Cancelled, Position
from pipeline.wire.pauses import MoveAllCall, MoveReport, PausedState, PriorityCall, ScopeCall
from pipeline.wire.usage import UsageReport

_LISTS, _STATISTICS = Kind.LISTS, Kind.STATISTICS


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


_QUEUE: tuple[Endpoint[Parts], ...] = (
    get(
        "/queue/stats",
        _STATISTICS,
        "Counts and waits per priority, and each engine's load",
        lambda parts: parts.queue.stats,
        tag="queue",
        answer=ANSWER[QueueStatistics],
    ),
    get(
        "/queue/usage",
        _STATISTICS,
        "Requests and tokens of each tenant and key, by hour, day and month",
        lambda parts: parts.usage.show,
        tag="queue",
        answer=ANSWER[UsageReport],
    ),
    get(
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
    get(
        "/queue/requests/{id}/events",
        _STATISTICS,
        "A request's messages, as they come",
        lambda parts: parts.queue.events,
        tag="queue",
        parameters=(ID, schemas.LAST_EVENT_ID),
        media=(SSE,),
        also={204: {"description": "No event follows that one."}},
    ),
    get(
        "/queue/live",
        _STATISTICS,
        "The dashboard's data: everything at first, then every change",
        lambda parts: parts.watch.live,
        tag="queue",
        media=(SSE,),
    ),
    get("/queue/dead", _STATISTICS, "Dead letters, newest first", lambda parts: parts.letters.list_all, tag="queue"),
    get(
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
    get(
        "/load",
        _STATISTICS,
        "Each engine's load, at every change",
        lambda parts: parts.queue.load,
        tag="queue",
        media=(SSE,),
    ),
)
_OPERATOR: tuple[Endpoint[Parts], ...] = (
    get(
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
    get(
        "/metrics",
        _STATISTICS,
        "Metrics for Prometheus",
        lambda parts: parts.probes.metrics,
        tag="gateway",
        media=("text/plain",),
    ),
    get(
        "/healthz",
        Kind.PROBES,
        "Whether the gateway is alive",
        lambda parts: parts.probes.healthz,
        tag="gateway",
        access=Access.OPEN,
        errors=frozenset(),
    ),
    get(
        "/readyz",
        Kind.PROBES,
        "Whether requests are answered now",
        lambda parts: parts.probes.readyz,
        tag="gateway",
        access=Access.OPEN,
        errors=frozenset({503}),
    ),
    get(
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
    return get(path, _LISTS, "", lambda _: handler, access=Access.OPEN)


_PAGES = tuple(_page(path, handler) for path, handler in files.handlers().items())
ENDPOINTS = (*DIALECT_ENDPOINTS, *_QUEUE, *_OPERATOR, *_ITSELF, *_PAGES)
