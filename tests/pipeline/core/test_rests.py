"""A lane with a begun answer at its head is left to MLX for a while, and only that lane."""

from __future__ import annotations

from pipeline.core.rests import LaneRests
from pipeline.wire.subjects import Lane, Priority, Task

HIGH, LOW = (Lane(priority, Task.UNTRIAGED) for priority in (Priority.HIGH, Priority.LOW))


def test_a_lane_that_was_left_is_pulled_from_again_after_two_seconds():
    rests = LaneRests()
    assert not rests.has_left(HIGH, 100.0)
    rests.leave(HIGH, 100.0)
    assert rests.has_left(HIGH, 100.0)
    assert rests.has_left(HIGH, 101.9)
    assert not rests.has_left(HIGH, 102.0)


def test_the_other_lanes_are_pulled_from_meanwhile():
    rests = LaneRests()
    rests.leave(HIGH, 100.0)
    assert not rests.has_left(LOW, 100.0)


def test_leaving_again_begins_anew():
    rests = LaneRests()
    rests.leave(HIGH, 100.0)
    rests.leave(HIGH, 101.0)
    assert rests.has_left(HIGH, 102.9)
