"""Going on with what a dead worker had begun: when to look for it, and how much of it to take beyond the slots.

A request that was begun comes again on its lane once its lease has run out, before all others of that lane, but whoever
survives has its slots full by then, and a worker that was started again has filled them. Its reader has half an answer,
so it waits for no slot: it is taken in addition.

The broker tells only how many requests of a lane are in somebody's hands; the workers tell how many they hold. The
difference is orphaned. It is looked for when that can matter: a lease after a worker was last heard (each renewal of
its leases is followed by a word from it, so they have run out by then), when one has left, and a lease after our own
start, for what was held by whoever had died before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

# Between two looks for what others may be taking at this moment.
AGAIN_S = 0.25
# The workers look one after another, so that each sees what the one before has taken.
_STAGGER_S = 0.1


@dataclass(slots=True)
class Takeover:
    """Decides when to look and what to take. One writer: the worker. Times are monotonic seconds.

    Args:
        me: the worker's name.
        lease_s: how long a request stays with a worker that says nothing.
        now: the time at which this worker began to listen.
    """

    me: str
    lease_s: float
    now: float
    # By worker: when it was last heard, and what it holds by consumer.
    _peers: dict[str, tuple[float, Mapping[str, int]]] = field(init=False, default_factory=dict)
    _look_at: float = field(init=False)
    _look_until: float = field(init=False)

    def __post_init__(self) -> None:
        self.begin(self.now)

    def begin(self, now: float) -> None:
        """Know nothing of anybody, as at the start or after an outage."""
        self._peers.clear()
        self._expect(now + self.lease_s)

    def heard(self, worker: str, held: Mapping[str, int], now: float) -> None:
        """A worker of the same lanes says how many requests it holds, by consumer."""
        if worker != self.me:
            self._peers[worker] = (now, held)

    def left(self, worker: str, now: float) -> None:
        """A worker has said its last word: what it could not finish, it has handed back."""
        if self._peers.pop(worker, None) is not None:
            self._expect(now)

    def next_look(self) -> float:
        """When to ask the broker next; infinite where nothing is to be looked for."""
        silent_at = min((heard_at for heard_at, _ in self._peers.values()), default=math.inf) + self.lease_s
        rank = sum(worker < self.me for worker in self._peers)
        return min(self._look_at, silent_at) + rank * _STAGGER_S

    def look(self, held: Mapping[str, int], mine: Mapping[str, int], now: float) -> dict[str, int]:
        """What to take now.

        Args:
            held: requests that are in anybody's hands, by consumer, the most urgent first: delivered, not acknowledged.
            mine: how many of them are in ours.
            now: monotonic seconds.

        Returns:
            How many requests to take from which consumers: our part of what is orphaned.
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
        """Look at a time, and on until a lease later: whoever takes something may die as well."""
        self._look_at = look_at
        self._look_until = look_at + self.lease_s
