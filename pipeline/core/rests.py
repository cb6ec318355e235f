"""Lanes that the router leaves to MLX for a while, because their first request has an answer that has started."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.wire.subjects import Lane

# Long enough for a worker to take the request over or to have a slot free; then the router looks again.
LEAVE_S = 2.0


@dataclass(slots=True)
class LaneRests:
    """When each lane may be pulled from again. One writer: the router. `now` is in seconds, on one clock."""

    _until: dict[Lane, float] = field(init=False, default_factory=dict)

    def leave(self, lane: Lane, now: float) -> None:
        """Pull nothing from lane for `LEAVE_S`."""
        self._until[lane] = now + LEAVE_S

    def has_left(self, lane: Lane, now: float) -> bool:
        """Whether lane is left alone at this moment."""
        return now < self._until.get(lane, 0.0)
