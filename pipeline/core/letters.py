"""Dead letters: the stored form of a request that failed on every attempt, and its replay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from pipeline.core.envelope import Envelope
from pipeline.core.moves import MoveIds
from pipeline.wire.answers import ErrorBody
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.subjects import (
    DEAD,
    DEAD_ATTEMPTS,
    DEAD_ERROR,
    DEAD_ID,
    DEAD_SUBJECT,
    DEAD_TRACE_ID,
    MOVED_BY,
    MOVED_REASON,
    MOVED_STORED_AT,
    MSG_ID,
    Lane,
    Move,
    Priority,
    Task,
    carried,
    is_request_name,
    lane_of_subject,
    split_name,
)
from pipeline.wire.validation import UNREADABLE

REPLAY_REASON = "replayed from the dead letters"
_MAX_DIGITS = 30
_OURS = frozenset(
    {DEAD_ID, DEAD_SUBJECT, DEAD_ERROR, DEAD_ATTEMPTS, DEAD_TRACE_ID, MOVED_BY, MOVED_STORED_AT, MOVED_REASON}
)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One dead letter.

    Attributes:
        id: the request's name.
        priority: its own.
        sequence: the letter's in `LLM_DEAD`.
        died_at: when the letter was stored, UTC seconds.
        created: when the request was stored, UTC seconds; it distinguishes records of the same id.
        subject: the request's subject at its end.
        error: the error that its client got.
        attempts: the number of its attempts.
        trace_id: of its trace; empty if none was recorded.
        headers: the request's own.
        body: as it was published.
    """

    id: str
    priority: Priority
    sequence: int
    died_at: float
    created: int
    subject: str
    error: ErrorBody
    attempts: int
    trace_id: str
    headers: Mapping[str, str]
    body: bytes

    def replay(self, wall_now: float, ids: MoveIds) -> tuple[str, dict[str, str]]:
        """The subject and headers under which the request is stored again, at wall_now (UTC seconds).

        It keeps its id, so that a client finds the new answer under it, and its publisher's headers. Its timeout begins
        again. Its time is always in a later second than before: that distinguishes its record from the ended one, whose
        answer is replaced. The message id is made from the letter, so that replaying a letter twice stores one request.
        A request that was spilled starts on its own lane again.
        """
        tenant = split_name(self.id)[0] if is_request_name(self.id) else ""
        lane = lane_of_subject(self.subject) or Lane(self.priority, Task.UNTRIAGED, tenant)
        own = {
            MSG_ID: ids.make(self.id, Move.REPLAYED, self.sequence, self.died_at),
            MOVED_STORED_AT: repr(max(wall_now, self.created + 1.0)),
            MOVED_REASON: REPLAY_REASON,
        }
        return lane.subject, {**self.headers, **own}


def letter_headers(
    envelope: Envelope,
    headers: Mapping[str, str],
    *,
    subject: str,
    sequence: int,
    error: HeadraceError,
    attempts: int,
    trace_id: str,
) -> dict[str, str]:
    """The headers of a dead letter.

    Args:
        envelope: the request's.
        headers: the request's, as it was delivered.
        subject: of the delivered message.
        sequence: of the delivered message. The letter's message id is made from it: burying a request again, after a
            crash between the letter and the ack, stores one letter, and another request of the same id gets its own.
        error: the error that its client gets.
        attempts: the number of its attempts.
        trace_id: of its trace, or empty.
    """
    return _own(headers) | {
        MSG_ID: f"{envelope.name}@{subject}:{sequence}",
        MOVED_STORED_AT: repr(envelope.stored_at),
        DEAD_ID: envelope.name,
        DEAD_SUBJECT: subject,
        DEAD_ERROR: msgspec.json.encode(ErrorBody.of(error)).decode(),
        DEAD_ATTEMPTS: str(attempts),
        DEAD_TRACE_ID: trace_id,
    }


def read_letter(subject: str, sequence: int, died_at: float, headers: Mapping[str, str], body: bytes) -> DeadLetter:
    """Read a message of `LLM_DEAD`. Never raises: missing or malformed headers get defaults.

    Args:
        subject: the letter's.
        sequence: the letter's.
        died_at: when it was stored, UTC seconds.
        headers: the letter's.
        body: the request's.
    """
    priority = subject.removeprefix(f"{DEAD}.")
    attempts = headers.get(DEAD_ATTEMPTS, "")
    stored_at = headers.get(MOVED_STORED_AT, "")
    try:
        error = msgspec.json.decode(headers.get(DEAD_ERROR, ""), type=ErrorBody)
    except UNREADABLE:
        error = ErrorBody.of(HeadraceError(ErrorCode.ENGINE_FAILED, "The dead letter has no error."))
    return DeadLetter(
        id=headers.get(DEAD_ID, f"DEAD-{sequence}"),
        priority=Priority(priority) if priority in Priority.__members__.values() else Priority.LOW,
        sequence=sequence,
        died_at=died_at,
        created=int(float(stored_at)) if _is_number(stored_at.replace(".", "", 1)) else 0,
        subject=headers.get(DEAD_SUBJECT, ""),
        error=error,
        attempts=int(attempts) if _is_number(attempts) else 0,
        trace_id=headers.get(DEAD_TRACE_ID, ""),
        headers=_own(headers),
        body=body,
    )


def _own(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in carried(headers).items() if name not in _OURS}


def _is_number(text: str) -> bool:
    """Whether text is a number of at most `_MAX_DIGITS` digits."""
    return text.isascii() and text.isdecimal() and len(text) <= _MAX_DIGITS
