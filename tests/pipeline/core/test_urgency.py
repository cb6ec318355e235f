"""The most urgent is next, and none waits without end."""

from __future__ import annotations

import pytest

from pipeline.core.urgency import OLDEST_EVERY, UrgentFirst
from pipeline.wire.subjects import Priority


def queue(*added: tuple[Priority, str]) -> UrgentFirst[str]:
    waiting: UrgentFirst[str] = UrgentFirst()
    for priority, item in added:
        waiting.add(priority, item)
    return waiting


def test_the_most_urgent_is_next_and_each_priority_keeps_its_order():
    waiting = queue((Priority.MEDIUM, "m"), (Priority.LOW, "l"), (Priority.HIGH, "h1"), (Priority.HIGH, "h2"))
    assert len(waiting) == 4
    assert [waiting.pop() for _ in range(3)] == ["h1", "h2", "m"]
    assert waiting.pop() == "l"
    with pytest.raises(IndexError):
        waiting.pop()


def test_a_flood_of_urgent_ones_stops_no_other():
    waiting = queue((Priority.LOW, "low"))
    for number in range(100):
        waiting.add(Priority.HIGH, str(number))
    assert "low" in [waiting.pop() for _ in range(OLDEST_EVERY)]
