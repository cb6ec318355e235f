"""Which arrivals are refused, and by which counts of the lanes they are judged."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from consumers.monitor.arrivals import Arrival, Arrivals
from pipeline.core.admission import SETTLED_AFTER_S, Admission
from pipeline.core.index import Place
from pipeline.core.waits import Capacity
from pipeline.wire.subjects import STREAM_REQUESTS, Priority

HIGH = Priority.HIGH
NOTHING = dict.fromkeys(Priority, 0)
# Full: two requests a second.
FULL = Capacity(slots_used=4, slots_total=4, tokens_per_s=100.0, tokens_per_request=50.0)
LATER = SETTLED_AFTER_S


@pytest.fixture
def arrivals() -> Arrivals:
    arrivals = Arrivals(Admission({HIGH: 0.6, Priority.MEDIUM: 0.3, Priority.LOW: 0.1}))
    arrivals.observe("mlx", FULL, 0.0)
    return arrivals


def arrival(number: int, deadline: float) -> Arrival:
    return Arrival(Place(STREAM_REQUESTS, HIGH, number), deadline, may_spill=False)


def refused(arrivals: Arrivals, high: int, position: Callable[[int], int] = lambda number: number) -> list[int]:
    queued = {"mlx": NOTHING | {HIGH: high}, "ollama": NOTHING}
    tenants = {HIGH: {"": high}}
    decided = arrivals.decide(queued, lambda place: position(place.sequence), tenants, now=LATER, wall_now=0.0)
    return [each.arrival.place.sequence for each in decided]


def test_what_comes_after_the_count_is_judged_by_the_next_one(arrivals):
    arrivals.counting()
    arrivals.add(arrival(60, deadline=3.0))
    assert refused(arrivals, high=0) == []
    arrivals.counting()
    assert refused(arrivals, high=61) == [60]


def test_each_arrival_is_judged_once(arrivals):
    arrivals.add(arrival(1, deadline=3.0))
    arrivals.counting()
    assert refused(arrivals, high=1) == []
    arrivals.counting()
    assert refused(arrivals, high=100) == []


def test_what_was_refused_and_is_still_there_keeps_no_other_waiting(arrivals):
    for number in range(60):
        arrivals.add(arrival(number, deadline=0.0))
    arrivals.counting()
    gone = refused(arrivals, high=60)
    assert len(gone) >= 59
    arrivals.add(arrival(60, deadline=10.0))
    arrivals.counting()
    arrivals.keep(lambda _: True)
    assert refused(arrivals, high=61) == []


def test_what_was_refused_and_has_left_its_lane_is_in_no_count(arrivals):
    for number in range(60):
        arrivals.add(arrival(number, deadline=0.0))
    arrivals.counting()
    refused(arrivals, high=60)
    arrivals.add(arrival(60, deadline=10.0))
    arrivals.counting()
    arrivals.keep(lambda place: place.sequence == 60)
    assert refused(arrivals, high=61, position=lambda _: 0) == []
    arrivals.add(arrival(200, deadline=10.0))
    arrivals.counting()
    assert refused(arrivals, high=61, position=lambda _: 60) == [200]


def test_who_has_less_queued_than_another_tenant_is_judged_by_its_turn(arrivals):
    arrivals.add(Arrival(Place(STREAM_REQUESTS, HIGH, 60), 3.0, may_spill=False, tenant="ann"))
    arrivals.add(arrival(61, deadline=3.0))
    arrivals.counting()
    queued = {"mlx": NOTHING | {HIGH: 62}, "ollama": NOTHING}
    tenants = {HIGH: {"": 61, "ann": 1}}
    decided = arrivals.decide(queued, lambda place: place.sequence, tenants, now=LATER, wall_now=0.0)
    assert [each.arrival.place.sequence for each in decided] == [61]
