"""How soon a request is delivered again after a worker returned it because it lacks the model.

A pull takes the first request of a lane, so a worker can receive one for a model that only other workers of its engine
have. Such a request must not wait while one of them is idle. But a long queue for a busy worker must not circulate
between the broker and an idle worker.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from zlib import crc32

# Returned requests are delivered again one after another, at this interval. It bounds the useless deliveries to
# twenty per second.
GAP_S = 0.05
# The broker delivers what was given back before what is behind it. A worker on a busy machine may need longer than the
# gap to give a request back, and would then receive nothing else. So a request waits twice as long each time, up to
# this, and each request differently: two workers that alternate could give each other's requests back without end.
LONGEST_OWN_S = 0.8
# The last of many waits no longer than this.
MOST_S = 30.0


@dataclass(slots=True)
class HandBacks:
    """Gives each request that is given back a time of its own. One writer: the worker. Times are monotonic seconds."""

    _last_due: float = field(init=False, default=float("-inf"))

    def delay_s(self, now: float, name: str, *, delivered: int, room: bool) -> float:
        """How long the broker keeps a request before it delivers it again, seconds.

        The others come in the order in which they were given back.

        Args:
            now: the time.
            name: the request's.
            delivered: how often the message has been delivered, 1 or more.
            room: whether a worker that has the model has a free slot. Its pull has waited longest, so that it receives
                the request if that is delivered at once. Should it not, the next delay is not 0.
        """
        # The exponent is bounded as well: 2.0**1024 is an error.
        own_s = min(GAP_S * 2.0 ** min(delivered - 1, 10), LONGEST_OWN_S)
        own_s *= (1.0 + crc32(f"{name}@{delivered}".encode()) / 2**32) / 2
        if room:
            # It does not go behind those that wait for a busy worker.
            return 0.0 if delivered == 1 else own_s
        self._last_due = min(max(self._last_due, now) + GAP_S, now + MOST_S)
        return max(self._last_due - now, own_s)
