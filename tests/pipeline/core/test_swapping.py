"""What is loaded, what leaves, and when: facts in, a decision out."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.swapping import (
    HIGH_LEAVE_S,
    LEAST_LOAD_S,
    LEAVE_S,
    PATIENCE_S,
    STAY_LOADS,
    ModelUse,
    Swap,
    decide,
    most_at_once,
    needed_bytes,
)
from pipeline.wire.subjects import Priority

HIGH, MEDIUM, LOW = Priority.HIGH, Priority.MEDIUM, Priority.LOW
NOW = 1000.0


def loaded(name: str, **more) -> ModelUse:
    """A model that has been in use since long ago."""
    return ModelUse(name, 10, "ready", **({"since": 0.0, "used_at": NOW, "running": 1, "busy_with": LOW} | more))


def idle(name: str, **more) -> ModelUse:
    return loaded(name, **({"running": 0, "busy_with": None, "used_at": 0.0} | more))


def wanted(name: str, priority: Priority = LOW, *, oldest_at: float = NOW, **more) -> ModelUse:
    return ModelUse(name, **({"size_bytes": 10} | more), waiting=priority, oldest_at=oldest_at)


def test_a_model_that_fits_is_loaded_at_once():
    assert decide([loaded("a"), wanted("b")], 20, NOW) == Swap(load="b")


def test_the_least_recently_used_idle_model_leaves():
    models = [idle("a", used_at=5.0), idle("b", used_at=3.0), wanted("c")]
    assert decide(models, 20, NOW) == Swap(leave=["b"])


def test_all_leave_for_a_model_that_is_larger_than_the_budget_but_not_beside_a_pinned_one():
    """It turned out larger than its files said, or was the only one when it was loaded."""
    large = wanted("c", size_bytes=30)
    assert decide([idle("a"), idle("b"), large], 20, NOW).leave == ["a", "b"]
    assert decide([replace(idle("a"), stage="leaving"), large], 20, NOW) == Swap(end=["a"])
    assert decide([large], 20, NOW) == Swap(load="c")
    assert decide([idle("a", pinned=True), idle("b"), large], 20, NOW) == Swap()


def test_an_idle_model_leaves_before_one_in_use():
    assert decide([loaded("a"), idle("b", used_at=NOW - 1), wanted("c")], 20, NOW).leave == ["b"]


def test_a_model_in_use_stays_for_some_loads():
    models = [loaded("a", since=NOW), wanted("b", load_s=2.0)]
    stays_s = STAY_LOADS * 2.0
    assert decide(models, 10, NOW) == Swap(wake_at=NOW + stays_s)
    assert decide(models, 10, NOW + stays_s).leave == ["a"]


def test_high_forces_a_swap_after_one_load_and_not_before():
    models = [loaded("a", since=NOW), wanted("b", HIGH, load_s=2.0)]
    assert decide(models, 10, NOW) == Swap(wake_at=NOW + 2.0)
    assert decide(models, 10, NOW + 2.0).leave == ["a"]


def test_low_does_not_force_out_a_model_that_serves_high_until_it_has_waited_long():
    models = [loaded("a", busy_with=HIGH), wanted("b")]
    assert decide(models, 10, NOW) == Swap(wake_at=NOW + PATIENCE_S)
    assert decide(models, 10, NOW + PATIENCE_S).leave == ["a"]


def test_a_model_that_served_high_a_moment_ago_stays_for_the_next_question():
    models = [idle("a", used_at=NOW - 1, high_at=NOW - 1), wanted("b", MEDIUM, load_s=2.0)]
    stays_s = STAY_LOADS * 2.0
    assert decide(models, 10, NOW) == Swap(wake_at=NOW - 1 + stays_s)
    assert decide([*models, idle("other", used_at=NOW - 0.6)], 20, NOW).leave == ["other"]
    assert decide([models[0], wanted("b", HIGH, load_s=2.0)], 10, NOW).leave == ["a"]
    later = NOW + PATIENCE_S
    assert decide([replace(models[0], high_at=later, used_at=later - 9), models[1]], 10, later).leave == ["a"]


def test_a_leaving_model_ends_when_its_requests_have_ended_or_at_its_deadline():
    leaving = ModelUse("a", 10, "leaving", since=NOW, running=1, busy_with=LOW)
    assert decide([leaving, wanted("b")], 10, NOW) == Swap(wake_at=NOW + LEAVE_S)
    assert decide([leaving, wanted("b", HIGH)], 10, NOW) == Swap(wake_at=NOW + HIGH_LEAVE_S)
    assert decide([leaving, wanted("b", HIGH)], 10, NOW + HIGH_LEAVE_S).end == ["a"]
    assert decide([replace(leaving, running=0), wanted("b")], 10, NOW).end == ["a"]


def test_nothing_else_leaves_while_room_is_being_made():
    models = [ModelUse("a", 10, "leaving", since=NOW, running=1), loaded("b"), wanted("c")]
    assert decide(models, 20, NOW).leave == []


def test_one_model_is_loaded_at_a_time():
    assert decide([ModelUse("a", 10, "loading"), wanted("b")], 100, NOW) == Swap()


def test_a_smaller_model_does_not_overtake_the_one_that_waits_in_front():
    models = [loaded("a", since=NOW, busy_with=HIGH), wanted("big", HIGH, size_bytes=15), wanted("small", LOW)]
    assert decide(models, 20, NOW).load is None


def test_the_most_urgent_is_next_then_the_oldest_and_a_long_wait_goes_first():
    young, old = wanted("young", MEDIUM, oldest_at=NOW - 1), wanted("old", MEDIUM, oldest_at=NOW - 2)
    assert decide([young, old], 100, NOW).load == "old"
    assert decide([young, old, wanted("high", HIGH)], 100, NOW).load == "high"
    assert decide([old, wanted("high", HIGH), wanted("low", oldest_at=NOW - PATIENCE_S)], 100, NOW).load == "low"


def test_a_pinned_model_is_loaded_without_a_request_and_stays():
    assert decide([ModelUse("a", 10, pinned=True)], 10, NOW).load == "a"
    assert decide([idle("a", pinned=True, idle_s=1.0), wanted("b", HIGH)], 10, NOW) == Swap()


def test_what_is_preloaded_takes_no_place():
    assert decide([idle("a"), ModelUse("b", 10, preload=True)], 10, NOW) == Swap()


def test_a_model_without_work_leaves_after_its_idle_time():
    model = idle("a", used_at=NOW, idle_s=5.0)
    assert decide([model], 10, NOW) == Swap(wake_at=NOW + 5.0)
    assert decide([model], 10, NOW + 5.0).leave == ["a"]


def test_models_that_turn_out_larger_leave_until_they_fit_but_for_the_last():
    models = [replace(idle("a", used_at=1.0), size_bytes=50), replace(idle("b", used_at=2.0), size_bytes=50)]
    assert decide(models, 60, NOW).leave == ["a"]
    assert decide(models[:1], 10, NOW) == Swap()


def test_the_only_model_is_loaded_even_if_it_exceeds_the_budget():
    assert decide([wanted("a", size_bytes=50)], 10, NOW).load == "a"


def test_how_many_fit_and_what_one_needs():
    assert [most_at_once([30, 10, 20], budget) for budget in (5, 10, 30, 59, 60)] == [1, 1, 2, 2, 3]
    models = [idle("a", pinned=True), wanted("b", size_bytes=7)]
    assert [needed_bytes(model, models) for model in models] == [10, 17]


STAGES = st.sampled_from(["absent", "loading", "ready", "leaving"])
USES = st.builds(
    ModelUse,
    st.uuids().map(str),
    st.integers(1, 50),
    STAGES,
    st.floats(900, 1000),
    st.floats(900, 1000),
    st.floats(0, 20),
    st.integers(0, 3),
    st.sampled_from(Priority),
    st.none() | st.sampled_from(Priority),
    st.floats(900, 1000),
    st.booleans(),
    st.booleans(),
    st.none() | st.floats(0.1, 50),
)


@given(st.lists(USES, max_size=6), st.integers(1, 120))
def test_what_is_decided_is_possible(models, budget):
    swap, by_name = decide(models, budget, NOW), {model.name: model for model in models}
    assert all(by_name[name].stage == "ready" and not by_name[name].pinned for name in swap.leave)
    assert all(by_name[name].stage == "leaving" for name in swap.end)
    assert len(set(swap.leave)) == len(swap.leave)
    assert swap.wake_at is None or swap.wake_at > NOW
    if swap.load is not None:
        used = sum(model.size_bytes for model in models if model.stage != "absent")
        assert by_name[swap.load].stage == "absent"
        assert not used or used + by_name[swap.load].size_bytes <= budget


@given(st.lists(USES.map(lambda use: replace(use, stage="absent", pinned=False)), min_size=2, max_size=5))
def test_with_a_budget_for_each_alone_every_model_that_is_waited_for_is_loaded_some_time(models):
    """Requests that keep coming for all models: none waits forever, and loads take a bounded part of the time."""
    budget, now = max(model.size_bytes for model in models), NOW
    models = [replace(model, load_s=1.0, waiting=LOW, oldest_at=NOW, running=0, busy_with=None) for model in models]
    loads, ready_at = dict.fromkeys((model.name for model in models), 0), now
    for _ in range(400):
        swap = decide(models, budget, now)
        for i, model in enumerate(models):
            if model.stage == "loading" and now >= ready_at:
                models[i] = replace(model, stage="ready", since=now, waiting=None, running=1, busy_with=LOW)
            elif model.name == swap.load:
                models[i], ready_at = replace(model, stage="loading", since=now), now + model.load_s
                loads[model.name] += 1
            elif model.name in swap.leave:
                models[i] = replace(model, stage="leaving", since=now, running=0, busy_with=None)
            elif model.name in swap.end:
                models[i] = replace(model, stage="absent", since=now, waiting=LOW, oldest_at=now)
        now += 0.5
    assert min(loads.values()) > 0
    assert sum(loads.values()) <= 200 / (STAY_LOADS * LEAST_LOAD_S) + 1
