"""Quotas of keys: what fits, what is left, and by how much parallel callers can exceed a limit."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.quotas import ENDED_FOR_S, RESERVED_FOR_S, Estimate, KeyLimits, Quotas
from pipeline.wire.subjects import Priority
from pipeline.wire.usage import Period, UsageNote

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC).timestamp()
MIDNIGHT = datetime(2026, 11, 27, tzinfo=UTC).timestamp()
PER_MINUTE, PER_DAY = KeyLimits(tokens_per_minute=100), KeyLimits(tokens_per_day=100)


def note(name: str, prompt: int = 0, completion: int = 0, **more) -> UsageNote:
    return UsageNote(name, "done", Priority.LOW, key="k", prompt=prompt, completion=completion, **more)


class Key:
    """One key with limits, and the time."""

    def __init__(self, limits: KeyLimits) -> None:
        self.limits, self.now, self.quotas = limits, NOW, Quotas()

    def ask(self, name: str, prompt: int = 0, completion: int = 0, **more):
        return self.quotas.reserve("k", self.limits, name, Estimate(prompt, completion), self.now, **more)

    def end(self, name: str, prompt: int = 0, completion: int = 0, **more) -> None:
        self.quotas.settle(note(name, prompt, completion, **more), self.now, self.now)

    def left(self, what: str = "tokens"):
        return self.quotas.standing("k", self.limits, self.now)[what]


def test_a_request_more_than_the_minute_has_is_refused_until_the_oldest_is_a_minute_old():
    key = Key(KeyLimits(requests_per_minute=2))
    assert key.ask("a") is None
    key.now += 10
    assert key.ask("b") is None
    refusal = key.ask("c")
    assert (refusal.limit, refusal.most, refusal.used, refusal.retry_after_s) == ("requests_per_minute", 2, 2, 50.0)
    assert key.left("requests") == (2, 0, 60.0)
    key.now += 50
    assert key.ask("c") is None


def test_the_second_choice_of_a_call_is_no_request_of_its_own():
    key = Key(KeyLimits(requests_per_minute=1))
    assert key.ask("a") is None
    assert key.ask("a-1", counts=False) is None
    assert key.ask("b") is not None


@pytest.mark.parametrize("limits", [PER_MINUTE, PER_DAY])
def test_an_estimate_is_reserved_and_then_replaced_by_the_account(limits):
    key = Key(limits)
    assert key.ask("a", 20, 60) is None
    assert key.left().remaining == 20
    refusal = key.ask("b", 1, 20)
    assert (refusal.used, refusal.asked, refusal.exhausted) == (80, 21, False)
    assert refusal.retry_after_s == 1.0, "the open request may end soon"
    key.end("a", 20, 10)
    assert key.left().remaining == 70
    assert key.ask("b", 1, 20) is None


def test_what_was_used_leaves_the_minute_and_stays_in_the_day():
    key = Key(KeyLimits(tokens_per_minute=100, tokens_per_day=150))
    key.ask("a", 100)
    key.end("a", 100)
    refusal = key.ask("b", 40)
    assert (refusal.limit, refusal.retry_after_s, refusal.exhausted) == ("tokens_per_minute", 60.0, True)
    key.now += 60
    assert key.ask("b", 40) is None
    key.end("b", 40)
    refusal = key.ask("c", 20)
    assert (refusal.limit, refusal.exhausted) == ("tokens_per_day", True)
    assert refusal.retry_after_s == MIDNIGHT - key.now
    key.now = MIDNIGHT
    assert key.ask("c", 20) is None


def test_a_request_larger_than_the_limit_fits_a_key_that_used_nothing():
    key = Key(PER_MINUTE)
    assert key.ask("a", 1000) is None
    assert key.ask("b", 1) is not None
    key.end("a", 1000)
    assert key.left().remaining == 0


def test_a_repeated_request_is_reserved_once_and_dropped_if_no_account_comes():
    key = Key(PER_MINUTE)
    for _ in range(2):
        assert key.ask("a", 60) is None
    key.quotas.ended("k", "a", key.now)
    key.now += ENDED_FOR_S - 1
    assert key.left().remaining == 40
    key.now += 1
    assert key.left().remaining == 100


def test_what_a_request_has_used_counts_from_its_answer_on_and_once():
    key = Key(PER_MINUTE)
    key.ask("a", 10)
    key.quotas.ended("k", "a", key.now, Estimate(60, 20))
    key.quotas.ended("k", "a", key.now)
    assert key.left().remaining == 20
    key.end("a", 60, 20)
    assert key.left().remaining == 20


def test_an_account_that_does_not_come_and_a_request_that_was_not_stored_hold_nothing():
    key = Key(PER_MINUTE)
    key.ask("a", 60)
    key.now += RESERVED_FOR_S
    assert key.left().remaining == 100
    key.ask("b", 60)
    key.quotas.release("k", "b")
    assert key.left().remaining == 100


def test_the_prompt_of_an_answer_that_was_broken_off_counts_as_it_was_estimated():
    key = Key(PER_MINUTE)
    key.ask("a", 30, 50)
    key.end("a", completion=2)
    assert key.left().remaining == 68
    key.ask("b", 30, 30)
    key.end("b")
    assert key.left().remaining == 68, "nothing was computed"


def test_the_lines_of_a_batch_count_in_the_day_only():
    key = Key(KeyLimits(tokens_per_minute=100, tokens_per_day=1000))
    key.end("line", 90, 10, batch=True)
    assert key.left().remaining == 100
    key.limits = KeyLimits(tokens_per_day=1000)
    assert key.left().remaining == 900
    assert not key.quotas.day_is_over_limit("k", key.limits, key.now)
    assert key.quotas.day_is_over_limit("k", PER_DAY, key.now)


def test_what_another_gateway_let_in_counts_as_its_own():
    key = Key(KeyLimits(requests_per_minute=2, tokens_per_minute=100))
    key.quotas.heard("k", "a", Estimate(60), key.now, counts=True)
    assert key.ask("b", 60).used == 60
    assert key.left("requests").remaining == 1


def test_after_a_restart_the_accounts_tell_what_was_used():
    key = Key(KeyLimits(tokens_per_minute=100, tokens_per_day=200))
    key.ask("open", 10)
    key.end("before", 50)
    key.quotas.forget_used()
    day = Period.DAY.start_of(NOW)
    key.quotas.learn("k", day, 100, NOW)
    key.quotas.learn("k", day - 86400, 1000, NOW)
    key.quotas.settle(note("x", 30), NOW - 10, NOW, today=False)
    key.quotas.settle(note("y", 20), NOW - 5, NOW)
    key.quotas.settle(note("z", 1), NOW - 61, NOW)
    assert key.left().remaining == 100 - 30 - 20 - 10
    key.limits = KeyLimits(tokens_per_day=200)
    assert key.left().remaining == 200 - 100 - 20 - 1 - 10


CALLS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 200)), min_size=1, max_size=60)


@given(calls=CALLS, data=st.data())
def test_parallel_callers_exceed_a_limit_by_at_most_one_request_each(calls, data):
    key, open_requests, used, callers = Key(PER_MINUTE), {}, 0, 20
    for number, (estimated, actual) in enumerate(calls):
        while open_requests and (len(open_requests) >= callers or data.draw(st.booleans())):
            name = data.draw(st.sampled_from(sorted(open_requests)))
            used += open_requests[name]
            key.end(name, open_requests.pop(name))
        if key.ask(str(number), estimated) is None:
            assert used < 100, "nothing fits once the limit is reached"
            open_requests[str(number)] = actual
    total = used + sum(open_requests.values())
    largest = sorted((actual for _, actual in calls), reverse=True)[:callers]
    assert total <= 100 + sum(largest)
