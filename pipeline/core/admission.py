"""Whether work that was just stored may wait: what would begin only after its deadline is refused at once.

A refusal is for good, a prediction is not, so every doubt is the request's: nothing is refused without measured rates,
nor where the wait is only a little longer than the time that is left. An engine that has not been full for a while has
been measured with a part of its batch; it is then taken to be as many times as fast as it has slots, which no batch is.
What may go to the other engine as well is taken to be served by both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.core.saturation import Capacity, predicted_waits_s
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import EngineName
from pipeline.wire.subjects import TIMEOUT, Priority

# The predicted wait had a median error of 16 %, and what stands before a request may be shorter than the average.
SAFETY = 1.5
# The engines' rates follow what they measure within about a second.
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
    """Refuses what waits in vain. One writer: the backpressure monitor's loop.

    Args:
        shares: each priority's part of the service.
        target_wait_s: as in `predicted_waits_s`.
    """

    shares: Mapping[Priority, float]
    target_wait_s: float
    _capacities: dict[EngineName, Capacity] = field(init=False, default_factory=dict)
    _full_since: dict[EngineName, float] = field(init=False, default_factory=dict)

    def observe(self, engine: EngineName, capacity: Capacity, now: float) -> None:
        """Take in what an engine's workers say now (monotonic seconds)."""
        self._capacities[engine] = capacity
        if capacity.slots_total and capacity.slots_used >= capacity.slots_total:
            self._full_since.setdefault(engine, now)
        else:
            self._full_since.pop(engine, None)

    def decide(
        self, engine: EngineName, request: AdmissionRequest, queued: Mapping[Priority, int], now: float
    ) -> HeadraceError | None:
        """None where a request may wait for engine, else the error that ends it.

        Args:
            engine: whose queue it stands in.
            request: the request.
            queued: the depths of that queue's lanes.
            now: monotonic seconds.
        """
        wait_s = self.predicted_wait_s(engine, request, queued, now)
        if wait_s is None or wait_s <= request.left_s * SAFETY:
            return None
        return HeadraceError(
            ErrorCode.DEADLINE_EXCEEDED,
            f"its turn is expected in {wait_s:.1f} s, and its {TIMEOUT} leaves {max(0.0, request.left_s):.1f} s: "
            "refused at once; send it again later, with more time, or with a higher priority",
            param=TIMEOUT,
        )

    def predicted_wait_s(
        self, engine: EngineName, request: AdmissionRequest, queued: Mapping[Priority, int], now: float
    ) -> float | None:
        """Until an engine begins the request, in seconds, or None where too little is known to say."""
        own = self._capacities.get(engine)
        if own is None or not _measured(own):
            return None
        before = {**queued, request.priority: request.position}
        wait_s = predicted_waits_s(own, before, self.shares, self.target_wait_s)[request.priority]
        rate = self._requests_per_s(engine, now)
        both = rate
        for other, capacity in self._capacities.items():
            if request.may_spill and other != engine and capacity.slots_total:
                if not _measured(capacity):
                    return None
                both += self._requests_per_s(other, now)
        return wait_s * _requests_per_s(own) / both

    def _requests_per_s(self, engine: EngineName, now: float) -> float:
        """What an engine may be able to do with a full batch."""
        capacity = self._capacities[engine]
        settled = now - self._full_since.get(engine, now) >= SETTLED_AFTER_S
        return _requests_per_s(capacity) * (1 if settled else capacity.slots_total)


def _measured(capacity: Capacity) -> bool:
    return capacity.slots_total > 0 and capacity.tokens_per_s > 0 and capacity.tokens_per_request > 0


def _requests_per_s(capacity: Capacity) -> float:
    return capacity.tokens_per_s / capacity.tokens_per_request
