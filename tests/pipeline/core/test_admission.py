"""What is refused because it would wait in vain, and what is not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.admission import SAFETY, SETTLED_AFTER_S, Admission, AdmissionRequest
from pipeline.core.waits import Capacity
from pipeline.wire.subjects import Priority

HIGH, MEDIUM, LOW = Priority
SHARES = {HIGH: 0.6, MEDIUM: 0.3, LOW: 0.1}
# Full: two requests a second.
FULL = Capacity(slots_used=4, slots_total=4, pending_tokens=0.0, tokens_per_s=100.0, tokens_per_request=50.0)
NOTHING = dict.fromkeys(Priority, 0)


def settled(**engines: Capacity) -> Admission:
    admission = Admission(SHARES)
    for engine, capacity in engines.items():
        admission.observe(engine, capacity, 0.0)
    return admission


def waiting(place: int, left_s: float, *, priority: Priority = HIGH, may_spill: bool = False) -> AdmissionRequest:
    return AdmissionRequest(priority, place, left_s, may_spill)


def depths(**queued: int) -> dict[Priority, int]:
    return NOTHING | {Priority(name): depth for name, depth in queued.items()}


LATER = SETTLED_AFTER_S


def test_what_begins_after_its_deadline_is_refused_with_its_expected_wait():
    error = settled(mlx=FULL).decide("mlx", waiting(20, 5.0), depths(high=21), LATER)
    assert error.code == "deadline_exceeded"
    assert "10.0 s" in error.message
    assert "leaves 5.0 s" in error.message
    assert error.param == "Llm-Timeout"


def test_what_begins_before_its_deadline_may_wait():
    assert settled(mlx=FULL).decide("mlx", waiting(20, 11.0), depths(high=21), LATER) is None


def test_a_prediction_that_is_only_a_little_late_refuses_nothing():
    admission = settled(mlx=FULL)
    assert admission.decide("mlx", waiting(20, 10.0 / SAFETY), depths(high=21), LATER) is None
    assert admission.decide("mlx", waiting(20, 9.9 / SAFETY), depths(high=21), LATER) is not None


def test_the_wait_is_that_of_its_place_and_not_of_the_whole_lane():
    admission = settled(mlx=FULL)
    assert admission.predicted_wait_s("mlx", waiting(2, 1.0), depths(high=500), LATER) == pytest.approx(1.0)


def test_a_lane_with_a_small_share_waits_longer_beside_others():
    admission = settled(mlx=FULL)
    alone = admission.predicted_wait_s("mlx", waiting(10, 1.0, priority=LOW), depths(low=11), LATER)
    beside = admission.predicted_wait_s("mlx", waiting(10, 1.0, priority=LOW), depths(low=11, high=500), LATER)
    assert beside == pytest.approx(alone * (SHARES[LOW] + SHARES[HIGH]) / SHARES[LOW])


def test_a_lane_that_runs_empty_leaves_its_share_to_the_others():
    """All work before the request takes 30 s; if HIGH never ran empty it would take 35 s."""
    request = waiting(10, 21.0, priority=LOW)
    admission = settled(mlx=FULL)
    assert admission.predicted_wait_s("mlx", request, depths(low=11, high=50), LATER) == pytest.approx(30.0)
    assert admission.decide("mlx", request, depths(low=11, high=50), LATER) is None


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300))
def test_no_wait_is_longer_than_all_the_work_before_the_request(place, high, medium):
    wait_s = settled(mlx=FULL).predicted_wait_s(
        "mlx", waiting(place, 1.0, priority=LOW), depths(high=high, medium=medium, low=place + 1), LATER
    )
    per_request_s = FULL.tokens_per_request / FULL.tokens_per_s
    assert place * per_request_s * 0.999 <= wait_s <= (place + high + medium) * per_request_s * 1.001


@pytest.mark.parametrize(
    "unknown",
    [
        Capacity(),
        Capacity(slots_used=4, slots_total=4),
        Capacity(slots_used=4, slots_total=4, tokens_per_s=100.0),
        Capacity(slots_used=4, slots_total=4, tokens_per_request=50.0),
    ],
)
def test_nothing_is_refused_by_an_engine_whose_rate_is_not_known(unknown):
    assert settled(mlx=unknown).decide("mlx", waiting(10_000, 0.1), depths(high=10_000), LATER) is None


def test_nothing_is_refused_by_an_engine_that_nobody_has_heard_of():
    assert settled().decide("mlx", waiting(10_000, 0.1), depths(high=10_000), LATER) is None


def test_a_free_slot_refuses_nothing():
    idle = Capacity(slots_used=1, slots_total=4, tokens_per_s=0.001, tokens_per_request=50.0)
    assert settled(mlx=idle).decide("mlx", waiting(0, 0.1), depths(high=1), LATER) is None


def test_an_engine_that_has_just_become_full_may_prove_as_many_times_as_fast_as_it_has_slots():
    admission = settled(mlx=FULL)
    asked = waiting(20, 1.0)
    assert admission.predicted_wait_s("mlx", asked, depths(high=21), LATER - 0.1) == pytest.approx(10.0 / 4)
    assert admission.predicted_wait_s("mlx", asked, depths(high=21), LATER) == pytest.approx(10.0)


def test_an_engine_that_had_room_in_between_has_to_settle_again():
    admission = settled(mlx=FULL)
    admission.observe("mlx", Capacity(3, 4, 0.0, 100.0, 50.0), 5.0)
    admission.observe("mlx", FULL, 6.0)
    asked = waiting(20, 1.0)
    assert admission.predicted_wait_s("mlx", asked, depths(high=21), 7.0) == pytest.approx(2.5)
    assert admission.predicted_wait_s("mlx", asked, depths(high=21), 8.0) == pytest.approx(10.0)


def test_what_may_spill_is_served_by_both_engines():
    admission = settled(mlx=FULL, ollama=FULL)
    queued = depths(high=21)
    assert admission.predicted_wait_s("mlx", waiting(20, 1.0, may_spill=True), queued, LATER) == pytest.approx(5.0)
    assert admission.predicted_wait_s("mlx", waiting(20, 1.0), queued, LATER) == pytest.approx(10.0)


def test_nothing_that_may_spill_is_refused_while_the_other_engine_has_not_been_measured():
    admission = settled(mlx=FULL, ollama=Capacity(slots_used=0, slots_total=4))
    assert admission.decide("mlx", waiting(1000, 1.0, may_spill=True), depths(high=1000), LATER) is None
    assert admission.decide("mlx", waiting(1000, 1.0), depths(high=1000), LATER) is not None


def test_an_engine_that_is_away_takes_nothing_off_the_other():
    admission = settled(mlx=FULL, ollama=Capacity())
    assert admission.decide("mlx", waiting(20, 5.0, may_spill=True), depths(high=21), LATER) is not None


@given(st.integers(0, 10_000), st.floats(0.001, 3600), st.floats(0.001, 3600), st.booleans())
def test_more_time_never_turns_an_accepted_request_into_a_refused_one(place, left_s, more_s, may_spill):
    admission = settled(mlx=FULL, ollama=FULL)
    queued = depths(high=place + 1)
    if admission.decide("mlx", waiting(place, left_s, may_spill=may_spill), queued, LATER) is None:
        more = waiting(place, left_s + more_s, may_spill=may_spill)
        assert admission.decide("mlx", more, queued, LATER) is None
