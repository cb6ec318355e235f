"""Requests that were just stored, until admission has decided whether each may wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.core.admission import Admission, AdmissionRequest
from pipeline.core.index import Place
from pipeline.core.turns import requests_before
from pipeline.core.waits import Capacity
from pipeline.wire.errors import HeadraceError
from pipeline.wire.messages import EngineName
from pipeline.wire.subjects import STREAM_OLLAMA, Priority


class Arrival(NamedTuple):
    """A request that was stored with a deadline (UTC seconds).

    `tenant` is whose lane it is in; empty for the default tenant.
    """

    place: Place
    deadline: float
    may_spill: bool
    tenant: str = ""


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
    _added: list[Arrival] = field(init=False, default_factory=list)
    _counted: list[Arrival] = field(init=False, default_factory=list)
    # Refused, and still in their lanes.
    _refused: list[Place] = field(init=False, default_factory=list)

    def add(self, arrival: Arrival) -> None:
        """A request was stored."""
        self._added.append(arrival)

    def counting(self) -> None:
        """The lanes are counted now. What is added later is not in these counts, and waits for the next ones."""
        self._counted += self._added
        self._added.clear()

    def keep(self, waits: Callable[[Place], bool]) -> None:
        """Drop the requests that no longer wait."""
        self._counted = [arrival for arrival in self._counted if waits(arrival.place)]
        self._refused = [place for place in self._refused if waits(place)]

    def observe(self, engine: EngineName, capacity: Capacity, now: float) -> None:
        """The workers of an engine, as of now (monotonic seconds)."""
        self.admission.observe(engine, capacity, now)

    def decide(
        self,
        queued: Mapping[EngineName, Mapping[Priority, int]],
        position: Callable[[Place], int],
        tenants: Mapping[Priority, Mapping[str, int]],
        *,
        now: float,
        wall_now: float,
    ) -> list[Refusal]:
        """Decide on the requests that were added before the lanes were counted.

        Args:
            queued: the broker's counts of the lanes.
            position: how many requests of its lane are queued before a request.
            tenants: those of MLX's lanes by tenant, who take turns.
            now: monotonic seconds.
            wall_now: UTC seconds.
        """
        refused = Counter((place.stream, place.priority) for place in self._refused)
        refusals = []
        arrived, self._counted = self._counted, []
        for arrival in arrived:
            place = arrival.place
            engine: EngineName = "ollama" if place.stream == STREAM_OLLAMA else "mlx"
            lane = (place.stream, place.priority)
            # The view can have missed an event; no more requests are before this one than the broker counts.
            before = max(0, min(position(place), queued[engine][place.priority] - 1) - refused[lane])
            if engine == "mlx":
                before = min(before, requests_before(before, arrival.tenant, tenants[place.priority]))
            request = AdmissionRequest(
                priority=place.priority,
                position=before,
                left_s=arrival.deadline - wall_now,
                may_spill=arrival.may_spill,
            )
            if (error := self.admission.decide(engine, request, queued[engine], now)) is not None:
                refused[lane] += 1
                self._refused.append(place)
                refusals.append(Refusal(arrival, error))
        return refusals
