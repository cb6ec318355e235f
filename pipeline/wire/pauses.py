"""What is paused, and the calls of an operator: pause, resume, change the priority of what is queued.

All of it is JSON. The state is one message, the last one on `llm.paused`.

A call with an unknown field is refused, because without it the call would concern more requests than its sender meant.
For the same reason no id, batch or tenant of a move is empty: a script with an unset variable sends such a value.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from pipeline.wire.errors import ErrorCode
from pipeline.wire.subjects import Priority

# The name of the tenant whose lanes have plain subjects.
DEFAULT_TENANT = "default"

_Name = Annotated[str, Meta(min_length=1)]


class Pause(Struct, frozen=True, omit_defaults=True):
    """One pause: of a lane, of a tenant, or of one lane of a tenant.

    Attributes:
        priority: the lane; None for all lanes of the tenant.
        tenant: its name, `default` for the default tenant; None for all tenants.
        by: who paused it.
        at: when, UTC seconds.
        reason: what was said about it.
    """

    priority: Priority | None = None
    tenant: str | None = None
    by: str = ""
    at: float = 0.0
    reason: str = ""


class PauseAction(Struct, frozen=True, omit_defaults=True):
    """One entry of the log: a pause that began or ended. The fields are as in `Pause`."""

    action: Literal["pause", "resume"]
    priority: Priority | None = None
    tenant: str | None = None
    by: str = ""
    at: float = 0.0
    reason: str = ""


class PausedState(Struct, frozen=True):
    """The body of `llm.paused`, and the answer to every call about pauses.

    Attributes:
        pauses: what is paused now, the oldest first.
        log: the latest actions, the oldest first.
    """

    object: str = "headrace.paused"
    pauses: list[Pause] = field(default_factory=list)
    log: list[PauseAction] = field(default_factory=list)


class PauseCall(Struct, omit_defaults=True, forbid_unknown_fields=True):
    """The body of `llm.queue.pause` and `llm.queue.resume`. The fields are as in `Pause`."""

    priority: Priority | None = None
    tenant: str | None = None
    by: str = ""
    reason: str = ""


class MoveCall(Struct, omit_defaults=True, forbid_unknown_fields=True):
    """The body of `llm.queue.move`: which queued requests get another priority.

    Attributes:
        priority: the new one.
        id: of one request.
        batch: the id of a batch: its queued lines.
        tenant: all queued requests of a tenant; with an id, whose request it is.
        by: who moves them.
        reason: what was said about it.
    """

    priority: Priority
    id: _Name = ""
    batch: _Name = ""
    tenant: _Name | None = None
    by: str = ""
    reason: str = ""


class MoveReport(Struct):
    """The answer to a `MoveCall`.

    Attributes:
        moved: how many requests were moved.
        left: how many were not, by the reason: `running`, `there` (they had that priority), `gone` (they ended
            meanwhile), `full` (the lane had no room), `too_large` (the broker would not take the request with the
            headers of a move), `invalid` (their headers are).
    """

    priority: Priority
    moved: int = 0
    left: dict[str, int] = field(default_factory=dict)
    object: str = "headrace.moved"


class PriorityCall(Struct, forbid_unknown_fields=True):
    """The HTTP body of a change of one request's priority."""

    priority: Priority
    reason: str = ""


class ScopeCall(Struct, omit_defaults=True, forbid_unknown_fields=True):
    """The HTTP body of a pause or a resume: a lane, a tenant, or a lane of a tenant."""

    priority: Priority | None = None
    tenant: str | None = None
    reason: str = ""


class MoveAllCall(Struct, omit_defaults=True, forbid_unknown_fields=True):
    """The HTTP body of a change of the priority of all queued requests of a tenant or a batch."""

    priority: Priority
    tenant: _Name | None = None
    batch: _Name = ""
    reason: str = ""


class CallRefused(Struct):
    """The answer to a call of an operator that was refused."""

    code: ErrorCode = ErrorCode.INVALID_REQUEST
    message: str = ""
    object: str = "headrace.refused"
