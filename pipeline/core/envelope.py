"""A request's subject, headers and broker metadata, read without its body. Errors in them are kept as `fault`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from pipeline.core.charging import charged_key, charged_tenant
from pipeline.core.moves import MoveIds
from pipeline.wire.errors import ErrorCode, HeadraceError, quoted
from pipeline.wire.subjects import (
    ANEW,
    BATCH,
    KEY,
    MOVED_BY,
    MOVED_REASON,
    MOVED_STORED_AT,
    MSG_ID,
    REPLY_TO,
    STREAM_OLLAMA,
    TASK,
    TENANT,
    TENANT_ADVICE,
    TIMEOUT,
    Move,
    Priority,
    Task,
    generated_id,
    is_generated_id,
    is_reply_to,
    is_request_id,
    is_tenant,
    reply_subject,
    request_name,
    split_name,
    stream_of,
    tenant_of,
)
from pipeline.wire.usage import DEFAULT_TENANT

MAX_TIMEOUT_S = 30 * 24 * 3600.0
# The largest difference between the clocks of two brokers. Apart from it, a move is later than what it moves.
_CLOCK_SKEW_S = 60.0
_REASON_MAX_CHARS = 300
_TENANT_MAX_CHARS = 128
# Stricter than `float`, which also accepts a sign, names such as `inf`, and digits of other scripts.
_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?", re.ASCII)


class StoredRequest(Protocol):
    """A request as a stream stores or delivers it."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The publisher's headers and the broker's."""
        ...

    @property
    def subject(self) -> str:
        """The message's subject."""
        ...

    @property
    def sequence(self) -> int:
        """The message's sequence in its stream."""
        ...

    @property
    def stored_at(self) -> float:
        """When that stream stored the message, UTC seconds."""
        ...

    @property
    def delivered(self) -> int:
        """How often the message was delivered, from 1; also 1 for a message that was read and not delivered."""
        ...


@dataclass(frozen=True, slots=True)
class Envelope:
    """A request's subject, headers and broker metadata.

    Attributes:
        id: the request's id, valid even if the headers are not. It is unique within `owner`.
        priority: from the subject.
        task: from the subject, else `Llm-Task`, else untriaged.
        stored_at: when the broker first stored the request, UTC seconds.
        delivered: how often this message was delivered, from 1.
        move: the move that stored this message, or None if the publisher stored it.
        move_reason: why it was moved.
        anew: whether it was sent again after it was cancelled.
        reply_to: where the answer goes besides the record, or None.
        deadline: when the request's timeout ends, UTC seconds, or None.
        owner: the tenant whose subject it was published to; empty for the default tenant.
        tenant: the tenant that the request is for: the owner, or else what `Llm-Tenant` says.
        key: the API key that it is charged to; empty without one.
        charged_to: the tenant that it is charged to.
        batch: whether it is a line of a batch.
        fault: the error in the headers with which the request is refused, or None.
    """

    id: str
    priority: Priority
    task: Task
    stored_at: float
    delivered: int
    move: Move | None = None
    move_reason: str = ""
    anew: bool = False
    reply_to: str | None = None
    deadline: float | None = None
    owner: str = ""
    tenant: str = ""
    key: str = ""
    charged_to: str = DEFAULT_TENANT
    batch: bool = False
    fault: HeadraceError | None = None

    @property
    def name(self) -> str:
        """The request's name, unique among all tenants."""
        return request_name(self.owner, self.id)

    @property
    def created(self) -> int:
        """The second in which the request was stored. It separates its record from an older one under the same id."""
        return int(self.stored_at)

    @property
    def seed(self) -> int:
        """The seed of a request that has none of its own. Every attempt computes the same one."""
        digest = hashlib.blake2b(f"{self.id}@{self.created}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big")


def read_envelope(
    stored: StoredRequest,
    priority: Priority,
    task: Task = Task.UNTRIAGED,
    *,
    moves: MoveIds,
    default_timeout_s: float | None = None,
) -> Envelope:
    """Read the headers of a stored request. Never raises: an error in them is kept in `fault`.

    Args:
        stored: the request.
        priority, task: the lane's.
        moves: reads the ids of moved requests.
        default_timeout_s: the timeout of requests that name none.
    """
    headers = stored.headers
    owner, request_id, move, bad_id = _read_id(stored, moves)
    name = request_name(owner, request_id)
    task, bad_task = _read_task(headers, task, move)
    reply_to, denied = _read_reply_to(headers, name)
    stored_at = _first_stored_at(headers, stored.stored_at) if move else stored.stored_at
    timeout_s, bad_timeout = _read_timeout(headers, default_timeout_s)
    tenant, key, charged_to = _read_charged(headers, owner, name, moves.key)
    return Envelope(
        id=request_id,
        priority=priority,
        task=task,
        stored_at=stored_at,
        delivered=stored.delivered,
        move=move,
        move_reason=headers.get(MOVED_REASON, "")[:_REASON_MAX_CHARS] if move else "",
        anew=move is not None and ANEW in headers,
        reply_to=reply_to,
        deadline=None if timeout_s is None else stored_at + timeout_s,
        owner=owner,
        tenant=tenant,
        key=key,
        charged_to=charged_to,
        batch=BATCH in headers,
        fault=denied or bad_id or bad_timeout or bad_task,
    )


