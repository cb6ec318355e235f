"""Turns an HTTP request into the message that is published: lane, id, timeout, trace. No I/O."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import NamedTuple

import msgspec

from pipeline.broker.asker import Outgoing
from pipeline.core.charging import charged
from pipeline.core.envelope import MAX_TIMEOUT_S
from pipeline.core.triage import Verdict, classify
from pipeline.gateway.dialects.shapes import Asked
from pipeline.gateway.identity import Caller, priority_of, request_id
from pipeline.gateway.statuses import HttpError
from pipeline.wire.errors import ErrorCode, HeadraceError, quoted
from pipeline.wire.messages import Load, StoreReport
from pipeline.wire.requests import ChatRequest, Request
from pipeline.wire.subjects import DUPLICATE_WINDOW_S, KEY, TENANT, TIMEOUT, Lane, Priority, Task

_SECONDS = re.compile(r"[0-9]{1,7}(\.[0-9]{1,6})?", re.ASCII)
# https://www.w3.org/TR/trace-context/. A request with another header starts its own trace.
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)
_MAX_TRACESTATE_CHARS = 512
# The most ids that are remembered, at about 200 bytes each.
_MOST_REPEATS = 20_000
# When to try again while the broker has no room.
_STORE_RETRY_S = 5.0


class Intake(NamedTuple):
    """A call for an answer, ready to be published.

    Attributes:
        outgoing: the request.
        priority: of the request.
        timeout_s: of the request, seconds; None without a timeout.
        respond_async: whether the caller reads the answer later (`Prefer: respond-async`).
        statuses: whether a stream says where the request stands (`X-Headrace-Status: 1`).
        spaces: whether a whole response begins with white space while it waits (`X-Headrace-Keep-Alive: 1`).
        key: the name of the API key that the request is charged to; empty without keys.
        idempotency_key: as the caller sent it; empty for none.
    """

    outgoing: Outgoing
    priority: Priority
    timeout_s: float | None
    respond_async: bool
    statuses: bool = False
    spaces: bool = False
    key: str = ""
    idempotency_key: str = ""


def take_in(caller: Caller, headers: Mapping[str, str], asked: Asked, *, default: Priority, saturated: bool) -> Intake:
    """Make the message of a call.

    Args:
        caller: of the HTTP request.
        headers: of the HTTP request, names in lower case.
        asked: its body, as it was read.
        default: the priority if neither the call nor the key has one.
        saturated: whether MLX is saturated. Only then the class of a request matters: a certain class is set here, the
            router finds out the others.

    Raises:
        HttpError: 400 or 403, for a header with a value that is not valid or not permitted.
    """
    priority, timeout_s = urgency(caller, headers, default=default)
    verdict = _verdict(asked.request) if saturated else None
    lane = Lane(priority, verdict.task if verdict else Task.UNTRIAGED, caller.owner)
    chosen, given = request_id(caller, headers)
    published: dict[str, str] = {}
    if timeout_s is not None:
        published[TIMEOUT] = f"{timeout_s:g}"
    if caller.tenant:
        published[TENANT] = caller.tenant
    if _TRACEPARENT.fullmatch(trace := headers.get("traceparent", "")):
        published["traceparent"] = trace
        state = headers.get("tracestate", "")
        if state and len(state) <= _MAX_TRACESTATE_CHARS and state.isascii() and state.isprintable():
            published["tracestate"] = state
    preferences = {part.strip().lower() for part in headers.get("prefer", "").split(",")}
    return Intake(
        Outgoing(chosen, lane.subject, asked.body, published, given_id=given, verdict=verdict),
        priority,
        timeout_s,
        "respond-async" in preferences,
        statuses=headers.get("x-headrace-status", "").strip() == "1",
        spaces=headers.get("x-headrace-keep-alive", "").strip() == "1",
        key="" if caller.key is None else caller.key.name,
        idempotency_key=headers.get("idempotency-key", ""),
    )


def with_charge(intake: Intake, secret: bytes) -> Outgoing:
    """The request as it is published, charged to its key. `secret` is the pipeline's."""
    outgoing = intake.outgoing
    if not intake.key:
        return outgoing
    charge = charged(secret, outgoing.name, outgoing.headers.get(TENANT, ""), intake.key)
    return outgoing._replace(headers={**outgoing.headers, KEY: charge})


