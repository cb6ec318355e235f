"""How long a request waits: the capacity of workers, and the prediction against a discrete engine and the scheduler."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.scheduler import Scheduler
from pipeline.core.waits import MAX_WAIT_S, UNKNOWN_WAIT_S, Capacity, Inflow, predicted_wait_s, predicted_waits_s
from pipeline.wire.messages import PerPriorityCount, Slots, WorkerStatus
from pipeline.wire.subjects import LANES, Lane, Priority, Task
from tests.pipeline.core.capacities import FULL, capacities, depths, shares_

HIGH, MEDIUM, LOW = Priority
WEIGHTS = {HIGH: 6.0, MEDIUM: 3.0, LOW: 1.0}
SHARES = {HIGH: 0.6, MEDIUM: 0.3, LOW: 0.1}


def status(**fields):
    base = {
        "worker": "w1",
        "engine": "mlx",
        "state": "ready",
        "models": ["m"],
        "slots": Slots(2, 8),
        "running": PerPriorityCount(1, 0, 1),
        "pending_tokens": 100.0,
        "tokens_per_s": 50.0,
        "tokens_per_request": 20.0,
        "kv_bytes": 10,
        "kv_bytes_limit": 100,
        "at": 0.0,
        "pending_prompt_tokens": 30.0,
        "prompt_tokens_per_s": 120.0,
        "prompt_tokens_per_request": 60.0,
    }
    return WorkerStatus(**{**base, **fields})


# ---- capacity


def test_workers_of_an_engine_add_up_and_the_fullest_memory_counts():
    two = [status(), status(worker="w2", slots=Slots(1, 4), tokens_per_request=40.0, kv_bytes=50, suspends=True)]
    capacity = Capacity.of(two)
    assert (capacity.slots_used, capacity.slots_total) == (3, 12)
    assert (capacity.pending_tokens, capacity.tokens_per_s) == (200.0, 100.0)
    assert (capacity.pending_prompt_tokens, capacity.prompt_tokens_per_s) == (60.0, 240.0)
    assert (capacity.tokens_per_request, capacity.prompt_tokens_per_request) == (30.0, 60.0)
    assert capacity.running == {HIGH: 2, MEDIUM: 0, LOW: 2}
    assert capacity.suspends
    assert capacity.kv_share == 0.5


def test_reading_and_writing_have_rates_of_their_own():
    capacity = Capacity.of([status()])
    assert capacity.request_s == pytest.approx(20 / 50 + 60 / 120)
    assert capacity.pending_s == pytest.approx(100 / 50 + 30 / 120)


def test_a_worker_without_a_measured_request_does_not_lower_the_mean():
    assert Capacity.of([status(), status(tokens_per_request=0.0)]).tokens_per_request == 20.0
    assert not Capacity.of([status(tokens_per_request=0.0)]).measured


def test_memory_without_a_limit_counts_as_unused():
    assert Capacity.of([status(kv_bytes_limit=0)]).kv_share == 0.0


@pytest.mark.parametrize("state", ["loading", "draining", "down", "gone"])
def test_a_worker_that_is_not_ready_counts_for_nothing(state):
    assert Capacity.of([status(), status(worker="w2", state=state)]).slots_total == 8
    alone = Capacity.of([status(state=state)])
    assert alone.slots_total == 0
    assert alone.down_reason == f"no worker is ready: w1 is {state}"


def test_no_worker_at_all_is_said_as_well():
    assert Capacity.of([]).down_reason == "no worker is running"


# ---- predicted waits


def waits(capacity, **depths):
    return predicted_waits_s(capacity, {p: depths.get(p.value, 0) for p in Priority}, SHARES, 2.0)


def test_no_request_waits_while_more_slots_are_free_than_requests_are_queued():
    assert waits(Capacity(slots_used=5, slots_total=8)) == dict.fromkeys(Priority, 0.0)
    assert waits(Capacity(slots_used=5, slots_total=8), high=2) == dict.fromkeys(Priority, 0.0)
    assert waits(Capacity(slots_used=5, slots_total=8), high=4)[HIGH] > 0


def test_a_full_engine_with_empty_lanes_makes_a_request_wait_for_the_next_slot():
    assert waits(FULL) == dict.fromkeys(Priority, 1.0)


def test_a_lane_that_is_alone_has_the_whole_rate():
    assert waits(FULL, low=5)[LOW] == pytest.approx(1.0 + 5.0)


def test_shares_are_divided_among_the_lanes_that_have_work():
    found = waits(FULL, high=6, low=1)
    assert found[HIGH] == pytest.approx(1.0 + 6 / (0.6 / 0.7))
    assert found[LOW] == pytest.approx(1.0 + 1 / (0.1 / 0.7))
    assert found[MEDIUM] == pytest.approx(1.0)


def test_a_lane_that_runs_empty_leaves_its_part_to_the_others():
    found = waits(FULL, high=6, low=10)
    assert found[HIGH] == pytest.approx(1.0 + 7)
    assert found[LOW] == pytest.approx(1.0 + 16), "and not 1 + 10 / (0.1 / 0.7)"


def test_the_first_in_a_lane_waits_less_than_the_last():
    ahead = {HIGH: 6, MEDIUM: 0, LOW: 3}
    assert predicted_wait_s(FULL, ahead, LOW, SHARES, 2.0) == pytest.approx(1.0 + 6 + 3)
    assert predicted_wait_s(FULL, ahead | {LOW: 0}, LOW, SHARES, 2.0) == pytest.approx(1.0)


def test_the_first_of_a_priority_take_the_places_of_less_urgent_ones_within_its_share():
    busy = replace(FULL, suspends=True, running={HIGH: 0, MEDIUM: 0, LOW: 8})
    assert [waits(busy, high=depth)[HIGH] for depth in (0, 5)] == [0.0, 0.0]
    assert waits(busy, high=7)[HIGH] == pytest.approx(1.0 + 1)
    assert waits(busy)[LOW] == pytest.approx(1.0)
    assert waits(replace(busy, running={HIGH: 6, MEDIUM: 0, LOW: 2}))[HIGH] == pytest.approx(1.0)
    assert waits(replace(busy, suspends=False))[HIGH] == pytest.approx(1.0)


def test_without_a_rate_a_round_of_the_slots_takes_one_target():
    unknown = Capacity(slots_used=8, slots_total=8)
    assert waits(unknown, high=16)[HIGH] == pytest.approx(4.0)
    assert waits(unknown, high=16, medium=1)[HIGH] == pytest.approx(4.0 + 0.25)


def test_without_a_slot_the_wait_is_said_to_be_unknown():
    assert waits(Capacity()) == dict.fromkeys(Priority, UNKNOWN_WAIT_S)


@given(capacities, depths, shares_, st.sampled_from(list(Priority)), st.integers(0, 1000))
def test_predicted_wait_grows_with_the_depth_of_any_lane(capacity, queued, shares, lane, more):
    deeper = queued | {lane: queued[lane] + more}
    before = predicted_waits_s(capacity, queued, shares, 2.0)
    after = predicted_waits_s(capacity, deeper, shares, 2.0)
    assert all(0 <= before[p] <= MAX_WAIT_S for p in Priority)
    assert all(after[p] >= before[p] * (1 - 1e-6) - 1e-6 for p in Priority)


def test_a_lane_into_which_requests_keep_coming_does_not_run_empty():
    """One HIGH request every two seconds takes half of the engine, as long as its share allows."""
    ahead = {HIGH: 0, MEDIUM: 0, LOW: 10}
    assert predicted_wait_s(FULL, ahead, LOW, SHARES, 2.0) == pytest.approx(1.0 + 10)
    assert predicted_wait_s(FULL, ahead, LOW, SHARES, 2.0, {HIGH: 0.5}) == pytest.approx(1.0 + 20)
    assert predicted_wait_s(FULL, ahead, LOW, SHARES, 2.0, {HIGH: 5.0}) == pytest.approx(1.0 + 10 / (0.1 / 0.7))
    assert predicted_wait_s(FULL, ahead, LOW, SHARES, 2.0, {LOW: 5.0}) == pytest.approx(1.0 + 10), "they come after it"
    filled = predicted_wait_s(FULL, ahead | {HIGH: 7}, LOW, SHARES, 2.0, {HIGH: 0.5})
    assert filled == pytest.approx(1.0 + 10 / (0.1 / 0.7), rel=0.7)
    assert filled > 1.0 + 10 + 7


def test_a_steady_inflow_is_measured_from_its_first_seconds_on():
    steady = Inflow()
    for number in range(400):
        steady.arrived(LOW, number * 0.5)
        if number >= 60:
            assert steady.per_s(number * 0.5)[LOW] == pytest.approx(2.0, rel=0.2)
    assert steady.per_s(200.0)[HIGH] == 0


def test_a_random_inflow_is_measured_without_bias():
    rng, found = random.Random(1), []
    for _ in range(50):
        inflow, now = Inflow(), 0.0
        while now < 60:
            inflow.arrived(LOW, now)
            now += rng.expovariate(8.0)
        found.append(inflow.per_s(now)[LOW])
    assert statistics.mean(found) == pytest.approx(8.0, rel=0.05)


def test_a_burst_is_soon_forgotten():
    burst = Inflow()
    assert burst.per_s(0.0) == {HIGH: 0, MEDIUM: 0, LOW: 0}
    for _ in range(30):
        burst.arrived(LOW, 100.0)
    assert burst.per_s(100.0)[LOW] == pytest.approx(30 / 60, rel=0.25)
    assert burst.per_s(120.0)[LOW] < 0.25
    assert burst.per_s(130.0)[LOW] < 0.05


def test_an_inflow_that_stops_is_noticed_within_seconds():
    inflow = Inflow()
    for number in range(1000):
        inflow.arrived(LOW, number * 0.1)
    assert inflow.per_s(100.0)[LOW] == pytest.approx(10.0, rel=0.1)
    assert inflow.per_s(110.0)[LOW] < 5.0
    assert inflow.per_s(120.0)[LOW] < 0.5


@given(capacities, depths, shares_, st.fixed_dictionaries({p: st.floats(0, 1000) for p in Priority}))
def test_a_prediction_with_inflow_ends_and_is_no_shorter(capacity, queued, shares, inflow):
    without = predicted_waits_s(capacity, queued, shares, 2.0)
    found = predicted_waits_s(capacity, queued, shares, 2.0, inflow)
    assert all(without[p] * (1 - 1e-6) - 1e-6 <= found[p] <= MAX_WAIT_S for p in Priority)


# ---- against an engine


@dataclass
class Engine:
    """Requests that all run at once at one rate together, chosen by the scheduler; time is simulated."""

    slots: int
    rate: float
    queued: dict[Priority, list[int]]
    now: float = 0.0
    waited: dict[tuple[Priority, int], float] = field(default_factory=dict)

    def run(self) -> None:
        scheduler = Scheduler(WEIGHTS, lanes=[lane for lane in LANES if lane.task is Task.UNTRIAGED])
        running: dict[str, list[float]] = {}
        taken = dict.fromkeys(Priority, 0)
        while running or any(self.queued.values()):
            while len(running) < self.slots and any(self.queued.values()):
                lane = next(lane for lane in scheduler.order(self.now, wall_now=self.now) if self.queued[lane.priority])
                self._begin(scheduler, lane, running, taken)
            span = min(left for left, _ in running.values()) * len(running) / self.rate
            self.now += span
            for name in list(running):
                running[name][0] -= span * self.rate / len(running) if running else 0
            for name in [name for name, (left, _) in running.items() if left < 1e-6]:
                scheduler.finish(name, running.pop(name)[1])

    def _begin(self, scheduler: Scheduler, lane: Lane, running: dict[str, list[float]], taken: dict[Priority, int]):
        priority = lane.priority
        tokens, name = self.queued[priority].pop(0), f"{priority}-{taken[priority]}"
        pending = len(self.queued[priority])
        scheduler.start(name, lane, stored_at=0.0, pending=pending, now=self.now, wall_now=self.now)
        self.waited[priority, taken[priority]] = self.now
        running[name] = [tokens, tokens]
        taken[priority] += 1


def errors_of(seed: int) -> list[float]:
    """The relative errors of the predictions for the requests of one engine that begin after its first answers."""
    drawn = random.Random(seed)
    queued, slots = {p: drawn.randint(0, 60) for p in Priority}, drawn.randint(1, 16)
    engine = Engine(slots, 100.0, {p: [drawn.randrange(50, 150) for _ in range(n)] for p, n in queued.items()})
    engine.run()
    capacity = Capacity(slots_total=slots, tokens_per_s=100.0, tokens_per_request=100.0)
    return [
        abs(predicted_wait_s(capacity, queued | {priority: position}, priority, SHARES, 2.0) - waited) / waited
        for (priority, position), waited in engine.waited.items()
        if waited > slots
    ]


def test_predictions_agree_with_an_engine_that_runs_empty():
    errors = [error for seed in range(100) for error in errors_of(seed)]
    assert len(errors) > 1000
    assert statistics.median(errors) <= 0.1
    assert statistics.quantiles(errors, n=20)[-1] <= 0.5
