"""What is known of lanes, and which of them give the next requests where several are taken at once."""

from __future__ import annotations

from collections import Counter, deque
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.fair import Fair
from pipeline.core.planning import EVEN, OVERDUE_EVERY, PREFER_COMPLEX, LaneState, Planning, turns_taken
from pipeline.core.scheduler import RECHECK_S, Scheduler
from pipeline.wire.subjects import LANES, Lane, Priority, Task

HIGH, MEDIUM, LOW = Priority
UNTRIAGED, SIMPLE, COMPLEX = Task
# Powers of two, so that virtual times are exact: the estimate of a request is 64 tokens, which is 128, 256 and 512.
SHARES = {HIGH: 0.5, MEDIUM: 0.25, LOW: 0.125}


def lane(priority=HIGH, task=UNTRIAGED, tenant=""):
    return Lane(priority, task, tenant)


def of_tenants(*tenants, priority=HIGH):
    return [lane(priority, tenant=tenant) for tenant in tenants]


class Scene:
    """Lanes as the scheduler knows them: those of `waiting` hold requests, those of `due` were empty.

    `waiting` maps lanes to the sequences that were announced there, or names lanes where none was.
    """

    def __init__(self, waiting, due=()):
        self.states, self.open, self.due = {}, {}, list(due)
        self.priorities = Fair(SHARES.__getitem__)
        self.tenants = {priority: Fair(lambda _: 1.0, lasting=False) for priority in Priority}
        for each in (*waiting, *due):
            self.states[each] = LaneState(tuple(each._replace(task=task) for task in Task))
        for each in waiting:
            self.states[each].waiting.extend(waiting[each] if isinstance(waiting, dict) else ())
            self.open.setdefault(each.priority, {}).setdefault(each.tenant, []).append(each)
            self.priorities.joins(each.priority)
            self.tenants[each.priority].joins(each.tenant)

    def planning(self, *, allowed=None, lifts=lambda _: None, choices=0, saturated=False):
        allowed = set(self.states) if allowed is None else allowed
        accounts = self.priorities, self.tenants
        return Planning(self.states, self.open, self.due, allowed, *accounts, lifts, choices, saturated)

    def next(self, count, **how):
        planning = self.planning(**how)
        return [planning.next() for _ in range(count)]

    def priorities_of_next(self, count, **how):
        return [each.priority for each in self.next(count, **how)]

    def tenants_of_next(self, count, **how):
        return [each.tenant for each in self.next(count, **how)]

    def tasks_of_next(self, count, **how):
        return [each.task for each in self.next(count, **how)]


# ---- what is known of a lane


def test_the_oldest_requests_of_a_lane_are_those_that_were_announced():
    state = LaneState((), taken=3, waiting=deque([5, 8, 9]))
    assert [state.oldest(after) for after in range(3)] == [5, 8, 9]


def test_where_none_was_announced_the_oldest_request_comes_after_what_is_known():
    assert LaneState((), taken=3, waiting=deque([5, 8])).oldest(2) == 9
    assert LaneState((), taken=3, waiting=deque([5, 8])).oldest(7) == 9
    assert LaneState((), taken=3).oldest() == 4


def test_no_older_request_waits_than_the_one_that_was_taken():
    state = LaneState((), waiting=deque([2, 4, 6, 8]))
    state.was_taken(5)
    assert (state.taken, list(state.waiting)) == (5, [6, 8])
    state.was_taken(6)
    assert (state.taken, list(state.waiting)) == (6, [8])
    state.was_taken(1)
    assert (state.taken, list(state.waiting)) == (6, [8])


# ---- turns of the lanes of one tenant


@pytest.mark.parametrize("weights", [EVEN, PREFER_COMPLEX])
@pytest.mark.parametrize("chosen", Task)
def test_what_a_lane_pays_for_its_turn_its_rivals_get(weights, chosen):
    rivals = [lane(task=task) for task in Task]
    changes = turns_taken(lane(task=chosen), rivals, weights)
    paid = -changes.pop(lane(task=chosen))
    assert changes == {rival: weights[rival.task] for rival in rivals if rival.task is not chosen}
    assert paid == sum(changes.values()) > 0


# ---- which priority


def test_priorities_take_turns_by_their_shares():
    scene = Scene([lane(priority) for priority in Priority])
    expected = [HIGH, MEDIUM, LOW, HIGH, HIGH, MEDIUM, HIGH, HIGH, MEDIUM, LOW]
    assert scene.priorities_of_next(10) == expected


