"""How loaded an engine is: the terms of saturation, the levels' hysteresis."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pipeline.core.saturation import LEAVE_AFTER_S, LEAVE_RATIO, LEVELS, SaturationMonitor
from pipeline.core.waits import MAX_WAIT_S, UNKNOWN_WAIT_S, Capacity
from pipeline.wire.messages import Load, PerPriorityCount, Slots, WorkerStatus, encode
from pipeline.wire.subjects import Priority
from tests.pipeline.core.capacities import FULL, capacities, depths, shares_

HIGH, MEDIUM, LOW = Priority
SHARES = {HIGH: 0.6, MEDIUM: 0.3, LOW: 0.1}
NOTHING = dict.fromkeys(Priority, 0)
BUSY_AT, SATURATED_AT = 0.7, 1.0


def monitor(**settings_):
    return SaturationMonitor(
        **{
            "engine": "mlx",
            "shares": SHARES,
            "target_wait_s": 2.0,
            "busy_at": BUSY_AT,
            "saturated_at": SATURATED_AT,
            **settings_,
        }
    )


def loaded(saturation):
    """An engine that is just so full."""
    return Capacity(slots_total=1, kv_share=saturation)


def look(watch, saturation, now):
    return watch.observe(loaded(saturation), NOTHING, now=now, wall_now=1e9)


def settle(watch, capacity, now, queued=NOTHING):
    """Observe until the level stays, as the monitor does; the levels on the way."""
    levels = []
    while True:
        load, changed = watch.observe(capacity, queued, now=now, wall_now=1e9)
        if not changed:
            return levels
        levels.append(load.level)


def status(**fields):
    base = {
        "worker": "w1",
        "engine": "mlx",
        "state": "ready",
        "models": ["m"],
        "slots": Slots(2, 8),
        "running": PerPriorityCount(),
        "pending_tokens": 100.0,
        "tokens_per_s": 50.0,
        "tokens_per_request": 20.0,
        "kv_bytes": 10,
        "kv_bytes_limit": 100,
        "at": 0.0,
    }
    return WorkerStatus(**{**base, **fields})


# ---- saturation


def test_the_reason_names_the_term_that_won():
    full_slots = Capacity(slots_used=7, slots_total=8, kv_share=0.1)
    full_memory = Capacity(slots_used=1, slots_total=8, kv_share=0.95)

    def said(capacity, queued=NOTHING):
        load, _ = monitor().observe(capacity, queued, now=1.0, wall_now=1e9)
        return load.saturation, load.reason

    assert said(full_slots) == (0.875, "7 of 8 slots in use")
    assert said(full_memory) == (0.95, "95% of the KV memory in use")
    saturation, reason = said(FULL, {HIGH: 0, MEDIUM: 0, LOW: 9})
    assert saturation == pytest.approx(5.0)
    assert reason == "a low request would wait 10.0 s"


def test_an_engine_without_a_worker_is_away_and_not_saturated():
    watch = monitor()
    settle(watch, loaded(5.0), 0.5)
    gone = Capacity.of([status(state="loading")])
    load, changed = watch.observe(gone, NOTHING, now=1.0, wall_now=1e9)
    assert (load.available, load.level, load.saturation, changed) == (False, "normal", 0.0, True)
    assert load.reason == "no worker is ready: w1 is loading"
    assert load.predicted_wait_ms.high == UNKNOWN_WAIT_S * 1000
    assert watch.observe(gone, NOTHING, now=1.1, wall_now=1e9)[1] is False


def test_a_ready_worker_without_a_slot_is_named_as_the_reason():
    load, _ = monitor().observe(Capacity.of([status(slots=Slots(0, 0))]), NOTHING, now=1.0, wall_now=1e9)
    assert load.reason == "no worker has a slot"


def test_an_engine_that_comes_back_starts_at_normal_and_says_so_at_once():
    watch = monitor()
    settle(watch, Capacity(), 1.0)
    load, changed = look(watch, 0.1, 1.1)
    assert (load.level, changed) == ("normal", True)
    assert watch.next_wake() is None
    assert look(watch, 0.1, 1.2)[1] is False


def test_an_engine_that_comes_back_full_is_told_so_step_by_step():
    watch = monitor()
    settle(watch, Capacity(), 1.0)
    assert settle(watch, loaded(1.5), 1.1) == ["busy", "saturated"]


def test_an_engine_that_comes_back_after_a_short_absence_owes_nothing_to_the_time_before():
    watch = monitor()
    settle(watch, loaded(0.1), 0.0)
    settle(watch, Capacity(), 10.0)
    settle(watch, loaded(0.8), 11.0)
    assert watch.level == "busy"
    assert settle(watch, loaded(0.1), 11.1) == []


# ---- levels


def test_levels_rise_at_once_and_one_step_at_a_time():
    assert settle(monitor(), loaded(5.0), 1.0) == ["busy", "saturated"]
    assert settle(monitor(), loaded(BUSY_AT), 1.0) == ["busy"]
    assert settle(monitor(), loaded(math.nextafter(BUSY_AT, 0)), 1.0) == []


def test_a_level_is_left_only_after_a_while_and_clearly_below_its_threshold():
    watch = monitor()
    settle(watch, loaded(0.9), 1.0)
    almost = BUSY_AT * LEAVE_RATIO
    assert settle(watch, loaded(almost), 100.0) == []
    assert watch.next_wake() is None
    assert settle(watch, loaded(almost - 0.001), 101.0) == []
    assert watch.next_wake() == 101.0 + LEAVE_AFTER_S
    assert settle(watch, loaded(almost - 0.001), 101.0 + 0.99 * LEAVE_AFTER_S) == []
    assert settle(watch, loaded(almost - 0.001), 101.0 + LEAVE_AFTER_S) == ["normal"]
    assert watch.next_wake() is None


def test_a_moment_above_starts_the_while_again():
    watch = monitor()
    settle(watch, loaded(0.9), 1.0)
    look(watch, 0.1, 2.0)
    look(watch, 0.65, 2.4)
    assert look(watch, 0.1, 2.5)[1] is False
    assert watch.next_wake() == 2.5 + LEAVE_AFTER_S


def test_levels_fall_one_step_at_a_time_and_time_below_both_counts_for_both():
    watch = monitor()
    settle(watch, loaded(2.0), 1.0)
    assert settle(watch, loaded(0.0), 2.0) == []
    assert settle(watch, loaded(0.0), 2.0 + LEAVE_AFTER_S) == ["busy", "normal"]


def test_time_below_the_upper_threshold_alone_does_not_count_for_the_lower_one():
    watch = monitor()
    settle(watch, loaded(2.0), 1.0)
    look(watch, 0.8, 2.0)
    assert settle(watch, loaded(0.3), 2.0 + LEAVE_AFTER_S) == ["busy"]
    assert watch.next_wake() == 2.0 + 2 * LEAVE_AFTER_S
    assert settle(watch, loaded(0.3), 2.0 + 2 * LEAVE_AFTER_S) == ["normal"]


@pytest.mark.parametrize("threshold", [BUSY_AT, SATURATED_AT])
@pytest.mark.parametrize("period_s", [0.02, 0.3, 5.0])
def test_a_load_that_swings_around_a_threshold_does_not_flap(threshold, period_s):
    watch = monitor()
    changes = [
        look(watch, threshold * (1.05 if step % 2 else LEAVE_RATIO + 0.01), step * period_s)[1] for step in range(200)
    ]
    assert sum(changes) <= 2


def test_the_load_event_carries_the_facts():
    load, _ = monitor().observe(FULL, {HIGH: 1, MEDIUM: 2, LOW: 3}, now=5.0, wall_now=1e9)
    assert (load.engine, load.at, load.tokens_per_s) == ("mlx", 1e9, 100.0)
    assert load.slots == Slots(8, 8)
    assert load.queued == PerPriorityCount(1, 2, 3)
    assert load.predicted_wait_ms.of(LOW) == pytest.approx(1000 + 6000), "all that is queued goes first"


@given(capacities, depths, shares_, st.floats(0.001, 1e6))
def test_a_load_never_holds_a_number_that_is_none(capacity, queued, shares, target_wait_s):
    watch = monitor(shares=shares, target_wait_s=target_wait_s)
    load, _ = watch.observe(capacity, queued, now=1.0, wall_now=1e9)
    numbers = [load.saturation, load.tokens_per_s, *(load.predicted_wait_ms.of(p) for p in Priority)]
    assert all(math.isfinite(number) and number >= 0 for number in numbers)
    assert max(load.predicted_wait_ms.of(p) for p in Priority) <= MAX_WAIT_S * 1000
    assert msgspec.json.decode(encode(load), type=Load) == load


class Levels(RuleBasedStateMachine):
    """Any course of saturation over time, against what must hold at every look."""

    def __init__(self):
        super().__init__()
        self.watch = monitor()
        self.now = 0.0
        self.history = []

    @rule(
        saturation=st.one_of(
            st.floats(0, 2), st.sampled_from([t * r for t in (BUSY_AT, SATURATED_AT) for r in (LEAVE_RATIO, 1.0)])
        ),
        # Sums of these are exact, so that what is as long as the rule says is not a rounding error shorter.
        pause_s=st.sampled_from([0.0, 1 / 64, 0.25, LEAVE_AFTER_S, 5.0]),
    )
    def observe(self, saturation, pause_s):
        self.now += pause_s
        self.history.append((self.now, saturation))
        before = LEVELS.index(self.watch.level)
        load, changed = look(self.watch, saturation, self.now)
        after = LEVELS.index(load.level)
        assert changed is (after != before)
        assert abs(after - before) <= 1
        thresholds = (BUSY_AT, SATURATED_AT)
        if after > before:
            assert saturation >= thresholds[before]
        elif before < 2:
            assert saturation < thresholds[before]
        if after < before:
            assert self.below_since(thresholds[before - 1] * LEAVE_RATIO) <= self.now - LEAVE_AFTER_S
        elif before and after == before:
            since = self.below_since(thresholds[before - 1] * LEAVE_RATIO)
            assert since is None or self.now < since + LEAVE_AFTER_S

    @rule()
    def wake(self):
        """When it asks to be woken, and nothing else has changed, the level is left."""
        wake = self.watch.next_wake()
        if wake is not None:
            before = self.watch.level
            self.now = max(self.now, wake)
            self.history.append((self.now, self.history[-1][1]))
            assert look(self.watch, self.history[-1][1], self.now)[1]
            assert LEVELS.index(self.watch.level) == LEVELS.index(before) - 1

    def below_since(self, limit):
        since = None
        for now, saturation in reversed(self.history):
            if saturation >= limit:
                break
            since = now
        return since

    @invariant()
    def normal_wants_no_waking(self):
        if self.watch.level == "normal":
            assert self.watch.next_wake() is None


TestLevels = Levels.TestCase
TestLevels.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
