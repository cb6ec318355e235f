"""Which of the waiting things is next: the most urgent, and from time to time the one that has waited longest."""

from __future__ import annotations

from collections import deque
from itertools import count
from typing import Generic, TypeVar

from pipeline.wire.subjects import Priority

_T = TypeVar("_T")

# Each of so many goes to the one that has waited longest, whatever its priority: a flood of urgent ones stops no other.
OLDEST_EVERY = 4


class UrgentFirst(Generic[_T]):
    """A queue by priority, first come first served within each. One writer: its owner."""

    def __init__(self) -> None:
        self._lanes: dict[Priority, deque[tuple[int, _T]]] = {priority: deque() for priority in Priority}
        self._arrivals = count()
        self._taken = 0

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def add(self, priority: Priority, item: _T) -> None:
        """Add an item at the end of its lane."""
        self._lanes[priority].append((next(self._arrivals), item))

    def pop(self) -> _T:
        """Take the next item.

        Raises:
            IndexError: there is none.
        """
        self._taken += 1
        lanes = [lane for lane in self._lanes.values() if lane]
        if not lanes:
            raise IndexError("nothing waits")
        lane = lanes[0] if self._taken % OLDEST_EVERY else min(lanes, key=lambda lane: lane[0][0])
        return lane.popleft()[1]