def _read_id(stored: StoredRequest, moves: MoveIds) -> tuple[str, str, Move | None, HeadraceError | None]:
    """The owner, and the id; the broker's id, if the publisher gave none or an invalid one."""
    given, sequence, stream = stored.headers.get(MSG_ID), stored.sequence, stream_of(stored.subject)
    owner = tenant_of(stored.subject)
    if owner and not is_tenant(owner):
        return "", generated_id(sequence), None, _bad_tenant()
    if not given:
        return owner, generated_id(sequence), None, None
    named, move = moves.read(given, stream, sequence)
    if move is Move.REPLAYED and MOVED_BY in stored.headers:
        move = Move.PRIORITY
    # The name's tenant counts where only the pipeline stores requests: their subjects name none.
    tenant, request_id = split_name(named)
    if stream == STREAM_OLLAMA and is_tenant(tenant):
        owner = tenant
    if tenant in ("", owner) and is_request_id(request_id) and (move or not is_generated_id(request_id)):
        return owner, request_id, move, None
    return owner, generated_id(sequence), None, _bad_id(given, owner)


def _first_stored_at(headers: Mapping[str, str], stored_at: float) -> float:
    first = _number(headers.get(MOVED_STORED_AT, ""))
    return first if first and first < stored_at + _CLOCK_SKEW_S else stored_at


def _read_reply_to(headers: Mapping[str, str], name: str) -> tuple[str | None, HeadraceError | None]:
    """Where the answer goes besides the record."""
    given = headers.get(REPLY_TO)
    if given is None or is_reply_to(given, name):
        return None if given == reply_subject(name) else given, None
    hint = (
        f"Reply-To {quoted(given)} is not allowed. Use a subject under `_INBOX.` or `llm.reply.` without wildcards, of "
        "at most 256 characters, that does not belong to another tenant or to an id assigned by the broker. This error "
        f"was sent to {reply_subject(name)}."
    )
    return None, HeadraceError(ErrorCode.REPLY_SUBJECT_DENIED, hint, param=REPLY_TO)


def _read_timeout(headers: Mapping[str, str], default_s: float | None) -> tuple[float | None, HeadraceError | None]:
    given = headers.get(TIMEOUT)
    if given is None:
        return default_s, None
    timeout_s = _number(given)
    if timeout_s is None or not 0 < timeout_s <= MAX_TIMEOUT_S:
        return None, _invalid(TIMEOUT, given, f"a number of seconds above 0 and at most {MAX_TIMEOUT_S:.0f}")
    return timeout_s, None


def _read_task(headers: Mapping[str, str], lane: Task, move: Move | None) -> tuple[Task, HeadraceError | None]:
    """The lane's task. What the publisher says counts if the lane has none, or if a move chose the lane."""
    given = headers.get(TASK)
    if not given or (lane is not Task.UNTRIAGED and move is None):
        return lane, None
    try:
        return Task(given.strip().lower()), None
    except ValueError:
        return lane, _invalid(TASK, given, "simple or complex")


def _read_charged(headers: Mapping[str, str], owner: str, name: str, secret: bytes) -> tuple[str, str, str]:
    """The tenant that the request is for, and the key and the tenant that it is charged to."""
    claimed = headers.get(TENANT, "")[:_TENANT_MAX_CHARS]
    key = charged_key(secret, name, claimed, headers.get(KEY, ""))
    return owner or claimed, key, charged_tenant(owner, claimed, key)


def _number(text: str) -> float | None:
    if _NUMBER.fullmatch(text.strip()) is None:
        return None
    value = float(text)
    return value if value < float("inf") else None


def _bad_tenant() -> HeadraceError:
    return HeadraceError(
        ErrorCode.INVALID_REQUEST, f"The tenant in the subject is not valid. {TENANT_ADVICE}", param="tenant"
    )


def _bad_id(given: str, tenant: str) -> HeadraceError:
    own = f", or t.{tenant}.ID" if tenant else ""
    message = (
        f'{MSG_ID} {quoted(given)} is not a valid request id. Use 1 to 128 letters, digits, "-" or "_"{own}. The '
        "broker assigns the ids LLM-<number>."
    )
    return HeadraceError(ErrorCode.INVALID_REQUEST, message, param=MSG_ID)


def _invalid(header: str, given: str, accepted: str) -> HeadraceError:
    message = f"{header} must be {accepted}, not {quoted(given)}."
    return HeadraceError(ErrorCode.INVALID_REQUEST, message, param=header)
