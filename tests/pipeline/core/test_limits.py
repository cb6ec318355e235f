"""Token buckets as arithmetic: no clock, no event loop."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.limits import Limits, Rate

RATE = Rate(per_s=2.0, burst=4.0)


def taken(limits: Limits, count: int, *, now: float, client: str = "a", kind: str = "lists", rate: Rate = RATE) -> int:
    """How many of count calls are allowed at one moment."""
    return sum(limits.take(client, kind, rate, now).allowed for _ in range(count))


def test_a_burst_fits_and_no_more():
    assert taken(Limits(), 10, now=5.0) == 4


def test_it_fills_again_at_its_rate_and_not_above_its_burst():
    limits = Limits()
    taken(limits, 4, now=0.0)
    assert taken(limits, 10, now=1.0) == 2
    assert taken(limits, 10, now=1000.0) == 4


def test_one_kind_of_call_never_drains_another_nor_one_client_another():
    limits = Limits()
    assert taken(limits, 100, now=0.0, kind="lists") == 4
    assert taken(limits, 100, now=0.0, kind="statistics") == 4
    assert taken(limits, 100, now=0.0, client="b") == 4


def test_a_refusal_says_when_the_next_call_fits_and_then_it_does():
    limits = Limits()
    taken(limits, 4, now=0.0)
    refused = limits.take("a", "lists", RATE, 0.0)
    assert not refused.allowed
    assert refused.retry_after_s == pytest.approx(0.5)
    assert not limits.take("a", "lists", RATE, 0.49).allowed
    assert limits.take("a", "lists", RATE, 0.51).allowed


def test_what_remains_counts_down_to_nothing():
    limits = Limits()
    verdicts = [limits.take("a", "lists", RATE, 0.0) for _ in range(5)]
    assert [verdict.remaining for verdict in verdicts] == [3, 2, 1, 0, 0]
    assert [verdict.reset_s for verdict in verdicts] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert {verdict.limit for verdict in verdicts} == {4}


def test_a_rate_of_nothing_is_no_limit():
    limits = Limits()
    assert taken(limits, 1000, now=0.0, rate=Rate.of(0, burst_s=10)) == 1000
    assert len(limits) == 0


def test_a_slow_rate_still_lets_one_through():
    assert taken(Limits(), 5, now=0.0, rate=Rate.of(0.01, burst_s=10)) == 1


def test_a_clock_that_goes_back_gives_nothing_away():
    limits = Limits()
    taken(limits, 4, now=10.0)
    assert taken(limits, 1, now=5.0) == 0
    assert taken(limits, 4, now=10.5) == 1


def test_any_number_of_clients_takes_bounded_memory_and_who_is_limited_stays_so():
    limits = Limits(max_buckets=100)
    for number in range(1000):
        # The flood goes on among clients that call once.
        limits.take("flood", "lists", RATE, number * 0.01)
        limits.take(f"client {number}", "lists", RATE, number * 0.01)
        assert len(limits) <= 101
    assert taken(limits, 10, now=10.0, client="flood") <= 4


def test_who_still_has_to_wait_is_not_forgotten_for_one_with_a_faster_rate():
    limits = Limits(max_buckets=2)
    slow = Rate(per_s=0.1, burst=1.0)
    assert taken(limits, 1, now=0.0, client="slow", rate=slow) == 1
    assert taken(limits, 1, now=0.0, client="rested") == 1
    assert taken(limits, 1, now=5.0, client="new") == 1
    assert len(limits) == 2
    assert taken(limits, 1, now=6.0, client="slow", rate=slow) == 0


@given(
    st.floats(0.1, 100),
    st.floats(1, 50),
    st.lists(st.floats(0, 3), min_size=1, max_size=100),
)
def test_never_more_than_the_burst_and_the_rate_times_the_time(per_s: float, burst: float, gaps: list[float]):
    limits, rate = Limits(), Rate(per_s, burst)
    now, allowed = 0.0, 0
    for gap in gaps:
        now += gap
        allowed += limits.take("a", "lists", rate, now).allowed
    assert allowed <= math.floor(burst + now * per_s + 1e-6)
    assert allowed >= 1
