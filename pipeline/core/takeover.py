"""Takeover of requests that a dead worker had begun: when to look for them, and how many to take beyond the slots.

The broker delivers such a request again once its lease has run out, before all others of its lane. By then the slots of
the surviving workers are full, and a restarted worker has filled its own. The reader has half an answer, so the request
does not wait for a free slot: it is taken in addition.

The broker reports only how many requests of a lane are delivered and not acknowledged; the workers report how many they
hold. The difference is orphaned. A worker looks for orphans one lease after another worker was last heard (a status
follows each renewal of its leases, so they have run out by then), when another worker has left, and one lease after its
own start, for requests of workers that died before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

# Between two looks, while other workers may be taking the same orphans.
AGAIN_S = 0.25
# Workers look one after another, so that each sees what the previous one has taken.
_STAGGER_S = 0.1


@dataclass(slots=True)
class Takeover:
    """Decides when to look and what to take. One writer: the worker. Times are monotonic seconds.

    Args:
        me: the worker's name.
        lease_s: how long a request stays with a silent worker.
        now: when this worker began to listen.
    """

    me: str
    lease_s: float
    now: float
    # By worker: when it was last heard, and how many requests it holds by consumer.
    _peers: dict[str, tuple[float, Mapping[str, int]]] = field(init=False, default_factory=dict)
    _look_at: float = field(init=False)
    _look_until: float = field(init=False)

    def __post_init__(self) -> None:
        self.begin(self.now)

    def begin(self, now: float) -> None:
        """Forget all workers, as at the start or after an outage."""
        self._peers.clear()
        self._expect(now + self.lease_s)

    def heard(self, worker: str, held: Mapping[str, int], now: float) -> None:
        """A worker of the same lanes reported how many requests it holds, by consumer."""
        if worker != self.me:
            self._peers[worker] = (now, held)

    def left(self, worker: str, now: float) -> None:
        """A worker has left. It returned the requests that it could not finish."""
        if self._peers.pop(worker, None) is not None:
            self._expect(now)

    def next_look(self) -> float:
        """When to ask the broker next; infinite if there is nothing to look for."""
        silent_at = min((heard_at for heard_at, _ in self._peers.values()), default=math.inf) + self.lease_s
        rank = sum(worker < self.me for worker in self._peers)
        return min(self._look_at, silent_at) + rank * _STAGGER_S

    def look(self, held: Mapping[str, int], mine: Mapping[str, int], now: float) -> dict[str, int]:
        """How many requests to take now.

        Args:
            held: requests that are delivered and not acknowledged, by consumer, the most urgent first.
            mine: how many of them this worker holds.
            now: monotonic seconds.

        Returns:
            How many requests to take from which consumers: this worker's part of the orphans.
        """
        for worker in [worker for worker, (heard_at, _) in self._peers.items() if now - heard_at >= self.lease_s]:
            del self._peers[worker]
            self._expect(now)
        orphaned = {consumer: count for consumer in held if (count := self._orphaned(consumer, held, mine)) > 0}
        again = bool(orphaned) and now < self._look_until
        self._look_at = now + AGAIN_S if again else math.inf
        part = math.ceil(sum(orphaned.values()) / (1 + len(self._peers)))
        taken = {}
        for consumer, count in orphaned.items():
            if part:
                taken[consumer] = min(count, part)
                part -= taken[consumer]
        return taken

    def _orphaned(self, consumer: str, held: Mapping[str, int], mine: Mapping[str, int]) -> int:
        in_living_hands = sum(theirs.get(consumer, 0) for _, theirs in self._peers.values())
        return held[consumer] - mine.get(consumer, 0) - in_living_hands

    def _expect(self, look_at: float) -> None:
        """Look at a time, and on until a lease later: a worker that takes orphans may die as well."""
        self._look_at = look_at
        self._look_until = look_at + self.lease_s