def test_what_runs_already_is_charged():
    scene = Scene([lane(HIGH), lane(MEDIUM)])
    for number in range(4):
        scene.priorities.start(str(number), HIGH)
    assert scene.priorities_of_next(4) == [MEDIUM, MEDIUM, HIGH, MEDIUM]


@pytest.mark.parametrize("before", range(OVERDUE_EVERY))
def test_a_priority_beyond_the_bound_goes_first_after_so_many_choices_of_others_and_is_not_charged(before):
    scene = Scene([lane(HIGH), lane(LOW)])
    asked = []

    def lifts(choices):
        asked.append(choices)
        return LOW if choices + 1 >= OVERDUE_EVERY else None

    planned = scene.priorities_of_next(13, lifts=lifts, choices=before)
    lifted = [number for number, choices in enumerate(asked) if choices == OVERDUE_EVERY - 1]
    assert lifted == list(range(OVERDUE_EVERY - 1 - before, 13, OVERDUE_EVERY))
    assert {planned[number] for number in lifted} == {LOW}
    # The others are as they would be without it.
    assert [each for number, each in enumerate(planned) if number not in lifted] == scene.priorities_of_next(
        13 - len(lifted)
    )


def test_a_priority_beyond_the_bound_that_may_not_be_chosen_is_left_out():
    scene = Scene([lane(HIGH), lane(LOW)])
    asked = []

    def lifts(choices):
        asked.append(choices)
        return LOW

    assert scene.priorities_of_next(3, lifts=lifts, allowed={lane(HIGH)}) == [HIGH] * 3
    assert asked == [0, 1, 2]


# ---- which tenant


def test_tenants_take_turns_and_of_those_that_had_as_much_the_one_with_the_oldest_request_is_first():
    default, ann, bob = of_tenants("", "ann", "bob")
    scene = Scene({default: [3, 60, 61], ann: [1, 50, 51], bob: [2, 40, 70]})
    assert scene.tenants_of_next(9) == ["ann", "bob", "", "bob", "ann", "", "ann", "", "bob"]


def test_a_tenant_that_had_more_waits_until_the_others_had_as_much():
    ann, bob = of_tenants("ann", "bob")
    scene = Scene({ann: [1, 2, 3, 4], bob: [11, 12, 13, 14]})
    for number in range(2):
        scene.tenants[HIGH].start(str(number), "ann")
    assert scene.tenants_of_next(5) == ["bob", "bob", "ann", "bob", "ann"]


def test_tenants_of_one_priority_are_not_charged_for_another():
    ann, bob = of_tenants("ann", "bob")
    scene = Scene({ann: [1, 2], bob: [3, 4], lane(MEDIUM, tenant="ann"): [5, 6], lane(MEDIUM, tenant="bob"): [7, 8]})
    planned = scene.next(6)
    assert [each.tenant for each in planned if each.priority is HIGH] == ["ann", "bob", "ann", "bob"]
    assert [each.tenant for each in planned if each.priority is MEDIUM] == ["ann", "bob"]


def test_the_oldest_request_of_a_tenant_is_that_of_all_its_lanes():
    simple = {tenant: lane(task=SIMPLE, tenant=tenant) for tenant in ("ann", "bob")}
    ann, bob = of_tenants("ann", "bob")
    assert Scene({ann: [2], bob: [3], simple["bob"]: [1]}).next(1) == [simple["bob"]]
    assert Scene({ann: [2], bob: [1], simple["ann"]: [3]}).next(2) == [bob, ann]


# ---- which lane


def test_of_the_lanes_of_a_tenant_the_one_with_the_oldest_request_is_first():
    scene = Scene(
        {lane(task=UNTRIAGED): [2, 4, 9, 10], lane(task=SIMPLE): [1, 6, 7, 11], lane(task=COMPLEX): [3, 5, 8, 12]}
    )
    order = [SIMPLE, UNTRIAGED, COMPLEX, UNTRIAGED, COMPLEX, SIMPLE, SIMPLE, COMPLEX, UNTRIAGED]
    assert scene.tasks_of_next(9) == order


def test_lanes_of_which_nothing_was_announced_take_turns():
    scene = Scene([lane(task=task) for task in Task])
    assert scene.tasks_of_next(6) == [UNTRIAGED, SIMPLE, COMPLEX] * 2