def wants_exact(headers: Mapping[str, str]) -> bool:
    """Whether the header `X-Exact` asks for an exact text: the APIs of some clients have no place for the field.

    Raises:
        HttpError: 400, for another value than true or false.
    """
    said = headers.get("x-exact", "false")
    if said not in ("true", "false"):
        message = f"X-Exact must be true or false, not {quoted(said, 40)}."
        raise HttpError(400, ErrorCode.INVALID_REQUEST, message, param="X-Exact")
    return said == "true"


def with_exact(asked: Asked, headers: Mapping[str, str]) -> Asked:
    """The request with `exact` if the header asks for it; an `exact` in the body takes precedence. As `wants_exact`."""
    if not wants_exact(headers) or not isinstance(asked.request, ChatRequest) or asked.request.exact is not None:
        return asked
    # msgspec refuses halved characters, which a worker mends.
    body = json.dumps({**json.loads(asked.body), "exact": True}).encode()
    return asked._replace(request=msgspec.structs.replace(asked.request, exact=True), body=body)


def refused_by_store(store: StoreReport | None) -> HttpError | None:
    """The error of a new request that the broker has no room for, or cannot store; None if it can."""
    if store is None or not store.refuses:
        return None
    code = ErrorCode.QUEUE_FULL if store.state == "full" else ErrorCode.UNAVAILABLE
    return HttpError(503, code, f"{store.reason} Retry later.", retry_after_s=_STORE_RETRY_S)


def refused_by_tenants(load: Load | None, priority: Priority, tenant: str, most: int) -> HttpError | None:
    """The error of a new request if all named tenants together have the most requests of its priority; else None.

    Args:
        load: MLX's, if it is known.
        priority: the request's.
        tenant: in whose lane it is stored; empty for the default tenant, which has lanes of its own.
        most: the setting.
    """
    if not tenant or load is None or load.queued_tenants.of(priority) < most:
        return None
    message = (
        f"The tenants together have {most} queued requests of priority {priority} (tenants_max_messages). Retry later."
    )
    return HttpError(
        503, ErrorCode.QUEUE_FULL, message, retry_after_s=max(1.0, load.predicted_wait_ms.of(priority) / 1000)
    )


class Repeats:
    """Remembers the requests of recent ids that callers chose: an id that is used again must have the same request.

    Otherwise a client that uses one id for two requests would get the first one's answer twice. The broker remembers
    the ids for as long, and not the requests.
    """

    def __init__(self) -> None:
        self._asked: dict[str, tuple[float, bytes]] = {}  # by name, oldest first: when, and a digest

    def check(self, intake: Intake, request: Request, now: float) -> None:
        """Remember the request of an id that the caller chose. Whether it is streamed makes no difference.

        Args:
            intake: the call.
            request: its request.
            now: monotonic seconds.

        Raises:
            HeadraceError: `invalid_request`: the id was used for a different request.
        """
        if not intake.outgoing.given_id:
            return
        while self._asked:
            oldest, (at, _) = next(iter(self._asked.items()))
            if now - at < DUPLICATE_WINDOW_S and len(self._asked) < _MOST_REPEATS:
                break
            del self._asked[oldest]
        if isinstance(request, ChatRequest):
            request = msgspec.structs.replace(request, stream=None)
        digest = blake2b(msgspec.json.encode(request), digest_size=16).digest()
        if self._asked.setdefault(intake.outgoing.name, (now, digest))[1] != digest:
            raise HeadraceError(
                ErrorCode.INVALID_REQUEST,
                f"Idempotency key {quoted(intake.idempotency_key, 128)} was used for a different request "
                "less than 2 minutes ago. Use a new key.",
            )


def urgency(caller: Caller, headers: Mapping[str, str], *, default: Priority) -> tuple[Priority, float | None]:
    """The priority of a call, and its timeout in seconds; raises HttpError as `take_in`."""
    return priority_of(caller, headers.get("x-priority"), default), _timeout_s(headers)


def _timeout_s(headers: Mapping[str, str]) -> float | None:
    for name in ("X-Request-Timeout", "Timeout"):
        if (given := headers.get(name.lower())) is None:
            continue
        seconds = float(given) if _SECONDS.fullmatch(given.strip()) else 0.0
        if not 0 < seconds <= MAX_TIMEOUT_S:
            raise HttpError(
                400,
                ErrorCode.INVALID_REQUEST,
                f"{name} must be a number of seconds above 0 and at most {MAX_TIMEOUT_S:.0f}, not {quoted(given, 40)}.",
                param=name,
            )
        return seconds
    return None


def _verdict(request: Request) -> Verdict | None:
    verdict = classify(request, None)
    return verdict if verdict.certain else None
