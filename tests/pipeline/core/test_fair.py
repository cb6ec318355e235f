"""Service is shared by weight, in tokens; who was idle is owed nothing, and who owes is not let off."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.fair import Fair


def equal(**how):
    return Fair(lambda _: 1.0, **how)


def serve(fair, keys, count, cost=lambda _: 100.0):
    """Serve one after another the one whose turn it is. Returns the order, and the service of each."""
    order, service = [], Counter()
    for number in range(count):
        tags = fair.start_tags(list(keys))
        key = min(keys, key=tags.__getitem__)
        fair.start(f"{len(order)}.{number}", key)
        fair.finish(f"{len(order)}.{number}", cost(key))
        order.append(key)
        service[key] += cost(key)
    return order, service


@given(
    st.dictionaries(st.sampled_from("abcd"), st.floats(0.1, 10.0), min_size=2),
    st.dictionaries(st.sampled_from("abcd"), st.integers(1, 500)),
)
def test_service_follows_the_shares_whatever_requests_cost(weights, costs):
    fair = Fair(weights.__getitem__)
    for key in weights:
        fair.joins(key)
    costs = {key: costs.get(key, 100) for key in weights}
    _, service = serve(fair, weights, 2000, costs.__getitem__)
    per_share = {key: service[key] / weights[key] for key in weights}
    # No one is further ahead than by one request of its own and one of another.
    slack = 2 * max(costs[key] / weights[key] for key in weights) + 200 / min(weights.values())
    assert max(per_share.values()) - min(per_share.values()) <= slack


def test_who_comes_is_served_within_a_turn_and_is_owed_nothing():
    fair = equal()
    for key in "abc":
        fair.joins(key)
    serve(fair, "abc", 300)
    fair.joins("d")
    order, service = serve(fair, "abcd", 40)
    assert "d" in order[:4]
    assert service["d"] == pytest.approx(1000.0, abs=100.0)


def test_who_leaves_for_a_moment_still_owes():
    fair = equal()
    for key in "ab":
        fair.joins(key)
    fair.start("long", "a")
    fair.finish("long", 1000.0)
    fair.leaves("a")
    fair.joins("a")
    order, _ = serve(fair, "ab", 9)
    assert order == ["b"] * 9


def test_what_was_used_elsewhere_counts_from_when_it_joined():
    fair = equal()
    for key in "ab":
        fair.joins(key)
    serve(fair, "ab", 200)
    fair.used("c", 300.0)
    fair.joins("c")
    order, _ = serve(fair, "abc", 6)
    assert "c" not in order
    order, _ = serve(fair, "abc", 30)
    assert order.count("c") == pytest.approx(10, abs=2)


def test_a_trial_changes_nothing():
    fair = equal()
    for key in "ab":
        fair.joins(key)
    serve(fair, "ab", 3)
    fair.start("runs", "a")
    before = fair.start_tags(["a", "b"])
    trial = fair.trial()
    serve(trial, "ab", 10)
    trial.leaves("a")
    trial.progress("runs", 2000.0)
    trial.finish("runs", 5000.0)
    assert fair.start_tags(["a", "b"]) == before
    assert overtakes(fair, "b", "a") == 2  # "a" is served one behind: it was charged for what has not come yet


def overtakes(fair, key, victim, cost=100.0):
    """How many requests in a row may overtake, each of which is served at once."""
    for number in range(1000):
        if not fair.may_overtake(key, victim):
            return number
        fair.start(f"{key}-{number}", key)
        fair.finish(f"{key}-{number}", cost)
    return None


def test_who_overtakes_is_measured_by_what_others_had_and_not_by_what_they_were_charged():
    fair = equal()
    for key in "ab":
        fair.joins(key)
    serve(fair, "ab", 20)
    for number in range(8):
        fair.start(f"runs-{number}", "a")
    assert overtakes(fair, "b", "a") == 1
    for number in range(8):
        fair.progress(f"runs-{number}", 50.0)
    assert overtakes(fair, "b", "a") == 4
    for number in range(8):
        fair.progress(f"runs-{number}", 250.0)  # more than was thought
    assert overtakes(fair, "b", "a") == 16


def test_those_that_overtake_count_before_they_are_served():
    fair = equal()
    for key in "ab":
        fair.joins(key)
    serve(fair, "ab", 20)
    fair.start("runs", "a")
    fair.start("first", "b")
    assert not fair.may_overtake("b", "a")
    fair.progress("runs", 1.0)
    assert fair.may_overtake("b", "a")
    fair.progress("first", 102.0)
    assert not fair.may_overtake("b", "a")


def test_who_was_idle_overtakes_no_more_than_one_who_was_not():
    fair = equal()
    fair.joins("a")
    serve(fair, "a", 50)
    fair.start("runs", "a")
    fair.joins("b")
    assert overtakes(fair, "b", "a") == 1
    fair.leaves("b")
    fair.joins("b")
    assert overtakes(fair, "b", "a") == 0


def test_after_all_was_idle_none_is_behind_or_ahead_in_what_it_had():
    fair = equal()
    fair.joins("a")
    serve(fair, "a", 50)
    fair.leaves("a")
    for key in "ba":
        fair.joins(key)
        fair.start(f"runs-{key}", key)
    assert overtakes(fair, "b", "a") == overtakes(fair, "a", "b") == 0
    fair.progress("runs-a", 50.0)
    assert overtakes(fair, "b", "a") == 1


def test_when_nothing_runs_and_nothing_waits_all_begin_anew():
    fair = equal()
    fair.joins("a")
    fair.joins("b")
    serve(fair, "a", 10)
    fair.leaves("a")
    fair.leaves("b")
    fair.joins("a")
    fair.joins("b")
    assert fair.start_tag("a") == fair.start_tag("b")


@pytest.mark.parametrize("lasting", [True, False])
def test_names_that_come_and_go_leave_nothing_behind_unless_they_are_to_stay(lasting):
    fair, draw = equal(lasting=lasting), random.Random(1)
    fair.joins("steady")
    for number in range(2000):
        key = f"t{number}"
        fair.joins(key)
        fair.start(key, key)
        fair.leaves(key)
        fair.finish(key, draw.uniform(1, 500))
        serve(fair, ["steady"], 1)
    assert (len(fair) > 2000) is lasting
    assert lasting or len(fair) < 200


def test_an_account_with_a_request_that_runs_is_kept():
    fair = equal(lasting=False)
    fair.joins("a")
    fair.joins("b")
    fair.start("runs", "a")
    fair.leaves("a")
    fair.finish("runs", 1000.0)
    assert fair.start_tag("a") > fair.start_tag("b")


def test_a_refused_request_costs_a_little():
    fair = equal()
    fair.joins("a")
    fair.joins("b")
    order, _ = serve(fair, "ab", 400, lambda key: 0.0 if key == "a" else 50.0)
    assert 0 < order.count("b") < 20


def test_what_is_used_elsewhere_while_nothing_waits_here_takes_no_memory():
    fair = Fair(lambda _: 1.0, lasting=False)
    for number in range(1000):
        fair.used(f"tenant {number}", 100.0)
    assert not len(fair)
