"""Dead letters: what is kept of a request that brought down all its attempts, and the request it becomes again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from pipeline.core.envelope import Envelope
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import ErrorBody
from pipeline.wire.subjects import (
    DEAD,
    DEAD_ATTEMPTS,
    DEAD_ERROR,
    DEAD_ID,
    DEAD_SUBJECT,
    DEAD_TRACE_ID,
    LANE_OF_SUBJECT,
    MOVED_REASON,
    MOVED_STORED_AT,
    MSG_ID,
    Lane,
    Move,
    Priority,
    Task,
    carried,
    moved_id,
)

REPLAY_REASON = "replayed from the dead letters"
_MAX_DIGITS = 30
_OURS = frozenset({DEAD_ID, DEAD_SUBJECT, DEAD_ERROR, DEAD_ATTEMPTS, DEAD_TRACE_ID, MOVED_STORED_AT, MOVED_REASON})


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One request among the dead letters.

    Attributes:
        id: the request's.
        priority: its own.
        sequence: the letter's in `LLM_DEAD`.
        died_at: when the letter was stored, UTC seconds.
        created: tells the request's record from another one under the same id.
        subject: where the request stood at its end.
        error: what its reader was told.
        attempts: how many it had.
        trace_id: of its trace, empty where none was recorded.
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

    def replay(self, wall_now: float) -> tuple[str, dict[str, str]]:
        """The subject and headers under which the request is stored again, at wall_now (UTC seconds).

        It keeps its id, so that whoever knows it finds the new answer, and its publisher's headers; its timeout counts
        anew. Its time is always in a later second than before, for that tells its record from the one that ended: the
        old answer makes way. The message id is the letter's: replaying a letter twice stores one request. What had been
        spilled starts on its own lane again.
        """
        lane = LANE_OF_SUBJECT.get(self.subject, Lane(self.priority, Task.UNTRIAGED))
        own = {
            MSG_ID: moved_id(self.id, Move.REPLAYED, self.sequence, self.died_at),
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
        subject: where it was delivered from.
        sequence: of the message that was delivered. It makes the letter's message id: burying a request again, after a
            crash between the letter and the ack, stores one letter, and the same id in other hands gets its own.
        error: what its reader is told.
        attempts: how many it had.
        trace_id: of its trace, or empty.
    """
    return _own(headers) | {
        MSG_ID: f"{envelope.id}@{subject}:{sequence}",
        MOVED_STORED_AT: repr(envelope.stored_at),
        DEAD_ID: envelope.id,
        DEAD_SUBJECT: subject,
        DEAD_ERROR: msgspec.json.encode(ErrorBody.of(error)).decode(),
        DEAD_ATTEMPTS: str(attempts),
        DEAD_TRACE_ID: trace_id,
    }


def read_letter(subject: str, sequence: int, died_at: float, headers: Mapping[str, str], body: bytes) -> DeadLetter:
    """Read a message of `LLM_DEAD`. Never raises: what a letter does not say is unknown.

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
    except msgspec.DecodeError:
        error = ErrorBody.of(HeadraceError(ErrorCode.ENGINE_FAILED, "the letter does not say why"))
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
    """Whether text is digits, and no more of them than a number has that is meant."""
    return text.isascii() and text.isdecimal() and len(text) <= _MAX_DIGITS
