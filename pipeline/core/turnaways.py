"""How often a busy engine turned a request away, as one worker saw it.

A request is also delivered again for other reasons: a worker that has no room, or not its model, hands it back. Such
deliveries say nothing about the engine, so the broker's count of deliveries does not tell.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# The most requests that are remembered; the oldest are forgotten first, and counted from 1 again.
_MOST = 10_000


@dataclass(slots=True)
class TurnAways:
    """Counts by request. One writer: the worker. A restarted worker counts from 1."""

    _counts: dict[tuple[str, int], int] = field(init=False, default_factory=dict)

    def count(self, request_id: str, created: int) -> int:
        """The engine turned a request away once more. Returns how often it has.

        Args:
            request_id: the request's id.
            created: when it was stored, UTC seconds; it distinguishes requests of the same id.
        """
        times = self._counts.pop((request_id, created), 0) + 1
        self._counts[request_id, created] = times
        if len(self._counts) > _MOST:
            del self._counts[next(iter(self._counts))]
        return times
