"""Where each waiting request is stored, and what is before it."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pipeline.core.index import RUNNING_GRACE_S, Place, QueueIndex
from pipeline.wire.messages import RequestEvent
from pipeline.wire.subjects import STREAM_OLLAMA, STREAM_REQUESTS, Priority

HIGH, MEDIUM, LOW = Priority
MANY = 1000


def at(sequence, priority=HIGH, stream=STREAM_REQUESTS):
    return Place(stream, priority, sequence)


def filled(*requests):
    """Requests as (id, priority), stored in this order."""
    index = QueueIndex()
    for sequence, (request_id, priority) in enumerate(requests, 1):
        index.stored(request_id, at(sequence, priority))
    return index


def happened(index, kind, request_id, priority=HIGH):
    index.record(RequestEvent(request_id, kind, priority))


def position(index, request_id):
    return index.position(index.find(request_id))


def state(index, request_id):
    place = index.find(request_id)
    return None if place is None else index.state(place)


@pytest.mark.parametrize("place", [at(1), at(2**60, LOW, STREAM_OLLAMA), at(12345, MEDIUM)])
def test_a_place_is_the_same_when_it_was_packed(place):
    assert Place.unpacked(place.packed()) == place
    assert 0 < place.packed() < 2**64


def test_position_counts_the_requests_of_the_same_priority_that_came_before():
    index = filled(("a", HIGH), ("b", LOW), ("c", HIGH), ("d", HIGH))
    assert [position(index, request) for request in "abcd"] == [0, 0, 1, 2]
    assert [index.behind(index.find(request)) for request in "abcd"] == [2, 0, 1, 0]
    assert (index.depth(STREAM_REQUESTS, HIGH), index.depth(STREAM_REQUESTS, LOW)) == (3, 1)


def test_a_running_request_is_before_no_other():
    index = filled(("a", HIGH), ("b", HIGH))
    happened(index, "started", "a")
    assert position(index, "b") == 0
    assert state(index, "a") == "running"


def test_a_request_that_was_returned_has_its_old_position():
    index = filled(("a", HIGH), ("b", HIGH))
    happened(index, "started", "a")
    happened(index, "returned", "a")
    assert (position(index, "a"), position(index, "b")) == (0, 1)


def test_a_request_that_moved_is_where_it_was_stored_last_and_only_there():
    index = filled(("a", HIGH), ("b", HIGH))
    index.stored("a", at(7, HIGH, STREAM_OLLAMA))
    assert index.find("a") == at(7, HIGH, STREAM_OLLAMA)
    assert index.state(at(1)) is None
    assert position(index, "b") == 0
    assert len(index) == 2


@pytest.mark.parametrize("kind", ["done", "failed", "cancelled", "expired"])
def test_a_finished_request_is_forgotten(kind):
    index = filled(("a", HIGH), ("b", HIGH))
    happened(index, kind, "a")
    assert index.find("a") is None
    assert position(index, "b") == 0


@pytest.mark.parametrize("kind", ["spilled", "triaged"])
def test_a_move_that_is_only_announced_changes_nothing_yet(kind):
    index = filled(("a", HIGH))
    happened(index, kind, "a")
    assert (index.find("a"), state(index, "a")) == (at(1), "queued")


@pytest.mark.parametrize("kind", ["started", "returned", "done", "failed", "cancelled", "expired", "spilled"])
def test_events_of_unknown_requests_are_ignored(kind):
    index = QueueIndex()
    happened(index, kind, "ghost")
    assert (len(index), index.find("ghost")) == (0, None)


def test_what_a_stream_has_passed_is_forgotten_in_that_stream_alone():
    index = filled(("a", HIGH), ("b", HIGH), ("c", LOW), ("d", HIGH))
    happened(index, "started", "b")
    index.stored("o", at(1, HIGH, STREAM_OLLAMA))
    index.forget_before(STREAM_REQUESTS, 3)
    assert [index.find(request) is not None for request in "abcdo"] == [False, False, True, True, True]
    assert position(index, "d") == 0


def test_a_stream_that_was_replaced_is_forgotten_whole():
    index = filled(("a", HIGH), ("b", LOW))
    index.stored("o", at(1, HIGH, STREAM_OLLAMA))
    index.forget_stream(STREAM_REQUESTS)
    assert [index.find(request) is not None for request in "abo"] == [False, False, True]


# ---- behind the announcements


def test_a_request_that_was_read_is_entered_in_its_order():
    index = QueueIndex()
    index.stored("late", at(9))
    assert index.found("early", at(4))
    assert (position(index, "early"), position(index, "late")) == (0, 1)


def test_what_was_announced_is_newer_than_what_is_read():
    index = QueueIndex()
    index.stored("a", at(7, HIGH, STREAM_OLLAMA))
    assert not index.found("a", at(3)), "it has moved since"
    assert index.find("a") == at(7, HIGH, STREAM_OLLAMA)
    assert len(index) == 1
    happened(index, "started", "a")
    assert not index.found("a", at(7, HIGH, STREAM_OLLAMA))
    assert state(index, "a") == "running"


def test_a_request_that_runs_is_read_as_such():
    index = QueueIndex()
    index.found("a", at(1), state="running")
    index.found("b", at(2))
    assert (state(index, "a"), position(index, "b")) == ("running", 0)


# ---- endings


def test_a_place_that_is_to_be_ended_counts_no_more_until_it_is_put_back():
    index = filled(("a", HIGH), ("b", HIGH))
    index.remove(at(1))
    assert (index.find("a"), position(index, "b")) == (None, 0)
    index.put_back(at(1), 5.0)
    assert (index.find("a"), position(index, "b"), index.next_deadline()) == (at(1), 1, 5.0)


def test_what_has_waited_past_its_deadline_is_taken_out_earliest_first():
    index = QueueIndex()
    for sequence, (request_id, deadline) in enumerate([("late", 30.0), ("soon", 10.0), ("never", None)], 1):
        index.stored(request_id, at(sequence), deadline)
    assert index.next_deadline() == 10.0
    assert index.expired(9.9, MANY) == []
    assert index.expired(30.0, MANY) == [at(2), at(1)]
    assert (index.next_deadline(), len(index), index.depth(STREAM_REQUESTS, HIGH)) == (None, 1, 1)


def test_of_many_that_expire_together_some_stay_for_the_next_time():
    index = QueueIndex()
    for sequence in range(1, 6):
        index.stored(f"r{sequence}", at(sequence), 10.0)
    assert index.expired(10.0, 2) == [at(1), at(2)]
    assert (len(index), index.next_deadline()) == (3, 10.0)
    assert index.expired(10.0, 9) == [at(3), at(4), at(5)]


@pytest.mark.parametrize("kind", ["done", "failed", "cancelled", "expired"])
def test_a_finished_request_has_no_deadline_any_more(kind):
    index = QueueIndex()
    index.stored("a", at(1), 10.0)
    happened(index, kind, "a")
    assert (index.next_deadline(), index.expired(11.0, MANY)) == (None, [])


def test_a_running_request_is_its_workers_to_end_unless_that_has_died():
    index = QueueIndex()
    index.stored("a", at(1), 10.0)
    happened(index, "started", "a")
    assert index.expired(10.0, MANY) == []
    assert index.next_deadline() == 10.0 + RUNNING_GRACE_S
    assert index.expired(10.0 + RUNNING_GRACE_S, MANY) == [at(1)]


def test_a_new_request_of_an_old_name_has_its_own_deadline():
    index = QueueIndex()
    index.stored("a", at(1), 10.0)
    happened(index, "done", "a")
    index.stored("a", at(2), 50.0)
    assert index.next_deadline() == 50.0
    assert index.expired(10.0, MANY) == []


def test_what_moved_keeps_one_deadline():
    index = QueueIndex()
    index.stored("a", at(1), 10.0)
    index.stored("a", at(2, HIGH, STREAM_OLLAMA), 10.0)
    assert index.expired(10.0, MANY) == [at(2, HIGH, STREAM_OLLAMA)]
    assert index.next_deadline() is None


def test_deadlines_of_finished_requests_do_not_pile_up():
    index = QueueIndex()
    for number in range(1, 20_001):
        index.stored(f"r{number}", at(number), 1e9 + number)
        happened(index, "done", f"r{number}")
    assert len(index._deadlines) <= 1001


class Queue(RuleBasedStateMachine):
    """Any order of announcements and events, against a plain list of what is stored."""

    ids = st.sampled_from(["a", "b", "c", "d", "e"])

    def __init__(self):
        super().__init__()
        self.index = QueueIndex()
        self.model = {}
        self.sequence = 0
        # The request that each place was given to: no other one is ever stored there.
        self.owners = {}

    @rule(request=ids, stream=st.sampled_from([STREAM_REQUESTS, STREAM_OLLAMA]), priority=st.sampled_from(Priority))
    def store(self, request, stream, priority):
        self.sequence += 1
        self.model[request] = [stream, priority, self.sequence, "queued"]
        self.owners[stream, self.sequence] = request
        self.index.stored(request, Place(stream, priority, self.sequence))

    @rule(request=ids, back=st.integers(0, 5), stream=st.sampled_from([STREAM_REQUESTS, STREAM_OLLAMA]))
    def read(self, request, back, stream):
        sequence = self.sequence - back
        taken = {(entry[0], entry[2]) for entry in self.model.values()}
        if sequence < 1 or (stream, sequence) in taken:
            return
        if self.owners.setdefault((stream, sequence), request) != request:
            return
        if request not in self.model:
            self.model[request] = [stream, Priority.LOW, sequence, "queued"]
        self.index.found(request, Place(stream, Priority.LOW, sequence))

    @rule(request=ids, kind=st.sampled_from(["started", "returned", "spilled", "triaged"]))
    def go_on(self, request, kind):
        if request in self.model and kind in ("started", "returned"):
            self.model[request][3] = "running" if kind == "started" else "queued"
        happened(self.index, kind, request)

    @rule(request=ids, kind=st.sampled_from(["done", "failed", "cancelled", "expired"]))
    def end(self, request, kind):
        self.model.pop(request, None)
        happened(self.index, kind, request)

    @rule(back=st.integers(0, 5), stream=st.sampled_from([STREAM_REQUESTS, STREAM_OLLAMA]))
    def tidy(self, back, stream):
        first = max(0, self.sequence - back)
        self.model = {key: e for key, e in self.model.items() if e[0] != stream or e[2] >= first}
        self.index.forget_before(stream, first)

    @invariant()
    def places_are_those_of_the_model(self):
        assert len(self.index) == len(self.model)
        for request, (stream, priority, sequence, state) in self.model.items():
            place = Place(stream, priority, sequence)
            assert self.index.find(request) == place
            assert self.index.state(place) == state
            queued = [e[2] for e in self.model.values() if (e[0], e[1], e[3]) == (stream, priority, "queued")]
            assert self.index.depth(stream, priority) == len(queued)
            assert self.index.position(place) == sum(other < sequence for other in queued)
            assert self.index.behind(place) == sum(other > sequence for other in queued)


TestQueue = Queue.TestCase
TestQueue.settings = settings(max_examples=50, stateful_step_count=25, deadline=None)
