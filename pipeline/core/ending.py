"""How a request ends: what is told of it."""

from __future__ import annotations

from pipeline.core.envelope import Envelope
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import EngineName, EventKind, RequestEvent

_EVENT_OF_CODE: dict[ErrorCode, EventKind] = {
    ErrorCode.CANCELLED: "cancelled",
    ErrorCode.DEADLINE_EXCEEDED: "expired",
}


def ended_event(envelope: Envelope, error: HeadraceError, *, engine: EngineName | None = None) -> RequestEvent:
    """The event of a request that ended with error."""
    kind = _EVENT_OF_CODE.get(error.code, "failed")
    return RequestEvent(envelope.id, kind, envelope.priority, engine, code=error.code, tenant=envelope.tenant)
