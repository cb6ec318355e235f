"""Which of several processes acts: a lease that its holder renews, and that a candidate takes when it has run out.

The lease is a note on one subject that keeps its last message. Every write names the sequence that must be the last
one, so of two candidates the broker refuses one. The holder stops acting `HOLD_S` after it *sent* its last accepted
renewal; a candidate waits `LEASE_S` after it *heard* of that renewal, which is later. So no two act at once, and no
clock but each process's own monotonic one is asked. (The same rule as in River, `internal/leadership`.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

RENEW_EVERY_S = 1.0
HOLD_S = 2.5
LEASE_S = 3.0
# A candidate looks at the lease this often.
LOOK_EVERY_S = 0.5

# What became of a question to whoever acts: an answer, none in time, or no process that listens for it.
Voice = Literal["answers", "silent", "absent"]


@dataclass(slots=True)
class Leadership:
    """Decides whether this process acts. One writer: the process's candidate. Times are monotonic seconds.

    Attributes:
        sequence: of the last note known, 0 where there is none.
        holds: whether this process wrote it, as far as it knows.
    """

    sequence: int = field(init=False, default=0)
    holds: bool = field(init=False, default=False)
    _heard_at: float = field(init=False, default=float("-inf"))
    _until: float = field(init=False, default=float("-inf"))

    def heard(self, sequence: int, now: float) -> None:
        """The note of another process is the last one (0: there is none)."""
        if sequence != self.sequence:
            self.sequence, self._heard_at = sequence, now
        self.holds = False
        self._until = float("-inf")

    def renewed(self, sequence: int, sent_at: float) -> None:
        """The broker has accepted a note of ours, which was sent at sent_at."""
        self.sequence, self.holds = sequence, True
        self._until = sent_at + HOLD_S

    def may_take(self, now: float, voice: Voice) -> bool:
        """Whether to write a note of our own.

        A process that answers is left alone even if it holds no lease: the version before the lease knew none. The
        broker tells at once that a process which has died does not listen. One that is silent may only be slow.
        """
        match voice:
            case "answers":
                return False
            case "absent":
                return True
            case "silent":
                return self.sequence == 0 or now - self._heard_at >= LEASE_S

    def leads(self, now: float) -> bool:
        """Whether this process may act."""
        return self.holds and now < self._until
