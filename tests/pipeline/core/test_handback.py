"""A request for another worker's model reaches it soon, and a queue of them does not go round and round."""

from __future__ import annotations

import pytest

from pipeline.core.handback import GAP_S, MOST_S, HandBacks


def test_a_worker_with_a_free_slot_gets_the_request_at_once_and_only_the_first_time():
    backs = HandBacks()
    assert backs.delay_s(10.0, first=True, room=True) == 0.0
    assert backs.delay_s(10.0, first=False, room=True) == pytest.approx(GAP_S)


def test_requests_come_again_one_after_the_other_in_their_order():
    backs = HandBacks()
    due = [10.0 + backs.delay_s(10.0, first=True, room=False) for _ in range(100)]
    assert due == pytest.approx([10.0 + GAP_S * n for n in range(1, 101)])
    # The first one is back, and goes behind the others.
    assert due[0] + backs.delay_s(due[0], first=False, room=False) == pytest.approx(due[-1] + GAP_S)


def test_after_a_pause_nothing_is_made_up_for():
    backs = HandBacks()
    backs.delay_s(10.0, first=True, room=False)
    assert backs.delay_s(99.0, first=True, room=False) == pytest.approx(GAP_S)


def test_no_request_waits_longer_than_the_most():
    backs = HandBacks()
    delays = [backs.delay_s(10.0, first=True, room=False) for _ in range(5000)]
    assert max(delays) == MOST_S
