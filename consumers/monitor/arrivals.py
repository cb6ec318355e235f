"""Requests that were just stored, until admission has decided whether each may wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.core.admission import Admission, AdmissionRequest
from pipeline.core.index import Place
from pipeline.core.waits import Capacity
from pipeline.wire.errors import HeadraceError
from pipeline.wire.messages import EngineName
from pipeline.wire.subjects import STREAM_OLLAMA, Priority


class Arrival(NamedTuple):
    """A request with a deadline (UTC seconds), and how many of its lane were queued before it when it was stored."""

    place: Place
    deadline: float
    position: int
    may_spill: bool


class Refusal(NamedTuple):
    """A request that would begin only after its deadline, and the error that ends it."""

    arrival: Arrival
    error: HeadraceError


@dataclass(slots=True)
class Arrivals:
    """Collects requests between two observations of the engines, and refuses the hopeless ones. The one writer of both.

    Args:
        admission: predicts when a request begins.
    """

    admission: Admission
    _waiting: list[Arrival] = field(init=False, default_factory=list)

    def add(self, arrival: Arrival) -> None:
        """A request was stored."""
        self._waiting.append(arrival)

    def keep(self, waits: Callable[[Place], bool]) -> None:
        """Drop the requests that no longer wait."""
        self._waiting = [arrival for arrival in self._waiting if waits(arrival.place)]

    def observe(self, engine: EngineName, capacity: Capacity, now: float) -> None:
        """The workers of an engine, as of now (monotonic seconds)."""
        self.admission.observe(engine, capacity, now)

    def decide(
        self, queued: Mapping[EngineName, Mapping[Priority, int]], *, now: float, wall_now: float
    ) -> list[Refusal]:
        """Decide on all requests that were added since the last call.

        Args:
            queued: the broker's counts of the lanes.
            now: monotonic seconds.
            wall_now: UTC seconds.
        """
        refused: Counter[tuple[str, Priority]] = Counter()
        refusals = []
        arrived, self._waiting = self._waiting, []
        for arrival in arrived:
            place = arrival.place
            engine: EngineName = "ollama" if place.stream == STREAM_OLLAMA else "mlx"
            lane = (place.stream, place.priority)
            request = AdmissionRequest(
                priority=place.priority,
                # The view can have missed an event; no more requests are before this one than the broker counts.
                position=max(0, min(arrival.position - refused[lane], queued[engine][place.priority] - 1)),
                left_s=arrival.deadline - wall_now,
                may_spill=arrival.may_spill,
            )
            if (error := self.admission.decide(engine, request, queued[engine], now)) is not None:
                refused[lane] += 1
                refusals.append(Refusal(arrival, error))
        return refusals
