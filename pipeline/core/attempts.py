"""Attempts that ended without an event, because their worker was killed or lost the request.

A worker that dies does not report the end of its attempt, and the next worker only knows that there was one. A process
that receives the events of both workers knows when the lost attempt began.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.wire.messages import EventKind, RequestEvent

# The most attempts that are remembered; the oldest are forgotten first.
_MOST = 10_000
# A worker announces that it gives a request back or moves it only after it has done so. Its event can come after that
# of the next worker, by this much.
GRACE_S = 1.0

_LET_GO: Container[EventKind] = ("returned", "spilled", "triaged")


class LostAttempt(NamedTuple):
    """An attempt whose worker did not say how it ended. Times are UTC seconds.

    Attributes:
        id: the request's.
        trace: the context in which the attempt ran, as `traceparent`.
        worker: which ran it.
        attempt: its number.
        began_at: when it began.
        noticed_at: when its loss was noticed.
        reason: how its loss was noticed.
    """

    id: str
    trace: str
    worker: str
    attempt: int
    began_at: float
    noticed_at: float = 0.0
    reason: str = ""


@dataclass(slots=True)
class Attempts:
    """Follows the attempts that run, by their events. One writer: the process that hears the events."""

    _running: dict[str, LostAttempt] = field(init=False, default_factory=dict)
    # Attempts before that of a running one, in another queue.
    _moved: dict[str, LostAttempt] = field(init=False, default_factory=dict)
    # By request and worker.
    _suspects: dict[tuple[str, str], LostAttempt] = field(init=False, default_factory=dict)

    def heard(self, event: RequestEvent, wall_now: float) -> LostAttempt | None:
        """Take in an event, heard at wall_now (UTC seconds).

        Returns:
            The attempt that seems to be lost, if any. Ask `is_lost` after `GRACE_S`.
        """
        if event.kind in _LET_GO:
            suspect, reason = self._let_go(event), "another process took the request"
        elif event.kind == "started":
            suspect, reason = self._begin(event, wall_now), "another attempt began"
        else:
            self._moved.pop(event.id, None)
            suspect, reason = self._running.pop(event.id, None), "another process ended the request"
        if suspect is None or (suspect.worker == event.worker and event.kind != "started"):
            return None
        suspect = suspect._replace(noticed_at=wall_now, reason=reason)
        self._suspects[suspect.id, suspect.worker] = suspect
        return suspect

    def is_lost(self, suspect: LostAttempt) -> bool:
        """Whether nothing was heard since that explains the end of an attempt. The answer is given once."""
        return self._suspects.pop((suspect.id, suspect.worker), None) is not None

    def _begin(self, event: RequestEvent, wall_now: float) -> LostAttempt | None:
        before = self._running.pop(event.id, None)
        if event.trace:
            begun = LostAttempt(event.id, event.trace, event.worker, event.attempt, wall_now)
            _keep(self._running, begun)
        if event.deliveries > 1 or before is None:
            return before
        # The first delivery of a message follows a move. The event of the process that moved it can still come.
        _keep(self._moved, before)
        return None

    def _let_go(self, event: RequestEvent) -> LostAttempt | None:
        self._suspects.pop((event.id, event.worker), None)
        attempt = None if event.kind == "returned" else self._moved.pop(event.id, None)
        running = self._running.get(event.id)
        if attempt is None and running and (running.worker == event.worker or event.deliveries > 1):
            attempt = self._running.pop(event.id)
        return attempt if event.deliveries > 1 else None


def _keep(attempts: dict[str, LostAttempt], attempt: LostAttempt) -> None:
    attempts[attempt.id] = attempt
    if len(attempts) > _MOST:
        del attempts[next(iter(attempts))]
