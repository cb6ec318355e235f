"""When the breaker opens, when it probes, and when it closes."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from pipeline.core.breaker import Breaker, Circuit


def tripped(now=0.0, **settings):
    breaker = Breaker(failures_to_trip=1, **settings)
    breaker.failed(breaker.permit(now), now, "refused")
    return breaker


def test_closed_breaker_allows_any_number_of_calls_and_wants_no_waking():
    breaker = Breaker()
    assert all(breaker.permit(1.0) for _ in range(100))
    assert breaker.next_wake(1.0) is None
    assert breaker.reason == ""


def test_failures_in_a_row_open_it_and_the_reason_is_the_last():
    breaker = Breaker(failures_to_trip=3, hold_s=2.0)
    for number in range(3):
        assert breaker.closed
        breaker.failed(breaker.permit(1.0), 1.0, f"failure {number}")
    assert breaker.circuit is Circuit.OPEN
    assert breaker.reason == "failure 2"
    assert breaker.permit(2.9) is None
    assert breaker.next_wake(1.0) == 3.0


def test_success_between_failures_starts_the_count_again():
    breaker = Breaker(failures_to_trip=2)
    for _ in range(10):
        breaker.failed(breaker.permit(0.0), 0.0, "refused")
        breaker.succeeded(breaker.permit(0.0))
    assert breaker.closed


def test_after_the_hold_one_probe_at_a_time_is_let_through():
    breaker = tripped(hold_s=1.0)
    assert breaker.permit(1.0) is not None
    assert breaker.circuit is Circuit.HALF_OPEN
    assert breaker.permit(1.0) is None


def test_probe_that_succeeds_closes_it_and_forgets_the_hold():
    breaker = tripped(hold_s=1.0)
    breaker.failed(breaker.permit(1.0), 1.0, "refused")
    breaker.succeeded(breaker.permit(3.0))
    assert breaker.closed
    assert breaker.reason == ""
    breaker.failed(breaker.permit(10.0), 10.0, "refused")
    assert breaker.next_wake(10.0) == 11.0


def test_hold_doubles_with_each_failed_probe_up_to_its_cap():
    breaker = tripped(hold_s=1.0, hold_cap_s=5.0)
    now, holds = 0.0, []
    for _ in range(5):
        wake = breaker.next_wake(now)
        holds.append(wake - now)
        now = wake
        breaker.failed(breaker.permit(now), now, "refused")
    assert holds == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_probe_without_a_report_counts_as_failed_when_its_time_is_up():
    breaker = tripped(hold_s=1.0, probe_timeout_s=5.0)
    lost = breaker.permit(1.0)
    assert breaker.permit(5.9) is None
    assert breaker.next_wake(5.9) == 6.0
    assert breaker.next_wake(6.0) == 8.0
    assert breaker.permit(8.0) is not None
    breaker.succeeded(lost)
    assert breaker.circuit is Circuit.HALF_OPEN


def test_abandoned_probe_may_be_repeated_at_once_and_without_a_longer_hold():
    breaker = tripped(hold_s=1.0)
    breaker.abandoned(breaker.permit(1.5), 1.5)
    assert breaker.next_wake(1.5) == 1.5
    breaker.failed(breaker.permit(1.5), 1.5, "refused")
    assert breaker.next_wake(1.5) == 3.5


def test_answers_to_calls_from_before_it_opened_count_for_nothing():
    breaker = Breaker(failures_to_trip=1, hold_s=1.0)
    early, late = breaker.permit(0.0), breaker.permit(0.0)
    breaker.failed(early, 0.0, "refused")
    breaker.succeeded(late)
    assert breaker.circuit is Circuit.OPEN
    breaker.failed(late, 0.5, "refused")
    assert breaker.next_wake(0.5) == 1.0


def test_abandoned_call_of_a_closed_breaker_changes_nothing():
    breaker = Breaker(failures_to_trip=1)
    breaker.abandoned(breaker.permit(0.0), 0.0)
    assert breaker.closed


@pytest.mark.parametrize(
    "bad",
    [{"failures_to_trip": 0}, {"hold_s": 0.0}, {"hold_s": 9.0, "hold_cap_s": 1.0}, {"probe_timeout_s": 0}],
)
def test_settings_that_make_no_breaker_are_refused(bad):
    with pytest.raises(ValueError, match="breaker"):
        Breaker(**bad)


class Circuits(RuleBasedStateMachine):
    """Any order of permits and outcomes, against what must hold in every state."""

    permits = Bundle("permits")

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.breaker = Breaker(failures_to_trip=2, hold_s=1.0, hold_cap_s=4.0, probe_timeout_s=3.0)
        self.newest_probe = None

    @rule(target=permits)
    @precondition(lambda self: self.breaker.closed)
    def call(self):
        return self.breaker.permit(self.now)

    @rule(target=permits)
    @precondition(lambda self: not self.breaker.closed)
    def probe(self):
        was_due = self.breaker.next_wake(self.now) <= self.now
        permit = self.breaker.permit(self.now)
        assert (permit is not None) is was_due
        assert self.breaker.permit(self.now) is None
        self.newest_probe = permit or self.newest_probe
        return permit

    @rule(permit=consumes(permits))
    def succeed(self, permit):
        was_open = not self.breaker.closed
        if permit is not None:
            self.breaker.succeeded(permit)
        if was_open and self.breaker.closed:
            assert permit == self.newest_probe

    @rule(permit=consumes(permits))
    def fail(self, permit):
        if permit is not None:
            self.breaker.failed(permit, self.now, "refused")

    @rule(permit=consumes(permits))
    def abandon(self, permit):
        before = self.breaker.closed
        if permit is not None:
            self.breaker.abandoned(permit, self.now)
        assert self.breaker.closed is before

    @rule(seconds=st.sampled_from([0.25, 1.0, 4.0]))
    def wait(self, seconds):
        self.now += seconds

    @invariant()
    def an_engine_that_recovers_is_found_within_the_longest_hold_and_a_probe(self):
        wake = self.breaker.next_wake(self.now)
        assert (wake is None) is self.breaker.closed
        assert wake is None or wake <= self.now + 4.0
        assert bool(self.breaker.reason) is not self.breaker.closed


TestCircuits = Circuits.TestCase
