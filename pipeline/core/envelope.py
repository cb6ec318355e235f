"""What subject, headers and the broker say of a request, its body unread; what is wrong with them stands in it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.subjects import (
    MOVED_REASON,
    MOVED_STORED_AT,
    MSG_ID,
    REPLY_TO,
    TASK,
    TENANT,
    TIMEOUT,
    Move,
    Priority,
    Task,
    generated_id,
    is_generated_id,
    is_reply_to,
    is_request_id,
    reply_subject,
    split_moved_id,
)

MAX_TIMEOUT_S = 30 * 24 * 3600.0
# How far the clocks of two brokers may be apart. A move cannot be older than what it moves, but for that.
_CLOCK_SKEW_S = 60.0
_REASON_MAX_CHARS = 300
_TENANT_MAX_CHARS = 128
# As people write one: no sign, no name such as `inf`, no digits of other scripts, all of which `float` takes.
_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?", re.ASCII)


class StoredRequest(Protocol):
    """A request as a stream holds it or hands it over."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The publisher's, with those of the broker."""
        ...

    @property
    def sequence(self) -> int:
        """Of the message in its stream."""
        ...

    @property
    def stored_at(self) -> float:
        """When that stream stored it, UTC seconds."""
        ...

    @property
    def delivered(self) -> int:
        """How often it was handed over, from 1; 1 as well for one that only stands there."""
        ...


@dataclass(frozen=True, slots=True)
class Envelope:
    """What subject, headers and the broker say of a request, its body unread.

    Attributes:
        id: the request's id, valid also where the headers were not.
        priority: from the subject.
        task: from the subject, else `Llm-Task`, else untriaged.
        stored_at: when the broker first stored the request, UTC seconds.
        delivered: how often the message in hand was delivered, from 1.
        move: what the pipeline did to the request before, if it did.
        move_reason: why.
        reply_to: where the answer goes besides the record, or None.
        deadline: UTC seconds after which nobody wants the answer, or None.
        tenant: whom it is for.
        fault: what was wrong with the headers, to be answered instead of serving the request.
    """

    id: str
    priority: Priority
    task: Task
    stored_at: float
    delivered: int
    move: Move | None = None
    move_reason: str = ""
    reply_to: str | None = None
    deadline: float | None = None
    tenant: str = ""
    fault: HeadraceError | None = None

    @property
    def created(self) -> int:
        """Tells this request's record from an older one under the same id: the second in which it was stored."""
        return int(self.stored_at)

    @property
    def seed(self) -> int:
        """A seed for a request that brought none: the same whoever serves it."""
        digest = hashlib.blake2b(f"{self.id}@{self.created}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big")


def read_envelope(
    stored: StoredRequest, priority: Priority, task: Task = Task.UNTRIAGED, *, default_timeout_s: float | None = None
) -> Envelope:
    """Read the headers of a stored request. Never raises: what is wrong with them stands in `fault`.

    Args:
        stored: the request.
        priority: of the lane it came from.
        task: of the lane it came from.
        default_timeout_s: for requests that name no timeout.
    """
    headers = stored.headers
    request_id, move, bad_id = _read_id(headers, stored.sequence)
    stored_at = _first_stored_at(headers, stored.stored_at) if move else stored.stored_at
    reply_to, denied = _read_reply_to(headers, request_id)
    timeout_s, bad_timeout = _read_timeout(headers, default_timeout_s)
    bad_task = None
    if task is Task.UNTRIAGED or move:
        task, bad_task = _read_task(headers, task)
    return Envelope(
        id=request_id,
        priority=priority,
        task=task,
        stored_at=stored_at,
        delivered=stored.delivered,
        move=move,
        move_reason=headers.get(MOVED_REASON, "")[:_REASON_MAX_CHARS] if move else "",
        reply_to=None if reply_to == reply_subject(request_id) else reply_to,
        deadline=None if timeout_s is None else stored_at + timeout_s,
        tenant=headers.get(TENANT, "")[:_TENANT_MAX_CHARS],
        fault=denied or bad_id or bad_timeout or bad_task,
    )


def _read_id(headers: Mapping[str, str], sequence: int) -> tuple[str, Move | None, HeadraceError | None]:
    """The id; the one that the broker gives where the publisher brought none, or a bad one."""
    given = headers.get(MSG_ID)
    if not given:
        return generated_id(sequence), None, None
    named, move = split_moved_id(given)
    if is_request_id(named) and (move or not is_generated_id(named)):
        return named, move, None
    hint = "an id has 1 to 128 of A-Z a-z 0-9 _ -, and `LLM-<number>` is the broker's to give"
    return generated_id(sequence), None, _invalid(MSG_ID, hint)


def _first_stored_at(headers: Mapping[str, str], stored_at: float) -> float:
    first = _number(headers.get(MOVED_STORED_AT, ""))
    return first if first and first < stored_at + _CLOCK_SKEW_S else stored_at


def _read_reply_to(headers: Mapping[str, str], request_id: str) -> tuple[str | None, HeadraceError | None]:
    given = headers.get(REPLY_TO)
    if given is None or is_reply_to(given, request_id):
        return given, None
    hint = (
        "Reply-To must be a literal subject under `_INBOX.` or `llm.reply.`; "
        f"this error was sent to {reply_subject(request_id)}"
    )
    return None, HeadraceError(ErrorCode.REPLY_SUBJECT_DENIED, hint, param=REPLY_TO)


def _read_timeout(headers: Mapping[str, str], default_s: float | None) -> tuple[float | None, HeadraceError | None]:
    given = headers.get(TIMEOUT)
    if given is None:
        return default_s, None
    timeout_s = _number(given)
    if timeout_s is None or not 0 < timeout_s <= MAX_TIMEOUT_S:
        return None, _invalid(TIMEOUT, f"give a number of seconds above 0, at most {MAX_TIMEOUT_S:.0f}")
    return timeout_s, None


def _read_task(headers: Mapping[str, str], otherwise: Task) -> tuple[Task, HeadraceError | None]:
    given = headers.get(TASK)
    if not given:
        return otherwise, None
    try:
        return Task(given.strip().lower()), None
    except ValueError:
        return otherwise, _invalid(TASK, "the task is `simple` or `complex`")


def _number(text: str) -> float | None:
    if _NUMBER.fullmatch(text.strip()) is None:
        return None
    value = float(text)
    return value if value < float("inf") else None


def _invalid(header: str, message: str) -> HeadraceError:
    return HeadraceError(ErrorCode.INVALID_REQUEST, f"bad header {header}: {message}", param=header)
