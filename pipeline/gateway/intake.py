"""From an HTTP request that was read to the message that is published: lane, id, deadline, trace. No I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import NamedTuple

import msgspec

from pipeline.broker.asker import Outgoing
from pipeline.core.envelope import MAX_TIMEOUT_S
from pipeline.core.triage import classify
from pipeline.gateway.dialects.shapes import Asked
from pipeline.gateway.identity import Caller, priority_of, request_id
from pipeline.gateway.statuses import HttpError
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatRequest, Request
from pipeline.wire.subjects import DUPLICATE_WINDOW_S, TENANT, TIMEOUT, Lane, Priority, Task

_SECONDS = re.compile(r"[0-9]{1,7}(\.[0-9]{1,6})?", re.ASCII)
# https://www.w3.org/TR/trace-context/: anything else starts a trace of its own.
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)
_MAX_TRACESTATE_CHARS = 512
# As many ids are remembered at most, with some 200 bytes for each.
_MOST_REPEATS = 20_000


class Intake(NamedTuple):
    """A call for an answer, ready to be published.

    Attributes:
        outgoing: the request.
        priority: that it has.
        timeout_s: after which nobody wants the answer, or None.
        respond_async: whether the caller goes away at once, and reads the answer later.
    """

    outgoing: Outgoing
    priority: Priority
    timeout_s: float | None
    respond_async: bool


def take_in(caller: Caller, headers: Mapping[str, str], asked: Asked, *, default: Priority, saturated: bool) -> Intake:
    """Make the message of a call.

    Args:
        caller: who calls.
        headers: of the HTTP request, names in lower case.
        asked: its body, read.
        default: the priority of a call that names none, by a caller without a key.
        saturated: whether MLX is: only then does the class of a request matter, and what is beyond doubt about it is
            said here; the rest is found out by the router.

    Raises:
        HttpError: 400 or 403, for headers that cannot be followed.
    """
    priority, timeout_s = urgency(caller, headers, default=default)
    lane = Lane(priority, _task(asked.request) if saturated else Task.UNTRIAGED)
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
        Outgoing(chosen, lane.subject, asked.body, published, given_id=given),
        priority,
        timeout_s,
        "respond-async" in preferences,
    )


class Repeats:
    """What was asked under the ids that callers gave lately: an id that comes again must mean the same request.

    Otherwise who sends one id with two questions would be given the first one's answer to both. The broker remembers
    ids for as long, and not what they stood for.
    """

    def __init__(self) -> None:
        self._asked: dict[str, tuple[float, bytes]] = {}  # by id, the oldest first: when, and a digest

    def check(self, intake: Intake, request: Request, now: float) -> None:
        """Remember what is asked under an id that the caller gave; whether it is streamed makes no difference.

        Args:
            intake: the call.
            request: what it asks for.
            now: on a clock that never goes back.

        Raises:
            HeadraceError: `invalid_request` where something else was asked under the id.
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
        if self._asked.setdefault(intake.outgoing.id, (now, digest))[1] != digest:
            raise HeadraceError(
                ErrorCode.INVALID_REQUEST,
                f"under the id {intake.outgoing.id} something else was asked within two minutes: use another",
            )


def urgency(caller: Caller, headers: Mapping[str, str], *, default: Priority) -> tuple[Priority, float | None]:
    """The priority of a call, and after how many seconds nobody wants its answer; raises HttpError as `take_in`."""
    return priority_of(caller, headers.get("x-priority"), default), _timeout_s(headers)


def _timeout_s(headers: Mapping[str, str]) -> float | None:
    for name in ("x-request-timeout", "timeout"):
        if (given := headers.get(name)) is None:
            continue
        seconds = float(given) if _SECONDS.fullmatch(given.strip()) else 0.0
        if not 0 < seconds <= MAX_TIMEOUT_S:
            raise HttpError(400, ErrorCode.INVALID_REQUEST, f"{name} must be a number of seconds above 0", param=name)
        return seconds
    return None


def _task(request: Request) -> Task:
    verdict = classify(request, None)
    return verdict.task if verdict.certain else Task.UNTRIAGED
