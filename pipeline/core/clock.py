"""The broker's wall clock, as a monotonic clock tells it, and when a machine's own clock is far from it.

Deadlines start at the broker's time of storing, so they are compared with the broker's clock. This machine's wall clock
may be minutes off; its monotonic clock measures only how much time has passed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

# Two clocks drift apart by at most this part of the time that passes. Quartz clocks stay within 50 millionths each.
DRIFT = 1e-4
# An offset that has changed by more than this is reported.
NOTABLE_S = 1.0


@dataclass(slots=True)
class ClockEstimate:
    """Estimates the broker's wall clock. One writer: the connection that receives its timestamps. Times are seconds.

    The broker stamps an answer between the moment at which the request was sent and the moment at which the answer was
    heard. So the midpoint is wrong by at most half a round trip, plus the drift since the sending (Cristian, 1989). The
    sample with the smallest error is kept.

    Args:
        epoch: UTC at monotonic 0, assumed until the first sample.
    """

    epoch: float
    _error_s: float = field(init=False, default=math.inf)
    _sampled_at: float = field(init=False, default=0.0)

    def sample(self, sent_at: float, heard_at: float, stamped_at: float) -> None:
        """Take in one timestamp.

        A sample that contradicts the estimate replaces it: the broker's clock was set, another broker answers, or this
        machine was suspended and its monotonic clock with it.

        Args:
            sent_at: when the request was sent, monotonic.
            heard_at: when its answer was heard, monotonic.
            stamped_at: the broker's timestamp in the answer, UTC.
        """
        error_s = (heard_at - sent_at) / 2
        epoch = stamped_at - (sent_at + heard_at) / 2
        known_s = self.error_s(heard_at)
        if error_s <= known_s or abs(epoch - self.epoch) > error_s + known_s:
            self.epoch, self._error_s, self._sampled_at = epoch, error_s, sent_at

    def wall(self, now: float) -> float:
        """The broker's UTC at `now` (monotonic)."""
        return self.epoch + now

    def error_s(self, now: float) -> float:
        """How wrong `wall(now)` is at most; infinite before the first sample."""
        return self._error_s + DRIFT * (now - self._sampled_at)


@dataclass(slots=True)
class OffsetWatch:
    """Decides when a clock's offset is worth a line in the log: at each change by more than `NOTABLE_S`."""

    _reported_s: float = field(init=False, default=0.0)

    def is_news(self, offset_s: float) -> bool:
        """Whether offset_s differs from what was reported last (0 at the beginning). If so, it counts as reported."""
        if abs(offset_s - self._reported_s) <= NOTABLE_S:
            return False
        self._reported_s = offset_s
        return True
