"""How soon a request that a worker gives back, for it lacks the model, is delivered again.

A pull takes whatever is first in a lane, so a worker can receive a request for a model that only other workers of its
engine have. Such a request must not wait while one of them is idle. A long queue for a busy worker must not circulate
between the broker and an idle one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# Requests that were given back come again one after the other, at this distance. It bounds the useless deliveries to
# twenty per second.
GAP_S = 0.05
# The last of many waits no longer than this.
MOST_S = 30.0


@dataclass(slots=True)
class HandBacks:
    """Gives each request that is given back a time of its own. One writer: the worker. Times are monotonic seconds."""

    _last_due: float = field(init=False, default=float("-inf"))

    def delay_s(self, now: float, *, first: bool, room: bool) -> float:
        """How long the broker keeps a request before it delivers it again, seconds.

        The others come in the order in which they were given back.

        Args:
            now: the time.
            first: whether this is the first delivery of the message.
            room: whether a worker that has the model has a free slot. Its pull has waited longest, so that it receives
                the request if that is delivered at once. Should it not, the next delay is not 0.
        """
        if first and room:
            return 0.0
        self._last_due = min(max(now, self._last_due) + GAP_S, now + MOST_S)
        return self._last_due - now
