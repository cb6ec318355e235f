"""How much `headrace demo` sends: enough to saturate the engines, and no more than they can answer soon afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.wire.subjects import Priority

# The load is low until the first share of the time, high until the second, and low until the end.
_CALM_UNTIL, _FLOOD_UNTIL = 0.15, 0.75
# Requests of high priority are sent at a fixed interval, and take at most this share of what the engines can answer.
_HIGH_EVERY_S, _HIGH_SHARE = 0.5, 0.25
# Of the others, a number of requests is kept waiting that grows until MLX is saturated: at first the work of so many
# seconds, at most that of this share of the whole time.
_FIRST_S, _GROWTH, _MOST_SHARE = 1.0, 1.03, 0.2
_PARTS = ((Priority.MEDIUM, 1 / 3), (Priority.LOW, 2 / 3))
_LEAST = 6.0


@dataclass(slots=True)
class Pace:
    """Decides which requests to send now.

    Args:
        seconds: the length of the demonstration.
        answers_per_s: what the engines were measured to answer.
    """

    seconds: float
    answers_per_s: float
    _waiting: float = field(init=False)
    _next_high_at: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self._waiting = max(_LEAST, self.answers_per_s * _FIRST_S)

    def due(self, elapsed_s: float, outstanding: Mapping[Priority, int], *, saturated: bool) -> list[Priority]:
        """The priorities of the requests to send now.

        Args:
            elapsed_s: seconds since the start; does not decrease.
            outstanding: how many requests of each priority have no last message.
            saturated: whether MLX is.
        """
        due = []
        if elapsed_s >= self._next_high_at:
            self._next_high_at = elapsed_s + max(_HIGH_EVERY_S, 1 / (_HIGH_SHARE * self.answers_per_s))
            due.append(Priority.HIGH)
        if _CALM_UNTIL <= elapsed_s / self.seconds < _FLOOD_UNTIL:
            if not saturated:
                most = max(_LEAST, self.answers_per_s * self.seconds * _MOST_SHARE)
                self._waiting = min(most, self._waiting * _GROWTH)
            for priority, part in _PARTS:
                due += [priority] * (int(self._waiting * part) - outstanding.get(priority, 0))
        return due
