"""The demonstration sends what saturates the engines, and what they can answer soon after it."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.commands.pace import Pace
from pipeline.wire.subjects import Priority


def played(answers_per_s, *, seconds=30.0, tick_s=0.1):
    """Send to engines that answer at a fixed rate, the most urgent first. Returns what was sent and what is left."""
    pace, waiting, sent, room = Pace(seconds, answers_per_s), Counter(), Counter(), 0.0
    most = 0
    for tick in range(round(seconds / tick_s)):
        due = pace.due(tick * tick_s, waiting, saturated=waiting.total() > answers_per_s)
        waiting.update(due)
        sent.update(due)
        most = max(most, waiting.total())
        room = min(room + answers_per_s * tick_s, 8.0)
        for priority in Priority:
            answered = min(int(room), waiting[priority])
            waiting[priority] -= answered
            room -= answered
    return sent, waiting, most


@given(st.floats(0.3, 500.0))
def test_what_is_left_at_the_end_is_answered_within_a_quarter_of_the_time(answers_per_s):
    _, left, _ = played(answers_per_s)
    assert left.total() <= max(10, answers_per_s * 30 / 4)


@given(st.floats(0.3, 500.0))
def test_the_engines_are_given_more_than_a_second_of_work_and_every_lane_has_some(answers_per_s):
    sent, _, most = played(answers_per_s)
    assert most >= answers_per_s
    assert all(sent[priority] for priority in Priority)


@pytest.mark.parametrize("answers_per_s", [0.5, 2.0, 40.0])
def test_high_takes_at_most_a_quarter_of_the_engines(answers_per_s):
    sent, _, _ = played(answers_per_s)
    assert sent[Priority.HIGH] <= 1 + 30 * answers_per_s / 4


def test_nothing_but_high_is_sent_in_the_calm():
    pace = Pace(30.0, 40.0)
    assert pace.due(0.0, {}, saturated=False) == [Priority.HIGH]
    assert pace.due(0.1, {}, saturated=False) == []
    assert set(pace.due(29.0, {}, saturated=False)) == {Priority.HIGH}
