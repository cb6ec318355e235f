"""No two requests get the same slot, and only what was begun elsewhere runs beyond the slots."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pipeline.core.permits import Permits
from pipeline.engine import MOST_PER_SLOT


def ready(total: int, *, engine_used: int = 0, suspends: bool = False) -> Permits:
    permits = Permits()
    permits.observe(ready=True, total=total, used=engine_used, suspends=suspends)
    return permits


def running(permits: Permits, count: int):
    granted = []
    for _ in range(count):
        permit = permits.reserve() or permits.overflow()
        permits.use(permit)
        granted.append(permit)
    return granted


def test_an_engine_that_was_not_seen_ready_grants_nothing():
    permits = Permits()
    assert permits.reserve() is None
    assert permits.overflow() is None
    permits.observe(ready=False, total=4, used=0)
    assert permits.reserve() is None
    assert permits.overflow() is None
    assert not permits.holds


def test_a_reserved_slot_is_not_granted_twice_and_not_reported_as_used():
    permits = ready(1)
    permit = permits.reserve()
    assert permits.reserve() is None
    assert (permits.used, permits.over, permits.free) == (0, 0, 0)
    permits.use(permit)
    assert permits.used == 1
    permits.release(permit)
    assert (permits.used, permits.free) == (0, 1)


def test_releasing_twice_frees_one_slot():
    permits = ready(2)
    first, _ = running(permits, 2)
    permits.release(first)
    permits.release(first)
    permits.use(first)
    assert (permits.used, permits.free) == (1, 1)


def test_a_reservation_that_found_no_request_is_released():
    permits = ready(1)
    permits.release(permits.reserve())
    assert permits.free == 1


@pytest.mark.parametrize("total", [1, 3])
def test_overflow_is_granted_only_when_every_slot_is_filled_and_up_to_a_bound(total):
    permits = ready(total)
    running(permits, total - 1)
    assert permits.overflow() is None
    last = permits.reserve()
    assert permits.overflow() is None, "the reserved slot's pull finds the request"
    permits.use(last)
    over = [permits.overflow() for _ in range(MOST_PER_SLOT * total)]
    assert sum(permit is not None for permit in over) == (MOST_PER_SLOT - 1) * total


def test_slots_used_is_never_more_than_there_are_and_overflow_is_told_apart():
    permits = ready(2)
    running(permits, 3)
    assert (permits.used, permits.over, permits.free) == (2, 1, -1)


def test_an_overflowing_request_takes_the_next_slot_that_is_free():
    permits = ready(2)
    first, second, _ = running(permits, 3)
    permits.release(first)
    assert (permits.used, permits.over, permits.free) == (2, 0, 0)
    assert permits.reserve() is None
    permits.release(second)
    assert permits.reserve() is not None


def test_slots_that_the_engine_withholds_count_as_used_and_grant_nothing():
    permits = ready(4)
    running(permits, 1)
    permits.observe(ready=True, total=4, used=4)
    assert (permits.used, permits.over) == (4, 0)
    assert permits.reserve() is None
    assert permits.overflow() is None
    permits.observe(ready=True, total=4, used=1)
    assert permits.free == 3


def test_a_preempting_permit_is_granted_while_each_slot_is_filled_and_less_urgent_ones_fill_some():
    permits = ready(3, suspends=True)
    first, *_ = running(permits, 2)
    assert permits.preempt(0) is None, "a slot is free"
    running(permits, 1)
    assert permits.preempt(3) is None, "all are as urgent"
    permit = permits.preempt(2)
    assert permit is not None
    assert permits.preempt(2) is None, "the third slot is given away"
    assert permits.preempt_room(2, mine=1) == 1
    permits.use(permit)
    assert permits.preempt(3) is None
    assert (permits.used, permits.over, permits.free) == (3, 1, -1)
    permits.release(first)
    assert permits.reserve() is None, "the one that gave way goes on in the slot"


def test_no_more_are_preempted_than_the_engine_accepts():
    permits = ready(2, suspends=True)
    running(permits, 2)
    preempting = [permits.preempt(0), permits.preempt(0)]
    for permit in preempting:
        permits.use(permit)
    assert permits.preempt(0) is None
    assert permits.overflow() is None


def test_an_engine_that_cannot_suspend_or_withholds_its_slots_grants_no_preempting_permit():
    permits = ready(2)
    running(permits, 2)
    assert permits.preempt(0) is None
    permits = ready(2, suspends=True)
    running(permits, 1)
    permits.observe(ready=True, total=2, used=2, suspends=True)
    assert permits.preempt(0) is None


def test_a_reservation_no_longer_holds_when_its_slot_is_gone():
    permits = ready(2)
    running(permits, 1)
    permit = permits.reserve()
    assert permits.holds
    permits.observe(ready=True, total=2, used=2)
    assert not permits.holds
    permits.observe(ready=False, total=2, used=1)
    assert not permits.holds
    permits.observe(ready=True, total=2, used=1)
    assert permits.holds
    permits.close()
    assert not permits.holds
    permits.release(permit)
    assert permits.reserve() is None
    assert permits.used == 1


class Worker(RuleBasedStateMachine):
    """A worker that reserves, uses and releases as it likes, against a plain list of what it was granted."""

    def __init__(self) -> None:
        super().__init__()
        self.permits = ready(3, suspends=True)
        self.reserved: list = []
        self.running: list = []

    @rule(total=st.integers(0, 4), is_ready=st.booleans(), extra=st.integers(0, 2), suspends=st.booleans())
    def observe(self, total, is_ready, extra, suspends):
        used = min(total, len(self.running) + extra)
        self.permits.observe(ready=is_ready, total=total, used=used, suspends=suspends)

    @rule(as_urgent=st.integers(0, 8))
    def preempt(self, as_urgent):
        before, total = len(self.running) + len(self.reserved), self.permits.total
        permit = self.permits.preempt(as_urgent)
        if permit is not None:
            self.reserved.append(permit)
            assert total <= len(self.running)
            assert before < MOST_PER_SLOT * total
            assert as_urgent < total

    @rule(over=st.booleans())
    def grant(self, over):
        before = len(self.running) + len(self.reserved)
        total = self.permits.total
        permit = self.permits.overflow() if over else self.permits.reserve()
        if permit is not None:
            self.reserved.append(permit)
            assert before < (MOST_PER_SLOT * total if over else total)
            assert not over or len(self.running) >= total

    @precondition(lambda self: self.reserved)
    @rule()
    def use(self):
        permit = self.reserved.pop()
        self.permits.use(permit)
        self.running.append(permit)

    @precondition(lambda self: self.running or self.reserved)
    @rule(data=st.data())
    def release(self, data):
        held = data.draw(st.sampled_from([held for held in (self.running, self.reserved) if held]))
        permit = held.pop()
        self.permits.release(permit)
        self.permits.release(permit)

    @invariant()
    def counts_are_right(self):
        permits = self.permits
        assert permits.over == max(0, len(self.running) - permits.total)
        assert 0 <= permits.used <= permits.total
        assert permits.used >= min(permits.total, len(self.running))


TestWorker = Worker.TestCase
