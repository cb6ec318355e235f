"""Rates follow what was measured, at the depth and the width at which it was measured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.engine_pace import EnginePace


def test_nothing_is_known_before_something_was_measured():
    pace = EnginePace()
    assert pace.reading_rate(0) is None
    assert pace.step_s(8) == 0
    assert pace.width_within(0.2, 64) == 64


def test_a_rate_is_that_of_its_depth_or_of_the_nearest():
    pace = EnginePace()
    pace.was_read(100, 0, 1.0)
    pace.was_read(100, 5000, 4.0)
    assert pace.reading_rate(255) == 100
    assert pace.reading_rate(6000) == 25
    assert pace.reading_rate(300) == 100
    assert pace.reading_rate(100_000) == 25


def test_a_small_piece_moves_the_rate_less():
    rates = []
    for tokens in (2, 32):
        pace = EnginePace()
        pace.was_read(100, 0, 1.0)
        pace.was_read(tokens, 0, tokens / 50)
        rates.append(100 - pace.reading_rate(0))
    assert 0 < rates[0] < rates[1] / 3


def test_a_quick_measurement_undoes_slow_ones():
    pace = EnginePace()
    for _ in range(20):
        pace.was_read(8, 0, 2.0)
        pace.has_stepped(8, 2.0)
    for _ in range(4):
        pace.was_read(32, 0, 0.2)
        pace.has_stepped(8, 0.1)
    assert pace.reading_rate(0) > 140
    assert pace.step_s(8) < 0.25


def test_a_step_between_two_measured_widths_lies_between_them():
    pace = EnginePace()
    pace.has_stepped(8, 0.1)
    pace.has_stepped(24, 0.3)
    assert pace.step_s(16) == pytest.approx(0.2)
    assert pace.step_s(4) == 0.1
    assert pace.step_s(48) == pytest.approx(0.6)
    assert pace.width_within(0.2, 64) == 16
    assert pace.width_within(0.01, 64) == 1


def test_a_step_takes_at_least_as_long_as_one_for_fewer():
    pace = EnginePace()
    assert pace.least_step_s(8) == 0
    pace.has_stepped(2, 0.06)
    assert pace.least_step_s(1) == 0
    assert pace.least_step_s(8) == 0.06


@given(st.lists(st.tuples(st.integers(-1, 64), st.floats(-1, 10)), max_size=20), st.integers(1, 64), st.floats(0.01, 5))
def test_a_width_that_fits_is_never_expected_to_take_longer(measured, most, seconds):
    pace = EnginePace()
    for width, duration in measured:
        pace.has_stepped(width, duration)
    width = pace.width_within(seconds, most)
    assert 1 <= width <= most
    assert width == 1 or pace.step_s(width) <= seconds
