"""Whether a request that was just stored may wait: one that would begin only after its deadline is refused at once.

A refusal is final and a prediction is not, so a request has the benefit of the doubt. The wait is the optimistic one:
no other request is stored, and lanes that run empty leave their share to the others. A request is not refused without
measured rates, nor if the wait is only a little longer than the time left. The rates of an engine that has not been
full for a while were measured with part of a batch. Its speed is then multiplied by its slots, more than any batch
achieves. A request that can be spilled counts as served by both engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.core.waits import Capacity, predicted_wait_s
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import EngineName
from pipeline.wire.subjects import TIMEOUT, Priority

# The predicted wait had a median error of 16 %, and the requests before this one can be shorter than the average.
SAFETY = 1.5
# Measured rates follow a change within about a second.
SETTLED_AFTER_S = 2.0


@dataclass(frozen=True, slots=True)
class AdmissionRequest:
    """A request that was just stored.

    Attributes:
        priority: its own.
        position: how many requests of its priority wait before it.
        left_s: until its deadline.
        may_spill: whether the other engine may take it.
    """

    priority: Priority
    position: int
    left_s: float
    may_spill: bool


@dataclass(slots=True)
class Admission:
    """Refuses requests that would wait in vain. One writer: the monitor's arrivals.

    Args:
        shares: each priority's part of the service.
    """

    shares: Mapping[Priority, float]
    _capacities: dict[EngineName, Capacity] = field(init=False, default_factory=dict)
    _full_since: dict[EngineName, float] = field(init=False, default_factory=dict)

    def observe(self, engine: EngineName, capacity: Capacity, now: float) -> None:
        """Take in the capacity of an engine, as of now (monotonic seconds)."""
        self._capacities[engine] = capacity
        if capacity.slots_total and capacity.slots_used >= capacity.slots_total:
            self._full_since.setdefault(engine, now)
        else:
            self._full_since.pop(engine, None)

    def decide(
        self, engine: EngineName, request: AdmissionRequest, queued: Mapping[Priority, int], now: float
    ) -> HeadraceError | None:
        """Return None if a request may wait for engine, else the error that ends it.

        Args:
            engine: the engine whose queue it is in.
            request: the request.
            queued: the depths of that queue's lanes.
            now: monotonic seconds.
        """
        wait_s = self.predicted_wait_s(engine, request, queued, now)
        if wait_s is None or wait_s <= request.left_s * SAFETY:
            return None
        return HeadraceError(
            ErrorCode.DEADLINE_EXCEEDED,
            f"Rejected: the expected wait is {wait_s:.1f} s and {TIMEOUT} leaves {max(0.0, request.left_s):.1f} s. "
            "Raise the timeout, use a higher priority, or retry later.",
            param=TIMEOUT,
        )

    def predicted_wait_s(
        self, engine: EngineName, request: AdmissionRequest, queued: Mapping[Priority, int], now: float
    ) -> float | None:
        """Seconds until an engine begins the request; None if too little is known for a prediction."""
        own = self._capacities.get(engine)
        if own is None or not own.measured:
            return None
        before = {**queued, request.priority: request.position}
        wait_s = predicted_wait_s(own, before, request.priority, self.shares)
        both = self._requests_per_s(engine, now)
        for other, capacity in self._capacities.items():
            if request.may_spill and other != engine and capacity.slots_total:
                if not capacity.measured:
                    return None
                both += self._requests_per_s(other, now)
        return wait_s / own.request_s / both

    def _requests_per_s(self, engine: EngineName, now: float) -> float:
        """The highest rate that the engine can have with a full batch."""
        capacity = self._capacities[engine]
        settled = now - self._full_since.get(engine, now) >= SETTLED_AFTER_S
        return (1 if settled else capacity.slots_total) / capacity.request_s
