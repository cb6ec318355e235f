"""Decides which of several processes acts, by a lease that the holder renews and a candidate takes when it runs out.

The lease is the last message of one subject. Each write names the sequence that must be the last one, so of two
candidates the broker refuses one. The holder stops acting `HOLD_S` after it *sent* its last accepted renewal. A
candidate waits `LEASE_S` after it *heard* of that renewal, which is later. So no two act at once, and no process needs
another clock than its own monotonic one. (The same rule as in River, `internal/leadership`.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

RENEW_EVERY_S = 1.0
HOLD_S = 2.5
LEASE_S = 3.0
# A candidate looks at the lease this often.
LOOK_EVERY_S = 0.5

# The result of a request to the process that acts: a reply, no reply in time, or no subscriber.
Voice = Literal["answers", "silent", "absent"]


@dataclass(slots=True)
class Leadership:
    """Decides whether this process acts. One writer: the process's candidate. Times are monotonic seconds.

    Attributes:
        sequence: the last known sequence of the lease; 0 if there is none.
        holds: whether this process wrote it, as far as it knows.
    """

    sequence: int = field(init=False, default=0)
    holds: bool = field(init=False, default=False)
    _heard_at: float = field(init=False, default=float("-inf"))
    _until: float = field(init=False, default=float("-inf"))

    def heard(self, sequence: int, now: float) -> None:
        """Another process wrote the lease last (0: there is none)."""
        if sequence != self.sequence:
            self.sequence, self._heard_at = sequence, now
        self.holds = False
        self._until = float("-inf")

    def renewed(self, sequence: int, sent_at: float) -> None:
        """The broker accepted a renewal that this process sent at sent_at."""
        self.sequence, self.holds = sequence, True
        self._until = sent_at + HOLD_S

    def doubt(self) -> None:
        """The connection was lost: another process can have the lease by now. This one acts again once it renewed."""
        self._until = float("-inf")

    def may_take(self, now: float, voice: Voice) -> bool:
        """Whether to take the lease.

        A process that replies is left alone even if it holds no lease: an older version knows none. If a process has
        died, the broker reports at once that there is no subscriber. A silent process can merely be slow.
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
