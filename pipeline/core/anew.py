"""A cancelled request that is sent again under its id starts over, as a replayed dead letter does.

The broker refuses an id for two minutes after it was used. But a cancelled request has no answer, so a client that
sends it again must not get the error of the first call.
"""

from __future__ import annotations

from pipeline.core.moves import MoveIds
from pipeline.wire.answers import Answer, ErrorAnswer
from pipeline.wire.errors import ErrorCode
from pipeline.wire.subjects import ANEW, MOVED_REASON, MOVED_STORED_AT, MSG_ID, Move

REASON = "sent again after it was cancelled"


def cancelled_at(last: Answer) -> int | None:
    """When the request whose record ends with this message was stored, UTC seconds; None if it was not cancelled."""
    is_cancelled = isinstance(last, ErrorAnswer) and last.error.code is ErrorCode.CANCELLED
    return last.created if is_cancelled else None


def headers_anew(request_id: str, sequence: int, created: int, wall_now: float, ids: MoveIds) -> dict[str, str]:
    """The headers with which a cancelled request is stored again.

    Args:
        request_id: its id.
        sequence: of the last message of its record. The message id is made from it, so two calls that ask again at once
            store one request.
        created: when the cancelled request was stored, UTC seconds. The new one has a later second, which distinguishes
            its record.
        wall_now: UTC seconds.
        ids: makes the message id.
    """
    return {
        MSG_ID: ids.make(request_id, Move.REPLAYED, sequence, created),
        MOVED_STORED_AT: repr(max(wall_now, created + 1.0)),
        MOVED_REASON: REASON,
        ANEW: str(sequence),
    }
