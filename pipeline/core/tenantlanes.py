"""Which lanes of named tenants have a durable consumer: made when a request comes, removed when none has come for long.

A work queue accepts no two consumers of one message, and names of tenants are without number. So a lane has a consumer
only while it holds requests, and for a while after. A lane is taken off the list that workers follow some time before
its consumer is removed: no pull is on its way then.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from pipeline.wire.subjects import Lane

# A lane without requests keeps its consumer for so long; and for so long if others wait for one.
IDLE_S = 60.0
IDLE_CROWDED_S = 0.5
# From the end of its place on the list to the end of its consumer.
LEAVES_S = 1.0


@dataclass(slots=True)
class TenantLanes:
    """The lanes of named tenants that hold requests or have a consumer. One writer: the leading monitor.

    All times are monotonic seconds.

    Args:
        most: how many consumers there may be.
    """

    most: int
    # With a consumer, and when a request was last seen there; without one, in the order of arrival; and with a consumer
    # that is about to be removed, since when the workers know it, or infinite.
    _listed: dict[Lane, float] = field(init=False, default_factory=dict)
    _waiting: dict[Lane, None] = field(init=False, default_factory=dict)
    _leaving: dict[Lane, float] = field(init=False, default_factory=dict)

    @property
    def listed(self) -> frozenset[Lane]:
        """The lanes that workers take requests from."""
        return frozenset(self._listed)

    @property
    def waiting(self) -> list[Lane]:
        """The lanes that hold requests and have no consumer, in the order of arrival."""
        return list(self._waiting)

    def heard(self, lane: Lane, now: float) -> bool:
        """A request is in a lane. Returns whether there is something to do about it."""
        if lane in self._listed:
            self._listed[lane] = now
            return False
        if self._leaving.pop(lane, None) is not None:
            self._listed[lane] = now
        else:
            self._waiting.setdefault(lane)
        return True

    def found(self, consumers: Iterable[Lane], now: float) -> list[Lane]:
        """These lanes have a consumer. Returns those of which that was not known."""
        there = set(consumers)
        for lane in [lane for lane in self._listed if lane not in there]:
            del self._listed[lane]
            self._waiting.setdefault(lane)
        self._leaving = {lane: since for lane, since in self._leaving.items() if lane in there}
        new = [lane for lane in there if lane not in self._listed and lane not in self._leaving]
        for lane in new:
            self.made(lane, now)
        return new

    def to_make(self) -> list[Lane]:
        """The lanes that get a consumer now."""
        room = max(0, self.most - len(self._listed) - len(self._leaving))
        return self.waiting[:room]

    def made(self, lane: Lane, now: float) -> None:
        """A lane has a consumer."""
        self._waiting.pop(lane, None)
        self._listed[lane] = now

    def refused(self, lane: Lane) -> None:
        """The broker makes no consumer for a lane. It is tried again when a request is seen there again."""
        self._waiting.pop(lane, None)

    def rest(self, now: float) -> None:
        """Take the lanes off the list that have been without requests for long.

        Call this when `heard` has just been told of every lane that holds one.
        """
        idle_s = IDLE_CROWDED_S if len(self._waiting) > len(self.to_make()) else IDLE_S
        for lane in [lane for lane, seen_at in self._listed.items() if now - seen_at > idle_s]:
            del self._listed[lane]
            self._leaving[lane] = math.inf

    def told(self, now: float) -> None:
        """The workers know the list as it is."""
        self._leaving = {lane: min(since, now) for lane, since in self._leaving.items()}

    def to_remove(self, now: float) -> list[Lane]:
        """The lanes whose consumer is removed now, unless there is a request after all."""
        return [lane for lane, since in self._leaving.items() if now - since >= LEAVES_S]

    def removed(self, lane: Lane) -> None:
        """A lane has no consumer any more. If a request was heard of meanwhile, it gets a new one."""
        self._leaving.pop(lane, None)
        if self._listed.pop(lane, None) is not None:
            self._waiting.setdefault(lane)
