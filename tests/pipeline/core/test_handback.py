"""A request for another worker's model reaches it soon, and a queue of them does not go round and round."""

from __future__ import annotations

from collections import Counter, deque

import pytest

from pipeline.core.handback import GAP_S, LONGEST_OWN_S, MOST_S, HandBacks


def test_a_worker_with_a_free_slot_gets_the_request_at_once_and_only_the_first_time():
    backs = HandBacks()
    assert backs.delay_s(10.0, "a", delivered=1, room=True) == 0.0
    assert GAP_S <= backs.delay_s(10.0, "a", delivered=2, room=True) <= 2 * GAP_S


def test_a_request_for_a_worker_with_a_free_slot_does_not_go_behind_those_that_wait_for_a_busy_one():
    backs = HandBacks()
    for _ in range(100):
        backs.delay_s(10.0, "a", delivered=1, room=False)
    assert backs.delay_s(10.0, "b", delivered=9, room=True) <= LONGEST_OWN_S


def test_requests_come_again_one_after_the_other_in_their_order():
    backs = HandBacks()
    due = [10.0 + backs.delay_s(10.0, "a", delivered=1, room=False) for _ in range(100)]
    assert due == pytest.approx([10.0 + GAP_S * n for n in range(1, 101)])
    # The first one is back, and goes behind the others.
    assert due[0] + backs.delay_s(due[0], "a", delivered=2, room=False) == pytest.approx(due[-1] + GAP_S)


def test_after_a_pause_nothing_is_made_up_for():
    backs = HandBacks()
    backs.delay_s(10.0, "a", delivered=1, room=False)
    assert backs.delay_s(99.0, "a", delivered=1, room=False) == pytest.approx(GAP_S)


def test_no_request_waits_longer_than_the_most():
    backs = HandBacks()
    delays = [backs.delay_s(10.0, "a", delivered=1, room=False) for _ in range(5000)]
    assert max(delays) == MOST_S


def test_a_request_waits_longer_each_time_so_that_those_behind_it_get_their_turn():
    backs = HandBacks()
    delays = [backs.delay_s(100.0 * n, "a", delivered=n, room=False) for n in range(1, 2000)]
    assert max(delays) <= LONGEST_OWN_S
    assert min(delays[5:]) >= LONGEST_OWN_S / 2
    assert len(set(delays[5:])) > 1000


def test_two_idle_workers_do_not_exchange_the_wrong_requests_without_end():
    # Two requests and two workers that alternate: with equal delays, each worker receives the wrong one each time.
    workers = {"a": HandBacks(), "b": HandBacks()}
    due, delivered, pulls = {"a": 0.0, "b": 0.001}, Counter[str](), deque(["b", "a"])
    for _ in range(50):
        request = min(due, key=lambda one: due[one])
        worker = pulls.popleft()
        delivered[request] += 1
        if worker == request:
            break
        due[request] += workers[worker].delay_s(due[request], request, delivered=delivered[request], room=False)
        pulls.append(worker)
    else:
        pytest.fail("each was given back each time")
