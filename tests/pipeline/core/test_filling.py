"""How far the queue was read, and what happened meanwhile."""

from __future__ import annotations

import pytest

from pipeline.core.filling import Filling
from pipeline.core.index import Place
from pipeline.wire.messages import RequestEvent
from pipeline.wire.subjects import Priority


def filling():
    return Filling(("A", "B"))


def filled(last=10):
    """Both streams were read; A held up to last."""
    found = filling()
    for stream, horizon in (("A", last), ("B", 0)):
        found.begin_stream(stream, 1, horizon)
        found.end_stream(stream)
    found.end()
    return found


def place(sequence, stream="A"):
    return Place(stream, Priority.HIGH, sequence)


def happened(found, kind, request_id="r"):
    found.happened(RequestEvent(request_id, kind, Priority.HIGH))


def test_reading_begins_at_the_first_message_and_then_behind_what_is_known():
    found = filling()
    assert found.begin_stream("A", 5, 10) == (5, False)
    found.read("A", 7)
    assert found.begin_stream("A", 5, 12) == (8, False)
    found.end_stream("A")
    assert found.begin_stream("A", 5, 20) == (13, False)


def test_a_stream_with_an_earlier_end_than_is_known_was_replaced():
    found = filled(last=10)
    found.begin()
    assert found.begin_stream("A", 1, 3) == (1, True)


def test_what_was_announced_while_reading_is_known_afterwards():
    found = filling()
    found.begin_stream("A", 1, 10)
    assert not found.announced("A", 11)
    found.end_stream("A")
    assert found.begin_stream("A", 1, 15) == (12, False)


def test_a_gap_in_the_announcements_is_noticed_once_all_was_read():
    found = filled(last=10)
    assert not found.announced("A", 11)
    assert not found.announced("A", 11)
    assert found.announced("A", 13)
    found.begin()
    assert not found.announced("A", 15), "it is being read already"
    assert found.begin_stream("A", 1, 15) == (12, False)


def test_what_is_before_a_place_is_known_up_to_where_was_read():
    found = filling()
    assert not found.knows_all_before(place(1))
    found.begin_stream("A", 1, 10)
    found.read("A", 4)
    assert [found.knows_all_before(place(n)) for n in (4, 5)] == [True, False]
    assert not found.knows_all_before(place(4, "B"))
    found.end()
    assert found.knows_all_before(place(99))


def test_the_part_that_was_read_grows_to_the_whole():
    found = filling()
    assert found.part == 0.0
    found.begin_stream("A", 11, 20)
    assert found.part == 0.0
    found.read("A", 15)
    assert found.part == 0.5
    found.end_stream("A")
    found.begin_stream("B", 1, 0)
    assert found.part == 1.0
    found.end()
    assert found.part == 1.0


@pytest.mark.parametrize(("begun", "state"), [(True, "running"), (False, "queued")])
def test_a_request_that_nothing_happened_to_runs_where_it_was_handed_over_before(begun, state):
    assert filling().state("r", begun=begun) == state


@pytest.mark.parametrize(
    ("kinds", "state"),
    [
        (["started"], "running"),
        (["started", "returned"], "queued"),
        (["started", "done"], None),
        (["failed"], None),
        (["cancelled"], None),
        (["expired"], None),
        (["spilled"], "queued"),
        (["triaged"], "queued"),
    ],
)
def test_what_happened_while_the_queue_was_read_counts(kinds, state):
    found = filling()
    for kind in kinds:
        happened(found, kind)
    assert found.state("r", begun=False) == state
    assert found.state("other", begun=False) == "queued"


def test_what_happened_is_not_kept_beyond_the_reading():
    found = filled()
    happened(found, "done")
    found.begin()
    assert found.state("r", begun=False) == "queued"
    happened(found, "done")
    found.end()
    found.begin()
    assert found.state("r", begun=False) == "queued"


def test_a_stream_is_known_up_to_its_latest_announcement_and_not_while_it_is_read():
    found = filled(last=10)
    found.announced("A", 11)
    assert (found.knows("A", 11), found.knows("A", 12), found.knows("B", 0)) == (True, False, True)
    found.begin()
    assert not found.knows("A", 11)
