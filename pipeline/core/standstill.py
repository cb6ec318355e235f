"""Whether this process has stood still for a lease, so that what it is handed now may have been sent long ago."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

# After a standstill, what had come meanwhile is read within this time.
DOUBT_S = 0.5


@dataclass(slots=True)
class Standstill:
    """Notices that a loop which should turn several times per lease has not. One writer: that loop.

    The broker does not say when it sent a delivery. One that arrives just after a standstill is not served: if it was
    meant for this process, it comes again. All times are monotonic seconds.

    Args:
        lease_s: how long the broker waits for a sign of life.
        turned_at: when the loop began.
    """

    lease_s: float
    turned_at: float
    _doubtful_until: float = field(init=False, default=-math.inf)

    def turned(self, now: float) -> None:
        """The loop has turned."""
        if now - self.turned_at > self.lease_s:
            self._doubtful_until = now + DOUBT_S
        self.turned_at = now

    def stood_still(self, now: float) -> bool:
        """Whether the process has just stood still for a lease, or its loop has not turned since it did."""
        return now < self._doubtful_until or now - self.turned_at > self.lease_s