def test_a_saturated_engine_prefers_what_only_it_can_answer_and_leaves_no_lane_out():
    scene = Scene({lane(task=UNTRIAGED): [2, 3], lane(task=SIMPLE): [1], lane(task=COMPLEX): [4, 5]})
    turns = [COMPLEX, UNTRIAGED, COMPLEX, SIMPLE, COMPLEX, UNTRIAGED, COMPLEX]
    assert scene.tasks_of_next(14, saturated=True) == turns * 2
    two = Scene([lane(task=SIMPLE), lane(task=COMPLEX)])
    assert two.tasks_of_next(5, saturated=True) == [COMPLEX, COMPLEX, SIMPLE, COMPLEX, COMPLEX]


def test_a_lane_that_was_empty_takes_its_turn_among_the_others_of_its_tenant():
    scene = Scene([lane(task=SIMPLE), lane(task=COMPLEX)], [lane(task=UNTRIAGED)])
    assert scene.tasks_of_next(5, saturated=True) == [UNTRIAGED, COMPLEX, COMPLEX, COMPLEX, SIMPLE]


@pytest.mark.parametrize("saturated", [False, True])
def test_turns_that_were_taken_before_count(saturated):
    scene = Scene([lane(task=task) for task in Task])
    scene.states[lane(task=SIMPLE)].credit = 20.0
    assert scene.tasks_of_next(2, saturated=saturated) == [SIMPLE, SIMPLE]
    scene.states[lane(task=UNTRIAGED)].credit = 50.0
    assert scene.tasks_of_next(2, saturated=saturated) == [UNTRIAGED, UNTRIAGED]


# ---- lanes that are asked again


def test_a_lane_that_was_empty_gives_one_request():
    due = [lane(HIGH), lane(LOW), lane(LOW, SIMPLE)]
    planned = Scene([], due).next(5)
    assert Counter(planned[:3]) == Counter(due)
    assert planned[3:] == [None, None]


def test_a_lane_that_was_empty_goes_before_those_of_its_priority_that_have_requests():
    open_, due = lane(), lane(tenant="ann")
    assert Scene({open_: [1, 2, 3]}, [due]).next(3) == [due, open_, open_]


def test_a_lane_that_was_empty_waits_for_the_turn_of_its_priority():
    scene = Scene([lane(HIGH), lane(LOW)], [lane(LOW, tenant="ann")])
    scene.priorities.start("runs", LOW)
    planned = scene.next(8)
    assert planned == [lane(HIGH)] * 4 + [lane(LOW, tenant="ann"), lane(HIGH), lane(HIGH), lane(HIGH)]


def test_of_those_that_were_empty_the_tenant_that_had_less_is_first_and_then_the_oldest_request():
    ann, bob, carl, dora = of_tenants("ann", "bob", "carl", "dora")
    scene = Scene([dora], [carl, ann, bob])
    scene.states[bob].taken, scene.states[carl].taken = 7, 3
    fair = scene.tenants[HIGH]
    fair.start("one", "dora")
    fair.start("other", "ann")
    fair.finish("one", 1.0)
    assert scene.tenants_of_next(5) == ["carl", "bob", "ann", "dora", "dora"]


def ran_cheaply(fair, key, requests):
    """Let requests of one taker run, which cost less than was thought. Returns how to end them."""
    for number in range(requests):
        fair.start(f"{key} {number}", key)
    return lambda: [fair.finish(f"{key} {number}", 1.0) for number in range(requests)]


def test_a_tenant_whose_lane_was_empty_does_not_hold_back_the_time_of_the_others():
    """Carl moves down with those in turn, as their requests cost less than was thought: now with Bob alone."""
    ann, bob, carl = of_tenants("ann", "bob", "carl")
    scene = Scene({bob: range(1, 9)}, [ann])
    fair = scene.tenants[HIGH]
    end = ran_cheaply(fair, "bob", 4)
    scene.states[carl] = LaneState((), waiting=deque(range(11, 19)))
    scene.open[HIGH]["carl"] = [carl]
    fair.joins("carl")
    end()
    assert scene.tenants_of_next(4) == ["ann", "bob", "bob", "bob"]


def test_a_priority_whose_lane_was_empty_does_not_hold_back_the_time_of_the_others():
    scene = Scene([lane(MEDIUM)], [lane(HIGH)])
    end = ran_cheaply(scene.priorities, MEDIUM, 10)
    scene.states[lane(LOW)] = LaneState(())
    scene.open[LOW] = {"": [lane(LOW)]}
    scene.priorities.joins(LOW)
    scene.tenants[LOW].joins("")
    end()
    assert scene.priorities_of_next(4) == [HIGH, MEDIUM, MEDIUM, MEDIUM]


