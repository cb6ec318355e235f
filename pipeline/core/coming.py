"""How many requests are on their way to a worker: announced by the broker, but not yet pulled by this worker.

An idle engine waits a moment for them, so that it can read their prompts together. Another worker may take them, so an
announcement counts only for a short time.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

_COUNTS_S: Final = 0.5


@dataclass(slots=True)
class Coming:
    """The latest announcements. One writer: the process that takes the requests. Times are monotonic seconds.

    The announcement of a request and its delivery come in any order.
    """

    _announced: OrderedDict[int, float] = field(init=False, default_factory=OrderedDict)
    _taken: OrderedDict[int, float] = field(init=False, default_factory=OrderedDict)

    def announced(self, sequence: int, now: float) -> None:
        """The request with this stream sequence was stored."""
        if sequence not in self._taken:
            self._announced[sequence] = now
        self._expire(now)

    def taken(self, sequence: int, now: float) -> None:
        """The request with this stream sequence was taken."""
        self._announced.pop(sequence, None)
        self._taken[sequence] = now
        self._expire(now)

    def count(self, now: float) -> int:
        """How many requests were announced lately and not taken."""
        self._expire(now)
        return len(self._announced)

    def _expire(self, now: float) -> None:
        for events in (self._announced, self._taken):
            while events and now - next(iter(events.values())) > _COUNTS_S:
                events.popitem(last=False)
