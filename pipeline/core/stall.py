"""Whether a process that should make progress has stood still for too long.

The time for which this machine slept does not count.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class StallWatch:
    """Adds up the time without progress, looked at every `every_s` seconds. One writer: the watchdog.

    A look that comes much too late means that this process stood still too, as a laptop with a closed lid does. It
    counts as two looks at most.

    Args:
        limit_s: the time without progress that is too long.
    """

    limit_s: float
    _still_s: float = field(init=False, default=0.0)
    _looked_at: float | None = field(init=False, default=None)
    _progress: float | None = field(init=False, default=None)

    @property
    def every_s(self) -> float:
        """The seconds between two looks."""
        return min(1.0, self.limit_s / 10)

    def look(self, now: float, *, progress_at: float, busy: bool) -> bool:
        """Whether the limit is exceeded.

        Args:
            now: monotonic seconds.
            progress_at: when the latest progress was made, as now.
            busy: whether there is anything to do.
        """
        passed_s = 0.0 if self._looked_at is None else now - self._looked_at
        if not busy or progress_at != self._progress:
            self._still_s = 0.0
        else:
            self._still_s += min(passed_s, 2 * self.every_s)
        self._looked_at, self._progress = now, progress_at
        return self._still_s > self.limit_s
