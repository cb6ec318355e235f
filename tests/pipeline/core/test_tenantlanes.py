"""A lane of a tenant has a consumer while it holds requests, and none is removed that holds one."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pipeline.core.tenantlanes import IDLE_CROWDED_S, IDLE_S, LEAVES_S, TenantLanes
from pipeline.wire.subjects import Lane, Priority, Task

LANES = [Lane(Priority.LOW, Task.UNTRIAGED, f"t{number}") for number in range(6)]
ANN, BOB, EVE, *_ = LANES
LATER = IDLE_S + 1.0


def with_consumers(*lanes, most=8, now=0.0):
    kept = TenantLanes(most)
    for lane in lanes:
        kept.heard(lane, now)
        kept.made(lane, now)
    return kept


def test_a_lane_gets_a_consumer_when_a_request_comes_and_is_listed_then():
    kept = TenantLanes(8)
    assert kept.heard(ANN, 0.0)
    assert (kept.to_make(), kept.listed) == ([ANN], set())
    kept.made(ANN, 0.1)
    assert (kept.to_make(), kept.listed) == ([], {ANN})
    assert not kept.heard(ANN, 0.2), "there is nothing to do"


def test_a_lane_leaves_the_list_first_and_loses_its_consumer_later():
    kept = with_consumers(ANN, BOB)
    kept.heard(BOB, IDLE_S / 2)
    kept.rest(IDLE_S)
    assert kept.listed == {ANN, BOB}
    kept.rest(IDLE_S + 1.0)
    assert kept.listed == {BOB}
    assert kept.to_remove(1e9) == [], "the workers do not know yet"
    kept.told(IDLE_S + 2.0)
    kept.told(IDLE_S + 2.5)
    assert kept.to_remove(IDLE_S + 1.5 + LEAVES_S) == []
    assert kept.to_remove(IDLE_S + 2.0 + LEAVES_S) == [ANN]
    kept.removed(ANN)
    assert kept.to_remove(1e9) == []
    assert kept.waiting == []


def test_a_request_that_comes_before_the_consumer_is_removed_keeps_it():
    kept = with_consumers(ANN)
    kept.rest(LATER)
    kept.told(LATER)
    assert kept.heard(ANN, LATER)
    assert kept.listed == {ANN}
    assert kept.to_remove(1e9) == []


def test_a_request_that_comes_while_the_consumer_is_removed_gets_a_new_one():
    kept = with_consumers(ANN)
    kept.rest(LATER)
    kept.told(LATER)
    assert kept.to_remove(LATER + LEAVES_S) == [ANN]
    kept.heard(ANN, LATER + LEAVES_S)
    kept.removed(ANN)
    assert kept.listed == set()
    assert kept.to_make() == [ANN]


def test_beyond_the_most_lanes_wait_in_the_order_of_arrival_until_one_leaves():
    kept = with_consumers(ANN, BOB, most=2)
    kept.heard(LANES[3], 1.0)
    kept.heard(EVE, 1.0)
    assert kept.to_make() == []
    kept.heard(BOB, 1.0)
    kept.rest(IDLE_CROWDED_S + 0.5)
    kept.told(1.0)
    assert kept.to_make() == [], "the consumer that leaves is still there"
    [left] = kept.to_remove(IDLE_CROWDED_S + 0.5 + LEAVES_S)
    assert left == ANN
    kept.removed(left)
    assert kept.to_make() == [LANES[3]]


def test_what_another_monitor_made_is_found_and_what_is_gone_is_made_again():
    kept = with_consumers(ANN)
    assert kept.found([BOB], 1.0) == [BOB]
    assert kept.listed == {BOB}
    assert kept.to_make() == [ANN]
    assert kept.found([BOB], 2.0) == []


def test_a_consumer_that_was_about_to_be_removed_and_is_gone_is_forgotten():
    kept = with_consumers(ANN)
    kept.rest(LATER)
    kept.found([], LATER)
    assert kept.to_remove(1e9) == kept.waiting == []


def test_a_lane_that_the_broker_refuses_is_tried_again_when_a_request_is_seen():
    kept = TenantLanes(8)
    kept.heard(ANN, 0.0)
    kept.refused(ANN)
    assert kept.to_make() == []
    kept.heard(ANN, 5.0)
    assert kept.to_make() == [ANN]


class Broker(RuleBasedStateMachine):
    """Requests come and go, and the monitor acts in between, or after a part of what it meant to do."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.kept = TenantLanes(3)
        self.consumers = set()
        self.requests = dict.fromkeys(LANES, 0)
        self.removing = None
        self.known = frozenset()

    @rule(lane=st.sampled_from(LANES))
    def publish(self, lane):
        self.requests[lane] += 1
        self.kept.heard(lane, self.now)

    @rule(lane=st.sampled_from(LANES))
    def serve(self, lane):
        if lane in self.consumers and self.requests[lane]:
            self.requests[lane] -= 1

    @rule(passes=st.floats(0.0, 2 * IDLE_S))
    def wait(self, passes):
        self.now += passes

    @rule()
    def make(self):
        for lane in self.kept.to_make():
            self.consumers.add(lane)
            self.kept.made(lane, self.now)

    @rule()
    def look(self):
        self.kept.found(self.consumers, self.now)
        for lane, count in self.requests.items():
            if count:
                self.kept.heard(lane, self.now)
        self.kept.rest(self.now)

    @rule()
    def tell(self):
        self.known = self.kept.listed
        self.kept.told(self.now)

    @precondition(lambda self: self.removing is None)
    @rule()
    def begin_to_remove(self):
        leaving = self.kept.to_remove(self.now)
        assert self.known.isdisjoint(leaving), "workers may still pull from it"
        self.removing = next((lane for lane in leaving if not self.requests[lane]), None)

    @precondition(lambda self: self.removing is not None)
    @rule()
    def remove(self):
        self.consumers.discard(self.removing)
        self.kept.removed(self.removing)
        self.removing = None

    @invariant()
    def what_is_listed_has_a_consumer(self):
        assert self.kept.listed <= self.consumers

    @invariant()
    def there_are_no_more_than_allowed(self):
        assert len(self.consumers) <= 3

    @invariant()
    def a_lane_with_requests_is_listed_or_about_to_be(self):
        for lane, count in self.requests.items():
            assert not count or lane in self.kept.listed or lane in self.kept.waiting


TestBroker = Broker.TestCase
TestBroker.settings = settings(max_examples=60, stateful_step_count=60)


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_are_made_than_there_may_be(most):
    kept = TenantLanes(most)
    for lane in LANES:
        kept.heard(lane, 0.0)
    assert kept.to_make() == LANES[:most]
