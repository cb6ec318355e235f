"""A process that stood still for a lease does not trust what it is handed, for half a second."""

from __future__ import annotations

import pytest

from pipeline.core.standstill import DOUBT_S, Standstill


@pytest.fixture
def watch():
    return Standstill(lease_s=3.0, turned_at=100.0)


def test_a_loop_that_turns_in_time_raises_no_doubt(watch):
    for now in (101.0, 102.0, 105.0):
        assert not watch.stood_still(now)
        watch.turned(now)
        assert not watch.stood_still(now)


def test_a_lease_without_a_turn_is_a_standstill_also_before_the_loop_turns_again(watch):
    assert not watch.stood_still(103.0)
    assert watch.stood_still(103.1)


def test_after_a_standstill_the_doubt_lasts_half_a_second(watch):
    watch.turned(103.1)
    assert watch.stood_still(103.1)
    assert watch.stood_still(103.0 + DOUBT_S)
    assert not watch.stood_still(103.1 + DOUBT_S)


def test_a_turn_within_the_doubt_does_not_end_it(watch):
    watch.turned(104.0)
    watch.turned(104.2)
    assert watch.stood_still(104.3)
    assert not watch.stood_still(104.5)
