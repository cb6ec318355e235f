"""The plan of each turn: who runs, what is read, who steps; and its bounds over random lives."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.core.batch import BatchPlanner
from pipeline.core.batch_plan import BatchLimits, Plan, Stage, batch_kv_bytes
from pipeline.core.kv import KvSize
from pipeline.wire.subjects import Priority

HIGH, MEDIUM, LOW = Priority
LIMITS = BatchLimits(
    slots=2,
    piece_tokens=2048,
    target_s=0.2,
    hold_s=2.0,
    suspensions=3,
    suspended_s=30.0,
    kept_bytes=1 << 20,
    kv_bytes_per_token=10,
)


@dataclass
class Engine:
    """A planner, and an engine that carries out its plans in a time of its own."""

    limits: BatchLimits = LIMITS
    tokens_per_s: float = 100.0
    step_s: float = 0.05
    step_s_each: float = 0.01
    piece_s: float = 0.0
    now: float = 100.0
    answers: dict[int, int] = field(default_factory=dict)
    plans: list[Plan] = field(default_factory=list)
    said: dict[int, list[float]] = field(default_factory=dict)
    suspended: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.planner = BatchPlanner(self.limits)

    def ask(self, key: int, priority: Priority, *, prompt: int = 20, answer: int = 1000, **more) -> None:
        self.planner.arrived(key, priority, tokens=prompt, longest=prompt + answer, **more)
        self.answers[key] = answer
        self.said[key] = []

    def turn(self) -> Plan:
        plan = self.planner.plan(self.now)
        self.plans.append(plan)
        for key in plan.suspend:
            self.suspended[key] = self.suspended.get(key, 0) + 1
        if plan.read:
            seconds = len(plan.read) * max(tokens for _, tokens in plan.read) / self.tokens_per_s + self.piece_s
            ending = sum(self.planner._members[key].left == tokens for key, tokens in plan.read)
            seconds += self.step_s + self.step_s_each * ending if ending else 0.0
            self.now += seconds
            before = set(self.planner.decoding())
            self.planner.was_read(plan.read, seconds=seconds, now=self.now)
            self._say(set(self.planner.decoding()) - before)
        elif plan.step:
            stepped = self.planner.decoding()
            seconds = self.step_s + self.step_s_each * len(stepped)
            self.now += seconds
            self.planner.has_stepped(seconds=seconds, now=self.now)
            self._say(stepped)
        return plan

    def until(self, condition, turns: int = 10_000) -> None:
        for _ in range(turns):
            if condition():
                return
            self.turn()
        raise AssertionError("the condition does not come true")

    def begun(self, *keys: int) -> bool:
        return all(self.said[key] for key in keys)

    def gaps(self, key: int, since: int = 0) -> list[float]:
        """Seconds between the tokens of one answer."""
        return [late - early for early, late in pairwise(self.said[key][since:])]

    def running(self) -> set[int]:
        return set(self.planner.running())

    def kept_bytes(self) -> int:
        return sum(member.kept_bytes for member in self.planner._members.values())

    def _say(self, keys) -> None:
        for key in keys:
            self.said[key].append(self.now)
            if len(self.said[key]) >= self.answers[key]:
                self.planner.ended(key)


def full_of(priority: Priority = LOW, **options) -> Engine:
    """Two answers that are being written, in two slots."""
    engine = Engine(**options)
    for key in range(1, engine.limits.slots + 1):
        engine.ask(key, priority)
    engine.until(lambda: engine.begun(*range(1, engine.limits.slots + 1)))
    engine.turn()
    return engine


# ---- places


def test_no_more_run_than_there_are_slots_and_the_most_urgent_begin_first():
    engine = Engine()
    for key, priority in enumerate((LOW, LOW, MEDIUM, HIGH), start=1):
        engine.ask(key, priority)
    engine.turn()
    assert engine.running() == {3, 4}


@pytest.mark.parametrize("priority", [MEDIUM, LOW])
def test_high_takes_a_place_from_the_latest_of_those_below(priority):
    engine = full_of(priority)
    engine.ask(9, HIGH)
    plan = engine.turn()
    assert plan.suspend == [2]
    assert engine.running() == {1, 9}
    engine.until(lambda: engine.begun(9))
    engine.planner.ended(9)
    assert engine.turn().resume == [2]


def test_low_goes_before_medium_whichever_came_later():
    engine = Engine()
    engine.ask(1, LOW)
    engine.ask(2, MEDIUM)
    engine.until(lambda: engine.begun(1, 2))
    engine.ask(9, HIGH)
    assert engine.turn().suspend == [1]


def test_a_priority_takes_no_place_from_its_own_or_from_a_more_urgent_one():
    engine = Engine()
    engine.ask(1, HIGH)
    engine.ask(2, MEDIUM)
    engine.until(lambda: engine.begun(1, 2))
    engine.ask(8, MEDIUM)
    engine.ask(9, LOW)
    assert engine.turn().suspend == []
    assert engine.running() == {1, 2}


def test_the_one_preempted_least_goes_next():
    engine = full_of()
    for key, victim in ((7, 2), (8, 1)):
        engine.ask(key, HIGH)
        assert engine.turn().suspend == [victim]
        engine.until(lambda key=key: engine.begun(key))
        engine.planner.ended(key)
        engine.turn()


def test_one_that_was_preempted_as_often_as_allowed_keeps_its_place():
    engine = full_of(limits=replace(LIMITS, slots=1, suspensions=1))
    engine.ask(8, HIGH, answer=5)
    engine.until(lambda: len(engine.said[8]) == 5)
    engine.turn()
    engine.ask(9, MEDIUM)
    assert engine.turn().suspend == []
    assert engine.running() == {1}


def test_high_runs_beyond_the_slots_where_no_place_can_be_taken_but_in_half_as_many_as_there_are():
    limits = replace(LIMITS, slots=4, suspensions=1)
    engine = full_of(limits=limits)
    for key in range(11, 15):
        engine.ask(key, HIGH, answer=5)
    engine.until(lambda: all(len(engine.said[key]) == 5 for key in range(11, 15)))
    engine.turn()
    assert engine.running() == {1, 2, 3, 4}
    for key in range(21, 25):
        engine.ask(key, HIGH)
    assert engine.turn().suspend == []
    assert engine.running() == {1, 2, 3, 4, 21, 22}
    for key in (1, 2, 3):
        engine.planner.ended(key)
    engine.turn()
    assert engine.running() == {4, 21, 22, 23}


def test_high_does_not_run_beyond_the_memory_there_is():
    limits = replace(LIMITS, suspensions=1, free_bytes=3 * 1024 * 10)
    engine = full_of(limits=limits)
    for key in (8, 9):
        engine.ask(key, HIGH)
        engine.turn()
        engine.planner.ended(key)
        engine.turn()
    engine.ask(11, HIGH, answer=1005)
    engine.turn()
    assert engine.running() == {1, 2}
    engine.planner.ended(11)
    engine.ask(12, HIGH, answer=1000)
    engine.turn()
    assert engine.running() == {1, 2, 12}


def test_no_high_sequence_waits_for_a_long_low_answer_however_often_it_comes():
    """An engine on which every step misses the target, as with a large model: HIGH is asked for minutes."""
    limits = replace(LIMITS, slots=8, suspended_s=60.0, kept_bytes=1 << 30)
    engine = Engine(limits=limits, tokens_per_s=60.0, step_s=0.5, step_s_each=0.025)
    for key in range(24):
        engine.ask(key, LOW, answer=5000)
    engine.until(lambda: len(engine.said[0]) >= 10)
    for key in range(100, 160):
        engine.ask(key, HIGH, answer=8)
        asked_at = engine.now
        engine.until(lambda key=key: engine.begun(key))
        assert engine.now - asked_at < 2.0, key
        engine.until(lambda until=asked_at + 10: engine.now >= until)
    assert max(member.times for member in engine.planner._members.values()) == limits.suspensions


def test_one_that_has_stood_still_for_long_runs_beyond_the_slots():
    engine = full_of(limits=replace(LIMITS, slots=1, suspended_s=5.0))
    engine.ask(9, HIGH)
    since = engine.now
    engine.turn()
    engine.until(lambda: engine.running() == {1, 9})
    assert 5.0 <= engine.now - since <= 5.5


def test_an_engine_that_cannot_suspend_lets_high_wait():
    engine = full_of(limits=replace(LIMITS, suspends=False))
    engine.ask(9, HIGH)
    assert engine.turn().suspend == []
    engine.planner.ended(1)
    engine.turn()
    assert engine.running() == {2, 9}


def test_a_request_that_another_worker_had_begun_takes_no_slot_and_gives_none():
    engine = full_of()
    engine.ask(8, LOW, extra=True)
    engine.turn()
    assert engine.running() == {1, 2, 8}
    engine.ask(9, HIGH)
    assert engine.turn().suspend == [2]


def test_memory_goes_to_the_first_in_line_and_high_gets_it_from_low():
    engine = Engine(limits=replace(LIMITS, slots=4, kv_bytes=2 * 1280 * 10))
    for key in (1, 2, 3):
        engine.ask(key, LOW)
    engine.ask(4, LOW, answer=10)
    engine.turn()
    assert engine.running() == {1, 2}
    engine.ask(9, HIGH)
    assert engine.turn().suspend == [2]
    assert engine.running() == {1, 9}


def test_tokens_that_a_draft_brought_ahead_are_read_again_after_a_drop_too():
    engine = Engine(limits=replace(LIMITS, slots=1, kept_bytes=0))
    engine.ask(1, LOW, prompt=20)
    engine.until(lambda: engine.begun(1))
    engine.planner.has_stepped(seconds=0.1, now=engine.now, ahead=3)
    engine.ask(2, HIGH, prompt=5, answer=1)
    assert engine.turn().drop == [1]
    # The prompt, four tokens of the answer in the cache, and the one that was sampled last.
    assert engine.planner.unread_tokens() == 20 + 4 + 1


def test_caches_beyond_the_budget_are_dropped_the_least_urgent_first_and_read_again():
    engine = Engine(limits=replace(LIMITS, kept_bytes=400))
    engine.ask(1, MEDIUM)
    engine.ask(2, LOW)
    engine.until(lambda: engine.begun(1, 2))
    known = {key: 20 + len(engine.said[key]) for key in (1, 2)}
    engine.ask(8, HIGH)
    engine.ask(9, HIGH)
    plan = engine.turn()
    assert plan.suspend == [2, 1]
    assert plan.drop == [2]
    assert engine.kept_bytes() <= 400
    for key in (8, 9):
        engine.planner.ended(key)
    engine.until(lambda: not engine.planner._members[2].left)
    read = sum(tokens for plan in engine.plans for key, tokens in plan.read if key == 2)
    assert read == 20 + known[2] - 2, "the last token is read by a step, each time"


def test_the_measured_size_of_a_cache_replaces_the_estimate():
    engine = full_of(limits=replace(LIMITS, kept_bytes=5000))
    engine.ask(9, HIGH)
    (victim,) = engine.turn().suspend
    engine.planner.kept(victim, 5001)
    assert engine.turn().drop == [victim]


# ---- prompts


def test_a_high_prompt_is_read_whole_while_low_answers_stand_still():
    engine = full_of()
    engine.ask(9, HIGH, prompt=150)
    before = len(engine.plans)
    engine.until(lambda: engine.begun(9))
    assert not any(plan.step for plan in engine.plans[before:])


def test_a_high_prompt_comes_first_in_the_middle_of_a_low_one():
    engine = Engine()
    engine.ask(1, LOW, prompt=500)
    for _ in range(3):
        engine.turn()
    engine.ask(9, HIGH, prompt=50)
    assert [key for key, _ in engine.turn().read] == [9]


def test_answers_stand_still_no_longer_than_the_hold_and_one_piece():
    engine = full_of()
    engine.ask(9, HIGH, prompt=2000)
    engine.until(lambda: engine.begun(9))
    gaps = engine.gaps(1)
    assert 1.0 <= max(gaps) <= LIMITS.hold_s + 0.3


def test_a_high_answer_waits_for_a_short_high_prompt_and_steps_between_the_pieces_of_a_long_one():
    engine = Engine()
    engine.ask(1, HIGH)
    engine.until(lambda: len(engine.said[1]) == 5)
    engine.ask(8, HIGH, prompt=30)
    before = len(engine.plans)
    engine.until(lambda: engine.begun(8))
    assert not any(plan.step for plan in engine.plans[before:])
    engine.planner.ended(8)
    engine.ask(9, HIGH, prompt=500)
    engine.until(lambda: engine.begun(9))
    gaps = engine.gaps(1)
    assert max(gaps) <= 2 * LIMITS.target_s + 0.1


@pytest.mark.parametrize("other", [HIGH, LOW])
def test_a_low_prompt_beside_an_answer_is_read_in_pieces_of_the_target_with_a_step_after_each(other):
    engine = Engine()
    engine.ask(1, other)
    engine.until(lambda: len(engine.said[1]) == 5)
    engine.ask(2, LOW, prompt=500)
    before = len(engine.plans)
    engine.until(lambda: engine.begun(2))
    plans = engine.plans[before:]
    assert all(earlier.step != later.step for earlier, later in pairwise(plans))
    gaps = engine.gaps(1)
    assert max(gaps) <= LIMITS.target_s + (0.08 if other is LOW else 0.02)


def test_a_piece_follows_the_rate_at_its_depth():
    engine = Engine()
    engine.ask(1, LOW, prompt=4000)
    engine.until(lambda: engine.planner._members[1].depth > 600)
    engine.tokens_per_s = 50
    engine.until(lambda: engine.planner._members[1].depth > 3000)
    ((_, tokens),) = engine.plans[-1].read
    assert 8 <= tokens <= 12


def test_short_prompts_of_one_priority_are_read_together():
    engine = Engine(limits=replace(LIMITS, slots=8), tokens_per_s=1000)
    for key in range(1, 7):
        engine.ask(key, LOW, prompt=10 + key)
    engine.turn()
    assert len(engine.turn().read) > 3


def test_a_few_answers_wait_for_more_prompts_of_their_priority_up_to_the_hold():
    engine = Engine(limits=replace(LIMITS, slots=8))
    engine.ask(1, LOW, prompt=10)
    engine.until(lambda: len(engine.said[1]) == 3)
    for key in range(2, 7):
        engine.ask(key, LOW, prompt=100)
    engine.until(lambda: engine.begun(*range(2, 7)))
    assert 1.0 < max(engine.gaps(1)) <= LIMITS.hold_s + LIMITS.target_s + 0.1


def test_a_medium_answer_waits_for_no_more_than_one_piece_of_low_prompts():
    engine = Engine(limits=replace(LIMITS, slots=8))
    engine.ask(1, MEDIUM, prompt=10)
    engine.until(lambda: len(engine.said[1]) == 3)
    for key in range(2, 7):
        engine.ask(key, LOW, prompt=100)
    engine.until(lambda: engine.begun(*range(2, 7)))
    assert max(engine.gaps(1)) <= LIMITS.target_s + 0.3


def test_prompts_that_are_read_together_stay_together_until_one_has_been_read():
    engine = Engine(limits=replace(LIMITS, slots=8), tokens_per_s=150)
    for key in range(1, 9):
        engine.ask(key, LOW, prompt=40)
    engine.turn()
    groups = []
    while not engine.begun(*range(1, 9)):
        groups.append(tuple(key for key, _ in engine.turn().read))
    runs = [group for group, _ in groupby(group for group in groups if group)]
    assert len(runs) == len(set(runs)) <= 4


def test_a_deep_prompt_is_not_padded_into_a_piece_with_shallow_ones_and_both_get_on():
    engine = Engine(limits=replace(LIMITS, slots=8))
    engine.ask(1, LOW, prompt=3000)
    engine.until(lambda: engine.planner._members[1].depth > 400)
    engine.ask(2, LOW, prompt=200)
    before, groups = len(engine.plans), []
    engine.until(lambda: engine.begun(2))
    groups = [{key for key, _ in plan.read} for plan in engine.plans[before:] if plan.read]
    assert {1, 2} not in groups
    assert {1} in groups
    assert {2} in groups


def test_a_busy_start_does_not_leave_an_engine_with_small_pieces():
    # Each piece takes 70 ms beside its tokens, as with a real model. The first requests find the machine busy.
    engine = Engine(limits=replace(LIMITS, slots=8), tokens_per_s=10, step_s=1.0, piece_s=1.0)
    for key in range(1, 5):
        engine.ask(key, LOW, prompt=40)
    engine.until(lambda: engine.begun(1, 2, 3, 4))
    engine.tokens_per_s, engine.step_s, engine.step_s_each, engine.piece_s = 290.0, 0.07, 0.01, 0.07
    for key in range(10, 14):
        engine.ask(key, HIGH, prompt=37, answer=10)
        came = engine.now
        engine.until(lambda key=key: engine.begun(key))
        assert engine.now - came < 0.6
    for key in range(20, 23):
        engine.ask(key, LOW, prompt=100)
    engine.until(lambda: engine.begun(20, 21, 22))
    sizes = [sum(tokens for _, tokens in plan.read) for plan in engine.plans if plan.read and plan.read[0][0] >= 20]
    assert max(sizes) > 20


def test_prompts_below_are_read_in_the_pauses_of_an_endless_row_of_high_ones():
    engine = Engine(limits=replace(LIMITS, slots=4))
    engine.ask(1, LOW, prompt=60)
    key = 10
    for _ in range(2000):
        if engine.begun(1):
            break
        if not any(m.priority is HIGH and m.left for m in engine.planner._members.values()):
            key += 1
            engine.ask(key, HIGH, prompt=100, answer=1)
        engine.turn()
    assert engine.begun(1)


def test_the_width_beside_a_high_answer_is_what_a_step_serves_within_the_target():
    engine = Engine(limits=replace(LIMITS, slots=24), step_s_each=0.01)
    for key in range(1, 24):
        engine.ask(key, LOW)
    engine.until(lambda: engine.begun(*range(1, 24)))
    for _ in range(5):
        engine.turn()
    assert len(engine.running()) == 23
    engine.ask(99, HIGH, answer=100)
    engine.until(lambda: len(engine.said[99]) == 50)
    gaps = engine.gaps(99, since=40)
    assert max(gaps) <= LIMITS.target_s + 1e-6
    engine.until(lambda: 99 not in engine.planner._members)
    engine.turn()
    assert len(engine.running()) == 23


def test_a_pause_beside_a_high_answer_is_no_lost_place():
    engine = full_of(limits=replace(LIMITS, slots=8, suspensions=1), step_s=0.3)
    for key in (11, 12):
        engine.ask(key, HIGH, answer=5)
        engine.until(lambda key=key: len(engine.said[key]) == 5)
        engine.turn()
    assert engine.running() == set(range(1, 9))
    times = [member.times for member in engine.planner._members.values()]
    assert sum(times) == 2
    assert sum(engine.suspended.values()) > 4
    engine.ask(13, HIGH)
    assert engine.turn().suspend


def test_an_engine_that_cannot_meet_the_target_does_not_starve_low_for_it():
    engine = Engine(limits=replace(LIMITS, slots=8), step_s=0.5)
    for key in range(1, 8):
        engine.ask(key, LOW)
    engine.until(lambda: engine.begun(*range(1, 8)))
    engine.ask(99, HIGH, answer=50)
    engine.until(lambda: len(engine.said[99]) == 40)
    assert len(engine.running()) == 5


# ---- how many


FOUND = replace(LIMITS, slots=0)


def test_as_many_run_as_pay_and_those_that_run_stay_when_fewer_pay():
    engine = Engine(limits=FOUND, tokens_per_s=10_000.0, step_s=0.05, step_s_each=0.002)
    for key in range(1, 200):
        engine.ask(key, LOW, answer=100_000)
    engine.until(lambda: len(engine.running()) >= 48)
    found = engine.planner.slots()
    assert found >= 48
    engine.step_s = 0.3
    engine.until(lambda: engine.planner.slots() < found)
    assert len(engine.running()) >= 48
    assert not engine.suspended


def test_no_more_run_than_there_is_memory_for():
    sequence = batch_kv_bytes([1020], FOUND.kv)
    engine = Engine(limits=replace(FOUND, free_bytes=5 * sequence + 1), tokens_per_s=10_000.0)
    for key in range(1, 20):
        engine.ask(key, LOW)
    engine.until(lambda: engine.begun(1))
    assert engine.planner.slots() == len(engine.running()) == 5


def test_the_setting_is_the_most_that_is_found():
    engine = Engine(limits=replace(FOUND, most_slots=10), tokens_per_s=10_000.0, step_s_each=0.0)
    for key in range(1, 20):
        engine.ask(key, LOW, answer=100_000)
    engine.until(lambda: engine.planner.slots() == 10)
    for _ in range(200):
        engine.turn()
    assert engine.planner.slots() == len(engine.running()) == 10


# ---- gathering


def test_prompts_that_are_on_their_way_are_read_with_the_first():
    engine = Engine(limits=replace(LIMITS, slots=4))
    engine.ask(1, HIGH, coming=2)
    plan = engine.turn()
    assert plan.wait_s > 0
    assert not plan.read
    engine.now += plan.wait_s / 4
    engine.ask(2, HIGH, coming=1)
    assert engine.turn().wait_s > 0
    engine.ask(3, HIGH, coming=0)
    assert {key for key, _ in engine.turn().read} == {1, 2, 3}


def test_a_prompt_that_nothing_follows_is_read_at_once():
    engine = Engine()
    engine.ask(1, HIGH)
    assert engine.turn().read


def test_the_first_prompt_waits_no_longer_than_a_part_of_what_it_takes_alone():
    engine = Engine(limits=replace(LIMITS, slots=4))
    engine.ask(1, HIGH, prompt=40, answer=1)
    engine.until(lambda: engine.begun(1))
    rate = engine.planner.pace.reading_rate(0)
    engine.ask(2, HIGH, prompt=10, coming=3)
    waited = engine.turn().wait_s
    assert 0 < waited <= 0.5 * 10 / rate + 1e-9
    engine.now += waited
    assert engine.turn().read


@pytest.mark.parametrize("case", ["an answer is written", "all places are taken"])
def test_nothing_is_awaited_where(case):
    engine = Engine()
    engine.ask(1, HIGH)
    if case == "an answer is written":
        engine.until(lambda: engine.begun(1))
    engine.ask(2, HIGH, coming=5)
    assert not engine.turn().wait_s


@pytest.mark.parametrize("priority", [MEDIUM, LOW])
def test_prompts_below_high_which_are_read_in_pieces_wait_for_none(priority):
    engine = Engine()
    engine.ask(1, priority, coming=5)
    assert engine.turn().read


# ---- random lives


@st.composite
def lives(draw):
    """When requests of which size come, and when some are cancelled."""
    count = draw(st.integers(1, 14))
    return [
        (
            draw(st.floats(0, 20)),
            draw(st.sampled_from(list(Priority))),
            draw(st.integers(1, 300)),
            draw(st.integers(1, 60)),
            draw(st.booleans()) and draw(st.floats(0, 10)),
        )
        for _ in range(count)
    ]


@settings(max_examples=150, deadline=None)
@given(
    lives(),
    st.integers(1, 4),
    st.sampled_from([0, 900, 1 << 20]),
    st.sampled_from([0, 3 * 512 * 10]),
    st.floats(20, 2000),
    st.floats(0.001, 0.3),
)
def test_every_sequence_ends_and_every_bound_holds(life, slots, kept_bytes, kv_bytes, tokens_per_s, step_s):
    limits = replace(
        LIMITS, slots=slots, kept_bytes=kept_bytes, kv_bytes=kv_bytes, suspensions=2, suspended_s=3.0, hold_s=1.0
    )
    engine = Engine(limits=limits, tokens_per_s=tokens_per_s, step_s=step_s, step_s_each=0.0)
    begin = engine.now
    coming = sorted((begin + at, key, *rest) for key, (at, *rest) in enumerate(life))
    cancels = {key: at + after for at, key, _, _, _, after in coming if after is not False}
    turns, longest_turn = 0, 0.0
    while coming or engine.planner._members:
        while coming and coming[0][0] <= engine.now:
            _, key, priority, prompt, answer, _ = coming.pop(0)
            engine.ask(key, priority, prompt=prompt, answer=answer)
        for key in [key for key, at in cancels.items() if at <= engine.now]:
            del cancels[key]
            engine.planner.ended(key)
        before = engine.now
        plan = engine.turn()
        longest_turn = max(longest_turn, engine.now - before)
        members = engine.planner._members.values()
        if not engine.planner._members:
            engine.now = max(engine.now, coming[0][0] if coming else 0.0)
        else:
            assert plan.read or plan.step, "the engine stands still"
        assert not (plan.read and plan.step)
        assert engine.kept_bytes() <= kept_bytes
        running = [member for member in members if member.runs]
        if kv_bytes and len(running) > 1:
            assert batch_kv_bytes((member.longest for member in running), KvSize(10)) <= kv_bytes
        within = [member for member in running if member.stood_s < limits.suspended_s]
        if len(within) > slots:
            assert sum(member.priority is HIGH for member in within) <= max(1, slots // 2)
            assert len(within) <= slots + max(1, slots // 2)
        for member in members:
            assert member.times <= limits.suspensions
            assert kv_bytes or member.stood(engine.now) <= limits.suspended_s + longest_turn + 1e-6
            assert (member.stage is Stage.DECODING) == (member.runs and member.left == 0)
        turns += 1
        assert turns < 50_000


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 400), st.integers(1, 3), st.floats(30, 1000))
@example(278, 3, 547.0)
def test_low_answers_stand_still_no_longer_than_the_hold_however_high_prompts_come(prompt, slots, tokens_per_s):
    limits = replace(LIMITS, slots=slots + 1, suspensions=0, hold_s=1.0)
    engine = Engine(limits=limits, tokens_per_s=tokens_per_s)
    engine.ask(0, LOW)
    engine.until(lambda: engine.begun(0))
    for key in range(1, 30):
        engine.ask(key, HIGH, prompt=prompt, answer=1)
    engine.until(lambda: engine.begun(*range(1, 30)))
    gaps = engine.gaps(0)
    # The first pieces are read before any rate is known, and a piece has 8 tokens at least for each of its prompts.
    assert max(gaps, default=0) <= limits.hold_s + max(32, 8 * (slots + 1)) / tokens_per_s + 0.3


# ---- exact


def exact_pieces(*others: tuple[Priority, int], priority: Priority = LOW, tokens: int = 100, prompt: int = 80):
    """The pieces in which an exact sequence is read beside others, and the keys that were read with it."""
    engine = Engine(limits=replace(LIMITS, slots=8))
    for key, (urgency, length) in enumerate(others, start=2):
        engine.ask(key, urgency, prompt=length, answer=30)
    engine.ask(1, priority, prompt=tokens, exact_prompt=prompt)
    engine.until(lambda: engine.begun(1))
    reads = [plan.read for plan in engine.plans if any(key == 1 for key, _ in plan.read)]
    assert not any(1 in plan.join for plan in engine.plans)
    return [dict(read)[1] for read in reads], {key for read in reads for key, _ in read}


@pytest.mark.parametrize("priority", list(Priority))
@pytest.mark.parametrize(
    "others", [[], [(LOW, 90), (LOW, 5), (LOW, 300)], [(HIGH, 40), (MEDIUM, 200)], [(MEDIUM, 1)] * 6]
)
def test_an_exact_prompt_is_read_alone_in_pieces_that_depend_on_nothing(priority, others):
    pieces, together = exact_pieces(*others, priority=priority)
    assert pieces == [32, 32, 15, 1] + [1] * 20
    assert together == {1}


@pytest.mark.parametrize(("prompt", "expected"), [(1, [1]), (2, [1, 1]), (33, [32, 1]), (34, [32, 1, 1])])
def test_the_last_token_of_an_exact_prompt_is_read_alone(prompt, expected):
    assert exact_pieces(tokens=prompt, prompt=prompt)[0] == expected


def test_an_exact_sequence_whose_cache_was_dropped_is_read_again_in_the_same_pieces():
    engine = Engine(limits=replace(LIMITS, slots=1, kept_bytes=0))
    engine.ask(1, LOW, prompt=40, exact_prompt=40)
    engine.until(lambda: len(engine.said[1]) == 3)
    engine.ask(2, HIGH, answer=2)
    engine.until(lambda: engine.suspended)
    before = len(engine.plans)
    engine.until(lambda: len(engine.said[1]) == 5)
    read = [dict(plan.read)[1] for plan in engine.plans[before:] if dict(plan.read).get(1)]
    assert read[:2] == [32, 7]
    assert set(read[2:]) == {1}


def test_other_prompts_are_read_beside_an_exact_one():
    engine = Engine(limits=replace(LIMITS, slots=8))
    engine.ask(1, LOW, prompt=3000, exact_prompt=3000)
    for key in range(2, 5):
        engine.ask(key, LOW, prompt=20)
    engine.until(lambda: engine.begun(2, 3, 4))
    assert not engine.begun(1)
