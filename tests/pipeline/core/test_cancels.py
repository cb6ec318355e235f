"""A cancel means one request, and not the next one of the same id."""

from __future__ import annotations

from pipeline.core.cancels import Cancels
from pipeline.core.index import Place
from pipeline.wire.subjects import STREAM_OLLAMA, STREAM_REQUESTS, Priority

FIRST = Place(STREAM_REQUESTS, Priority.HIGH, 1)
NEXT = Place(STREAM_REQUESTS, Priority.HIGH, 2)
SPILLED = Place(STREAM_OLLAMA, Priority.HIGH, 9)


def due(cancels, now):
    """What is due, ended as the monitor ends it."""
    found = cancels.due(now)
    for request_id, cancel in found:
        cancels.done(request_id, cancel)
    return [(request_id, cancel.place) for request_id, cancel in found]


def following(stored_at=100.0):
    cancels = Cancels()
    cancel = cancels.begin("a", FIRST)
    cancel.stored_at = stored_at
    cancels.follow(cancel, 5.0)
    return cancels


def expecting():
    cancels = Cancels()
    cancels.expect("a", until=150.0)
    return cancels


def test_nothing_is_due_where_nothing_was_cancelled():
    cancels = Cancels()
    assert (cancels.next_due(), due(cancels, 1e9)) == (None, [])
    assert not cancels.announced("a", 100.0, FIRST, moved=True)
    assert not cancels.read("a", 100.0, FIRST)


def test_a_followed_request_is_due_once_at_its_time():
    cancels = following()
    assert (cancels.next_due(), due(cancels, 4.9)) == (5.0, [])
    assert due(cancels, 5.0) == [("a", FIRST)]
    assert (cancels.next_due(), due(cancels, 6.0)) == (None, [])


def test_a_followed_request_is_looked_for_where_it_moved():
    cancels = following()
    assert cancels.announced("a", 100.0, SPILLED, moved=True)
    assert due(cancels, 5.0) == [("a", SPILLED)]


def test_the_next_request_of_the_same_id_is_not_meant_nor_its_moves():
    cancels = following()
    assert not cancels.announced("a", 200.0, NEXT, moved=False)
    assert not cancels.announced("a", 200.0, SPILLED, moved=True)
    assert due(cancels, 5.0) == [("a", FIRST)]


def test_a_request_that_had_left_before_anyone_could_look_is_known_by_its_move():
    cancels = following(stored_at=None)
    assert not cancels.announced("a", 200.0, NEXT, moved=False)
    assert not cancels.announced("a", 200.0, SPILLED, moved=True), "that is the next one"
    assert cancels.announced("a", 100.0, SPILLED, moved=True)
    assert due(cancels, 5.0) == [("a", SPILLED)]


def test_an_expected_request_is_found_once_when_it_is_read():
    cancels = expecting()
    assert not cancels.read("b", 100.0, FIRST)
    cancel = cancels.read("a", 100.0, FIRST)
    assert cancel is not None
    assert cancels.begin("a", FIRST) is cancel
    assert not cancels.read("a", 100.0, FIRST)


def test_an_expected_request_is_found_when_it_moves():
    assert expecting().announced("a", 100.0, SPILLED, moved=True)


def test_what_came_after_the_cancel_is_not_expected():
    cancels = expecting()
    assert not cancels.announced("a", 200.0, NEXT, moved=False)
    assert not cancels.read("a", 200.0, NEXT)
    assert cancels.read("a", 100.0, FIRST)


def test_a_request_that_was_stored_before_its_cancel_and_announced_after_it_is_expected():
    assert expecting().announced("a", 150.0, FIRST, moved=False)


def test_what_was_stored_after_the_cancel_is_not_expected_where_its_announcement_was_missed():
    assert not expecting().read("a", 200.0, NEXT)
    assert not expecting().announced("a", 200.0, SPILLED, moved=True)


def test_a_second_cancel_expects_what_was_stored_before_it():
    cancels = expecting()
    cancels.expect("a", until=250.0)
    assert cancels.announced("a", 200.0, NEXT, moved=False)


def test_when_the_whole_queue_was_read_nothing_is_expected_any_more_and_the_followed_still_are():
    cancels = expecting()
    cancels.follow(cancels.begin("b", FIRST), 5.0)
    cancels.filled()
    assert not cancels.read("a", 100.0, FIRST)
    assert due(cancels, 5.0) == [("b", FIRST)]


def test_a_cancel_that_is_being_carried_out_knows_where_its_request_moves_and_is_not_begun_twice():
    cancels = Cancels()
    cancel = cancels.begin("a", FIRST)
    assert not cancels.announced("a", 100.0, SPILLED, moved=True)
    assert (cancel.place, cancel.stored_at, cancels.next_due()) == (SPILLED, 100.0, None)
    cancels.filled()
    cancels.follow(cancel, 5.0)
    assert due(cancels, 5.0) == [("a", SPILLED)]


def test_a_followed_request_that_is_read_is_cancelled_where_it_was_read():
    """Its move was announced while the monitor was away from the broker."""
    cancels = following()
    assert not cancels.read("a", 200.0, NEXT)
    assert cancels.read("a", 100.0, SPILLED)
    assert due(cancels, 5.0) == [("a", SPILLED)]


def test_a_cancel_that_is_done_ends_no_other_of_its_id():
    cancels = Cancels()
    first = cancels.begin("a", FIRST)
    again = cancels.begin("a", NEXT)
    assert again is not first
    cancels.done("a", first)
    cancels.follow(again, 5.0)
    assert due(cancels, 5.0) == [("a", NEXT)]
    cancels.done("a", again)


def test_a_cancel_that_is_due_stays_until_it_is_done_or_followed_on():
    cancels = following()
    ((_, cancel),) = cancels.due(5.0)
    cancels.follow(cancel, 9.0)
    assert (cancels.next_due(), cancels.due(8.9)) == (9.0, [])
    assert due(cancels, 9.0) == [("a", FIRST)]


def test_an_expected_cancel_has_no_time():
    assert (expecting().next_due(), due(expecting(), 1e9)) == (None, [])
