"""Where each waiting request stands."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pipeline.core.index import RUNNING_GRACE_S, Entry, QueueIndex
from pipeline.wire.messages import RequestEvent
from pipeline.wire.subjects import STREAM_OLLAMA, STREAM_REQUESTS, Priority

HIGH, MEDIUM, LOW = Priority


def filled(*requests):
    """Requests as (id, priority), stored in this order."""
    index = QueueIndex()
    for sequence, (request_id, priority) in enumerate(requests, 1):
        index.stored(request_id, STREAM_REQUESTS, priority, sequence)
    return index


def happened(index, kind, request_id, priority=HIGH):
    index.record(RequestEvent(request_id, kind, priority))


def test_position_counts_the_requests_of_the_same_priority_that_came_before():
    index = filled(("a", HIGH), ("b", LOW), ("c", HIGH), ("d", HIGH))
    assert [index.position(request) for request in "abcd"] == [0, 0, 1, 2]
    assert (index.depth(STREAM_REQUESTS, HIGH), index.depth(STREAM_REQUESTS, LOW)) == (3, 1)


def test_who_runs_stands_before_nobody():
    index = filled(("a", HIGH), ("b", HIGH))
    happened(index, "started", "a")
    assert index.position("b") == 0
    assert index.find("a").state == "running"
    assert index.position("a") == 0


def test_a_request_given_back_stands_in_its_old_place():
    index = filled(("a", HIGH), ("b", HIGH))
    happened(index, "started", "a")
    happened(index, "returned", "a")
    assert (index.position("a"), index.position("b")) == (0, 1)


def test_a_request_that_moved_stands_where_it_was_stored_last_and_only_there():
    index = filled(("a", HIGH), ("b", HIGH))
    index.stored("a", STREAM_OLLAMA, HIGH, 7)
    assert index.find("a") == Entry(STREAM_OLLAMA, HIGH, 7)
    assert index.position("b") == 0
    assert len(index) == 2


@pytest.mark.parametrize("kind", ["done", "failed", "cancelled", "expired"])
def test_a_finished_request_is_forgotten(kind):
    index = filled(("a", HIGH), ("b", HIGH))
    happened(index, kind, "a")
    assert index.find("a") is None
    assert index.position("b") == 0


@pytest.mark.parametrize("kind", ["spilled", "triaged"])
def test_a_move_that_is_only_announced_changes_nothing_yet(kind):
    index = filled(("a", HIGH))
    happened(index, kind, "a")
    assert index.find("a") == Entry(STREAM_REQUESTS, HIGH, 1)


@pytest.mark.parametrize("kind", ["started", "returned", "done", "failed", "cancelled", "expired", "spilled"])
def test_events_of_a_request_nobody_knows_are_ignored(kind):
    index = QueueIndex()
    happened(index, kind, "ghost")
    assert len(index) == 0
    assert (index.find("ghost"), index.position("ghost")) == (None, 0)


def test_what_stood_before_a_streams_first_message_is_forgotten_in_that_stream_alone():
    index = filled(("a", HIGH), ("b", HIGH), ("c", LOW))
    index.stored("o", STREAM_OLLAMA, HIGH, 1)
    index.forget_before(STREAM_REQUESTS, 3)
    assert [index.find(request) is not None for request in "abco"] == [False, False, True, True]


# ---- deadlines


def test_what_has_waited_past_its_deadline_is_taken_out_earliest_first():
    index = QueueIndex()
    for sequence, (request_id, deadline) in enumerate([("late", 30.0), ("soon", 10.0), ("never", None)], 1):
        index.stored(request_id, STREAM_REQUESTS, HIGH, sequence, deadline)
    assert index.next_deadline() == 10.0
    assert index.expired(9.9) == []
    assert [request_id for request_id, _ in index.expired(30.0)] == ["soon", "late"]
    assert (index.next_deadline(), len(index), index.depth(STREAM_REQUESTS, HIGH)) == (None, 1, 1)


@pytest.mark.parametrize("kind", ["done", "failed", "cancelled", "expired"])
def test_a_finished_request_has_no_deadline_any_more(kind):
    index = QueueIndex()
    index.stored("a", STREAM_REQUESTS, HIGH, 1, 10.0)
    happened(index, kind, "a")
    assert (index.next_deadline(), index.expired(11.0)) == (None, [])


def test_what_runs_at_its_deadline_is_its_workers_to_end_unless_that_has_died():
    index = QueueIndex()
    index.stored("a", STREAM_REQUESTS, HIGH, 1, 10.0)
    happened(index, "started", "a")
    assert index.expired(10.0) == []
    assert index.next_deadline() == 10.0 + RUNNING_GRACE_S
    assert [request_id for request_id, _ in index.expired(10.0 + RUNNING_GRACE_S)] == ["a"]


def test_what_moved_keeps_one_deadline():
    index = QueueIndex()
    index.stored("a", STREAM_REQUESTS, HIGH, 1, 10.0)
    index.stored("a", STREAM_OLLAMA, HIGH, 2, 10.0)
    assert [entry.stream for _, entry in index.expired(10.0)] == [STREAM_OLLAMA]
    assert index.next_deadline() is None


def test_deadlines_of_finished_requests_do_not_pile_up():
    index = QueueIndex()
    for number in range(20_000):
        index.stored(f"r{number}", STREAM_REQUESTS, HIGH, number, 1e9 + number)
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

    @rule(request=ids, stream=st.sampled_from([STREAM_REQUESTS, STREAM_OLLAMA]), priority=st.sampled_from(Priority))
    def store(self, request, stream, priority):
        self.sequence += 1
        self.model[request] = [stream, priority, self.sequence, "queued"]
        self.index.stored(request, stream, priority, self.sequence)

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
        first = self.sequence - back
        self.model = {key: e for key, e in self.model.items() if e[0] != stream or e[2] >= first}
        self.index.forget_before(stream, first)

    @invariant()
    def places_are_those_of_the_model(self):
        assert len(self.index) == len(self.model)
        for request, (stream, priority, sequence, state) in self.model.items():
            assert self.index.find(request) == Entry(stream, priority, sequence, state)
            queued = [e[2] for e in self.model.values() if (e[0], e[1], e[3]) == (stream, priority, "queued")]
            assert self.index.depth(stream, priority) == len(queued)
            before = sum(other < sequence for other in queued) if state == "queued" else 0
            assert self.index.position(request) == before


TestQueue = Queue.TestCase
TestQueue.settings = settings(max_examples=50, stateful_step_count=25, deadline=None)
