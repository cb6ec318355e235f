"""The broker's clock is known to half a round trip, wherever this machine's own clock stands."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.clock import DRIFT, NOTABLE_S, ClockEstimate, OffsetWatch


def test_before_the_first_sample_the_given_epoch_holds_and_nothing_is_known():
    clock = ClockEstimate(1000.0)
    assert clock.wall(5.0) == 1005.0
    assert clock.error_s(5.0) == math.inf


def test_a_timestamp_belongs_to_the_middle_of_its_round_trip():
    clock = ClockEstimate(0.0)
    clock.sample(10.0, 10.5, 5010.25)
    assert clock.wall(10.25) == 5010.25
    assert clock.wall(20.0) == 5020.0
    assert clock.error_s(10.5) == pytest.approx(0.25 + 0.5 * DRIFT)
    assert clock.error_s(110.0) == pytest.approx(0.25 + 100 * DRIFT)


def test_the_sample_with_the_shorter_round_trip_is_kept_until_drift_outweighs_it():
    clock = ClockEstimate(0.0)
    clock.sample(10.0, 10.01, 5010.0)
    exact = clock.epoch
    clock.sample(11.0, 11.4, 5011.1)
    assert clock.epoch == exact
    long_after = 11.0 + 0.5 / DRIFT
    clock.sample(long_after, long_after + 0.4, 5000.1 + long_after)
    assert clock.epoch != exact


@pytest.mark.parametrize("step_s", [3600.0, -3600.0, 1.0])
def test_a_contradicting_sample_replaces_a_better_one(step_s):
    clock = ClockEstimate(0.0)
    clock.sample(10.0, 10.01, 5010.0)
    clock.sample(11.0, 11.4, 5011.2 + step_s)
    assert clock.wall(11.2) == pytest.approx(5011.2 + step_s)


round_trips = st.lists(
    st.tuples(st.floats(0, 100), st.floats(0, 2), st.floats(0, 1)),  # pause before, round trip, where it was stamped
    min_size=1,
    max_size=20,
)


@given(round_trips, st.floats(-DRIFT / 2, DRIFT / 2), st.floats(-1e6, 1e6))
def test_the_error_is_never_larger_than_it_is_said_to_be(trips, drift, epoch):
    clock, now = ClockEstimate(0.0), 0.0
    for pause_s, trip_s, part in trips:
        sent_at, now = now + pause_s, now + pause_s + trip_s
        stamped_at = epoch + (sent_at + part * trip_s) * (1 + drift)
        clock.sample(sent_at, now, stamped_at)
        assert abs(clock.wall(now) - (epoch + now * (1 + drift))) <= clock.error_s(now) + 1e-6


def test_an_offset_is_news_once_and_again_when_it_has_changed():
    watch = OffsetWatch()
    assert not watch.is_news(NOTABLE_S)
    assert watch.is_news(60.0)
    assert not watch.is_news(60.0 + NOTABLE_S)
    assert watch.is_news(70.0)
    assert watch.is_news(-0.1)
    assert not watch.is_news(0.0)