def test_a_tenant_with_other_requests_stays_in_turn_when_its_empty_lane_gave_one():
    ann, bob = of_tenants("ann", "bob")
    scene = Scene({bob: range(1, 9), ann: range(11, 19)}, [lane(task=SIMPLE, tenant="ann")])
    ran_cheaply(scene.tenants[HIGH], "ann", 1)()
    ran_cheaply(scene.tenants[HIGH], "bob", 10)
    assert scene.tenants_of_next(4) == ["ann"] * 4


def test_a_priority_with_other_requests_stays_in_turn_when_its_empty_lane_gave_one():
    scene = Scene([lane(HIGH), lane(MEDIUM)], [lane(HIGH, tenant="ann")])
    ran_cheaply(scene.priorities, HIGH, 1)()
    ran_cheaply(scene.priorities, MEDIUM, 4)
    assert scene.priorities_of_next(4) == [HIGH] * 4


# ---- the whole


@pytest.mark.parametrize("saturated", [False, True])
def test_only_allowed_lanes_are_chosen(saturated):
    lanes = [lane(priority, task, tenant) for priority in Priority for task in Task for tenant in ("", "ann")]
    due = [each._replace(tenant="bob") for each in LANES]
    scene = Scene(lanes, due)
    for allowed in (*([each] for each in lanes), lanes[4:9]):
        assert set(scene.next(20, allowed=set(allowed), saturated=saturated)) == set(allowed)
    for allowed in due:
        assert scene.next(2, allowed={allowed}, saturated=saturated) == [allowed, None]
    assert scene.next(1, allowed=set()) == [None]


def test_planning_changes_nothing_outside():
    scene = Scene({lane(priority, task): [1, 2] for priority in Priority for task in Task}, of_tenants("ann", "bob"))
    before = repr(vars(scene))
    assert None not in scene.next(40)
    assert repr(vars(scene)) == before


ALL = [Lane(priority, task, tenant) for priority in Priority for task in Task for tenant in ("", "ann", "bob")]
COUNT, WALL_NOW = 10, 1000.0


@given(
    lanes=st.lists(st.sampled_from(ALL), min_size=1, unique=True),
    due=st.lists(st.sampled_from(ALL), unique_by=lambda each: each.priority),
    sequences=st.permutations(range(1, COUNT * len(ALL) + 1)),
    ran=st.lists(st.tuples(st.integers(0, 26), st.integers(1, 300), st.integers(0, 999), st.booleans()), max_size=12),
    saturated=st.booleans(),
)
def test_a_plan_is_what_the_scheduler_chooses_one_after_another(lanes, due, sequences, ran, saturated):
    """Lanes have requests enough, announced in any order, and some of them ran; those that were empty have one each."""
    due = [each for each in due if each not in lanes]
    scheduler = Scheduler({HIGH: 5.0, MEDIUM: 2.0, LOW: 1.0}, lanes=(*lanes, *due))
    for number, (index, cost, stored_at, ended) in enumerate(ran):
        each = lanes[index % len(lanes)]
        start(scheduler, f"ran {number}", each, stored_at=stored_at, saturated=saturated)
        if ended:
            scheduler.finish(f"ran {number}", cost)
    for each in due:
        scheduler.returned(each, 0.0)
        scheduler.empty(each, 0.0)
    for number, sequence in enumerate(sorted(sequences[: COUNT * len(lanes)])):
        scheduler.arrived(lanes[sequences[number] % len(lanes)], sequence)
    now = {"wall_now": WALL_NOW, "saturated": saturated}
    plans = [scheduler.plan(count, [*lanes, *due], RECHECK_S, **now) for count in range(COUNT + 1)]
    planned = [next(iter(after - before)) for before, after in pairwise(plans)]
    chosen = []
    for number in range(COUNT):
        each = scheduler.order(RECHECK_S, **now)[0]
        chosen.append(each)
        state, heads = scheduler._lanes[each], scheduler._heads[each.priority]
        sequence = state.waiting[0] if state.waiting else None
        # The bound on waiting is looked at once: the next request has waited as long as this one.
        stored_at = heads.get(each.tenant)
        start(scheduler, f"next {number}", each, stored_at=stored_at, saturated=saturated, sequence=sequence)
        if each in due:
            scheduler.empty(each, RECHECK_S)
    assert planned == chosen


def start(scheduler, request_id, each, **how):
    scheduler.start(request_id, each, pending=1, now=RECHECK_S, wall_now=WALL_NOW, **how)
