"""Who is served next: shares of service, the floor, the bound on waiting, and what is known to be empty."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pipeline.core.scheduler import OTHERS_FIRST_S, OVERDUE_EVERY, RECHECK_S, RETURNED_S, Scheduler, shares
from pipeline.wire.subjects import LANES, Lane, Priority, Task

HIGH, MEDIUM, LOW = Priority
WEIGHTS = {HIGH: 6.0, MEDIUM: 3.0, LOW: 1.0}
WEIGHTS_SHARE = {HIGH: 0.6, MEDIUM: 0.3, LOW: 0.1}
BARE = {priority: Lane(priority, Task.UNTRIAGED) for priority in Priority}

TOKEN_S = 0.001

weight = st.floats(1e-6, 1e6)


class Engine:
    """Slots that each give a token of service every `TOKEN_S`, and lanes of (stored at, cost) before them.

    `served` holds the tokens that each priority has been given so far, to the instant.
    """

    def __init__(self, scheduler, slots=8, wall_offset=0.0):
        self.scheduler = scheduler
        self.slots = slots
        self.now = 0.0
        self.wall_offset = wall_offset
        self.lanes = {lane: deque() for lane in LANES}
        self.running = []
        self.served = Counter()
        self.started = Counter()
        self.numbers = itertools.count()
        self.log = []

    @property
    def wall_now(self):
        return self.now + self.wall_offset

    def put(self, lane, cost, stored_at=None, *, ages=True):
        stored_at = self.wall_now if stored_at is None else stored_at
        self.lanes[lane].append((stored_at if ages else None, cost))
        self.scheduler.arrived(lane)

    def depth(self, priority):
        return sum(len(queue) for lane, queue in self.lanes.items() if lane.priority is priority)

    def start_one(self, *, saturated=False):
        """As a worker does: ask lane by lane until one has a request."""
        for lane in self.scheduler.order(self.now, wall_now=self.wall_now, saturated=saturated):
            queue = self.lanes[lane]
            if not queue:
                self.scheduler.empty(lane, self.now)
                continue
            stored_at, cost = queue.popleft()
            number = next(self.numbers)
            self.scheduler.start(
                str(number),
                lane,
                stored_at=stored_at,
                pending=len(queue),
                now=self.now,
                wall_now=self.wall_now,
                saturated=saturated,
            )
            heapq.heappush(self.running, (self.now + cost * TOKEN_S, number, lane, cost))
            self.started[lane] += 1
            self.log.append(lane)
            return lane
        return None

    def fill(self, **how):
        while len(self.running) < self.slots and self.start_one(**how):
            pass

    def advance(self):
        """To the end of the request that ends next."""
        until = self.running[0][0]
        for _, _, lane, _ in self.running:
            self.served[lane.priority] += (until - self.now) / TOKEN_S
        self.now = until
        while self.running and self.running[0][0] <= self.now:
            _, number, _, cost = heapq.heappop(self.running)
            self.scheduler.finish(str(number), cost)

    def run(self, *, until, **how):
        self.fill(**how)
        while not until(self):
            self.fill(**how)
            self.advance()
            self.fill(**how)


def parts(counter):
    total = sum(counter.values())
    return {priority: counter[priority] / total for priority in Priority}


def assert_near(found, wanted, points=2.0):
    for priority in Priority:
        assert abs(found[priority] - wanted[priority]) * 100 <= points, (found, wanted)


def backlogged(weights=WEIGHTS, costs=None, *, count=2000, seed=1, slots=8, **settings_):
    """An engine with far more waiting in each bare lane than will be served."""
    draw = random.Random(seed)
    engine = Engine(Scheduler(weights, **settings_), slots)
    for priority in Priority:
        low, high = (costs or {}).get(priority, (20, 100))
        for _ in range(count):
            engine.put(BARE[priority], draw.randint(low, high))
    return engine


# ---- shares


def test_shares_follow_the_weights():
    assert shares(WEIGHTS, 0.05) == pytest.approx({HIGH: 0.6, MEDIUM: 0.3, LOW: 0.1})


@given(st.fixed_dictionaries(dict.fromkeys(Priority, weight)), st.floats(0, 1))
def test_shares_add_up_and_none_is_below_the_floor_whatever_the_weights(weights, floor):
    result = shares(weights, floor)
    assert sum(result.values()) == pytest.approx(1.0)
    assert min(result.values()) >= min(floor, 1 / 3) * (1 - 1e-6)
    ranked = sorted(Priority, key=lambda p: weights[p])
    assert [result[p] for p in ranked] == pytest.approx(sorted(result.values()))


def test_those_above_the_floor_keep_their_proportion():
    result = shares({HIGH: 1000.0, MEDIUM: 500.0, LOW: 1.0}, 0.05)
    assert result[LOW] == pytest.approx(0.05)
    assert result[HIGH] / result[MEDIUM] == pytest.approx(2.0)


@pytest.mark.parametrize("slots", [1, 2, 8, 32])
def test_service_is_shared_by_weight_while_all_lanes_are_backlogged(slots):
    engine = backlogged(slots=slots)
    engine.run(until=lambda e: sum(e.started.values()) >= 40 * slots + 300)
    assert_near(parts(engine.served), WEIGHTS_SHARE)


@pytest.mark.parametrize("long", list(Priority))
def test_a_lane_of_requests_ten_times_longer_gets_no_more_service_than_its_weight(long):
    engine = backlogged(costs={p: (400, 800) if p is long else (40, 80) for p in Priority})
    engine.run(until=lambda e: sum(e.started.values()) >= 1500)
    assert all(engine.depth(priority) for priority in Priority)
    assert_near(parts(engine.served), WEIGHTS_SHARE)


@settings(max_examples=15, deadline=None)
@given(
    st.fixed_dictionaries({priority: st.floats(0.01, 100) for priority in Priority}),
    st.sampled_from([1, 4, 8]),
    st.integers(0, 1000),
)
def test_service_follows_any_weights_with_any_costs(weights, slots, seed):
    costs = {p: (1, random.Random(f"{seed}{p}").choice([2, 40, 400])) for p in Priority}
    engine = backlogged(weights, costs, seed=seed, slots=slots)
    # One request in each slot is a request too many or too few: long enough for that to be two points at most.
    enough = max(20_000, 50 * slots * max(most for _, most in costs.values()))
    engine.run(until=lambda e: sum(e.served.values()) > enough or not all(map(e.depth, Priority)))
    if sum(engine.served.values()) > enough:
        assert_near(parts(engine.served), shares(weights, 0.05))


@pytest.mark.parametrize("seed", range(8))
def test_shares_hold_within_the_first_hundred_starts_however_the_lanes_filled(seed):
    """Eight slots are free at once, and a burst arrives in random order, some of it before the others."""
    draw = random.Random(seed)
    engine = Engine(Scheduler(WEIGHTS))
    burst = [priority for priority in Priority for _ in range(150)]
    draw.shuffle(burst)
    for priority in burst:
        engine.put(BARE[priority], draw.randint(50, 70))
        engine.fill()
    engine.log.clear()
    engine.run(until=lambda e: len(e.log) >= 100)
    assert all(map(engine.depth, Priority))
    assert_near(parts(Counter(lane.priority for lane in engine.log)), WEIGHTS_SHARE)


@pytest.mark.parametrize("first", list(Priority))
def test_a_lane_that_filled_the_engine_first_owes_nothing_and_is_owed_nothing(first):
    engine = Engine(Scheduler(WEIGHTS))
    for _ in range(400):
        engine.put(BARE[first], 60)
    engine.fill()
    for priority in set(Priority) - {first}:
        for _ in range(400):
            engine.put(BARE[priority], 60)
    engine.log.clear()
    engine.run(until=lambda e: len(e.log) >= 200)
    assert_near(parts(Counter(lane.priority for lane in engine.log)), WEIGHTS_SHARE)


def test_slots_that_fall_free_together_are_spread_before_anything_has_finished():
    engine = backlogged(slots=10)
    engine.fill()
    assert Counter(lane.priority for lane in engine.log) == {HIGH: 6, MEDIUM: 3, LOW: 1}


def test_estimate_of_what_a_request_will_cost_is_learned():
    """Once the costs are known, a lane of long requests does not take every slot at first."""
    engine = backlogged(costs={HIGH: (60, 60), MEDIUM: (60, 60), LOW: (600, 600)}, slots=1)
    engine.run(until=lambda e: e.started[BARE[LOW]] >= 12)
    engine.slots = 40
    engine.log.clear()
    engine.fill()
    assert len(engine.log) >= 39
    assert Counter(lane.priority for lane in engine.log)[LOW] <= 1


# ---- starvation


@pytest.mark.parametrize("weights", [WEIGHTS, {HIGH: 1e6, MEDIUM: 1.0, LOW: 1e-6}, dict.fromkeys(Priority, 1.0)])
def test_low_lane_is_served_while_high_is_endless(weights):
    engine = Engine(Scheduler(weights))
    for _ in range(1000):
        engine.put(BARE[LOW], 50)

    def feed(e):
        while e.depth(HIGH) < 20:
            e.put(BARE[HIGH], 50)
        return sum(e.started.values()) >= 1000

    engine.run(until=feed)
    assert engine.served[LOW] / sum(engine.served.values()) >= 0.05 - 0.005
    gaps = [
        len(list(run)) for is_low, run in itertools.groupby(lane.priority is LOW for lane in engine.log) if not is_low
    ]
    assert max(gaps) <= 40


def test_low_lane_is_served_while_endless_high_requests_are_refused_at_no_cost():
    engine = Engine(Scheduler(WEIGHTS), slots=1)
    for _ in range(10):
        engine.put(BARE[LOW], 60)

    def feed(e):
        while e.depth(HIGH) < 20:
            e.put(BARE[HIGH], 0)
        return not e.depth(LOW) or len(e.log) > 20_000

    engine.run(until=feed)
    assert not engine.depth(LOW)


def test_low_lane_that_sends_one_request_at_a_time_is_served_while_high_is_endless():
    engine = Engine(Scheduler(WEIGHTS), slots=1)
    answered = 0

    def feed(e):
        nonlocal answered
        while e.depth(HIGH) < 5:
            e.put(BARE[HIGH], 50)
        if not e.depth(LOW):
            answered += 1
            e.put(BARE[LOW], 50)
        return len(e.log) >= 1000

    engine.run(until=feed)
    assert answered >= 45


# ---- coming and going


def alone_for_long(priority, requests=500):
    """An engine that has served one priority only."""
    engine = Engine(Scheduler(WEIGHTS))
    for _ in range(requests):
        engine.put(BARE[priority], 60)
    engine.run(until=lambda e: e.depth(priority) < 100)
    engine.log.clear()
    return engine


def test_a_priority_that_was_idle_has_saved_up_nothing():
    engine = alone_for_long(HIGH)
    for priority in (MEDIUM, LOW, HIGH):
        for _ in range(300):
            engine.put(BARE[priority], 60)
    engine.run(until=lambda e: len(e.log) >= 100)
    assert_near(parts(Counter(lane.priority for lane in engine.log)), WEIGHTS_SHARE)


def test_a_priority_that_comes_while_another_was_alone_is_served_next():
    engine = alone_for_long(LOW)
    engine.put(BARE[HIGH], 60)
    engine.run(until=lambda e: e.log)
    assert engine.log[0] == BARE[HIGH]


def test_one_long_answer_costs_nothing_any_more_once_the_engine_has_been_idle():
    engine = Engine(Scheduler(WEIGHTS), slots=1)
    engine.put(BARE[HIGH], 10_000)
    engine.run(until=lambda e: not e.running)
    for _ in range(50):
        for priority in (LOW, MEDIUM, HIGH):
            engine.put(BARE[priority], 60)
    engine.log.clear()
    engine.fill()
    assert engine.log == [BARE[HIGH]]


def test_requests_much_shorter_than_the_first_estimate_do_not_push_a_returning_priority_back():
    engine = backlogged(costs=dict.fromkeys(Priority, (1, 1)), count=40, slots=8)
    engine.run(until=lambda e: not e.depth(HIGH))
    engine.log.clear()
    for _ in range(20):
        engine.put(BARE[HIGH], 1)
    engine.run(until=lambda e: len(e.log) >= 8)
    assert BARE[HIGH] in engine.log[:8]


# ---- preemption


def held_by_low(cost, *, slots=8):
    """An engine whose slots are all held by answers of LOW, which are as long as earlier ones were."""
    engine = Engine(Scheduler(WEIGHTS), slots)
    for _ in range(40 * slots):
        engine.put(BARE[LOW], cost)
    engine.run(until=lambda e: e.started[BARE[LOW]] >= 2 * slots)
    return engine


def preempts(scheduler, number, cost=None):
    """Whether a request of HIGH may take a place; it then starts, and ends if it has a cost."""
    scheduler.arrived(BARE[HIGH])
    if not scheduler.may_preempt(HIGH, LOW):
        return False
    scheduler.start(f"high-{number}", BARE[HIGH], stored_at=0.0, pending=0, now=0.0, wall_now=0.0)
    if cost is not None:
        scheduler.finish(f"high-{number}", cost)
    return True


@pytest.mark.parametrize("cost", [96, 2000])
def test_one_who_asks_short_questions_one_at_a_time_may_always_preempt(cost):
    engine = held_by_low(cost)
    for round_number in range(20):
        assert all(preempts(engine.scheduler, f"{round_number}-{number}", cost=20) for number in range(cost // 40))
        engine.advance()
        engine.fill()


def test_an_endless_row_preempts_until_its_priority_has_had_its_share():
    engine = held_by_low(96)
    numbers = itertools.count()
    begun = [sum(preempts(engine.scheduler, next(numbers), cost=96) for _ in range(100)) for _ in range(2)]
    # Beside one more request of LOW, HIGH gets six times as much.
    assert begun[0] in (6, 7)
    assert begun[1] == 0
    scheduler = engine.scheduler
    scheduler.start("low", BARE[LOW], stored_at=0.0, pending=1, now=0.0, wall_now=0.0)
    assert sum(preempts(scheduler, next(numbers), cost=96) for _ in range(100)) == 0
    scheduler.progress("low", 48)
    assert sum(preempts(scheduler, next(numbers), cost=96) for _ in range(100)) == 3
    scheduler.finish("low", 96)
    assert sum(preempts(scheduler, next(numbers), cost=96) for _ in range(100)) == 3


@pytest.mark.parametrize("cost", [20, 200])
def test_beside_answers_that_take_long_a_question_now_and_then_may_always_preempt(cost):
    """Eight LOW answers are written for minutes; each question ends after six more have been asked."""
    engine = held_by_low(1000)
    scheduler, written, open_questions = engine.scheduler, 0.0, deque()
    for number in range(100):
        assert preempts(scheduler, number), number
        open_questions.append(number)
        if len(open_questions) > 6:
            scheduler.finish(f"high-{open_questions.popleft()}", cost)
        # Meanwhile LOW gets a third of what HIGH uses, twice its share.
        written += cost / 3
        for request_id in list(scheduler._priorities._charged):
            if not request_id.startswith("high"):
                scheduler.progress(request_id, written / 8)


def test_of_priorities_level_with_each_other_the_heavier_goes_first():
    scheduler = Scheduler(WEIGHTS)
    for saturated in (False, True):
        order = scheduler.order(0.0, wall_now=0.0, saturated=saturated)
        assert [lane.priority for lane in order] == [HIGH] * 3 + [MEDIUM] * 3 + [LOW] * 3


# ---- waiting beyond the bound


def overdue(priority, *, seconds=1000.0, count=3000, ages=True):
    """All lanes are backlogged; the requests of one priority are old."""
    engine = Engine(Scheduler(WEIGHTS, max_wait_s=600.0), wall_offset=1e9)
    for other in Priority:
        for _ in range(count):
            engine.put(BARE[other], 64, stored_at=1e9 - seconds if other is priority else 2e9, ages=ages)
    return engine


def test_what_waits_beyond_the_bound_gets_one_choice_in_four_besides_its_share_and_no_more():
    engine = overdue(LOW)
    engine.run(until=lambda e: len(e.log) >= 800)
    low = sum(lane.priority is LOW for lane in engine.log) / len(engine.log)
    assert low == pytest.approx(1 / OVERDUE_EVERY + (1 - 1 / OVERDUE_EVERY) * 0.1, abs=0.02)
    runs = [len(list(run)) for is_low, run in itertools.groupby(lane.priority is LOW for lane in engine.log) if is_low]
    assert max(runs) <= 2


def test_what_does_not_wait_beyond_the_bound_is_not_lifted():
    engine = overdue(LOW, seconds=500.0)
    engine.run(until=lambda e: len(e.log) >= 400)
    assert sum(lane.priority is LOW for lane in engine.log) / len(engine.log) == pytest.approx(0.1, abs=0.02)


def test_the_lines_of_a_batch_are_not_lifted_however_long_they_wait():
    engine = overdue(LOW, ages=False)
    engine.run(until=lambda e: len(e.log) >= 400)
    assert sum(lane.priority is LOW for lane in engine.log) / len(engine.log) == pytest.approx(0.1, abs=0.02)


def test_having_been_lifted_is_not_paid_back_with_less_than_the_share():
    engine = overdue(LOW)
    engine.run(until=lambda e: len(e.log) >= 800)
    for queue in engine.lanes.values():
        queue.clear()
    for priority in Priority:
        for _ in range(1000):
            engine.put(BARE[priority], 64, stored_at=2e9)
    engine.run(until=lambda e: len(e.log) >= 810)
    engine.log.clear()
    engine.run(until=lambda e: len(e.log) >= 200)
    assert_near(parts(Counter(lane.priority for lane in engine.log)), WEIGHTS_SHARE, points=3)


def test_a_lifted_priority_does_not_push_a_returning_one_behind_the_third():
    engine = overdue(LOW)
    engine.lanes[BARE[HIGH]].clear()
    engine.run(until=lambda e: len(e.log) >= 800)
    engine.log.clear()
    for _ in range(50):
        engine.put(BARE[HIGH], 64)
    engine.run(until=lambda e: len(e.log) >= 40)
    assert sum(lane.priority is HIGH for lane in engine.log) >= 15


def test_an_overdue_lane_that_turns_out_to_be_empty_keeps_nobody_waiting():
    engine = overdue(LOW, count=30)
    engine.run(until=lambda e: len(e.log) >= 20)
    engine.lanes[BARE[LOW]].clear()
    engine.log.clear()
    engine.run(until=lambda e: len(e.log) >= 20)
    assert LOW not in {lane.priority for lane in engine.log}


def test_what_was_overdue_before_a_lane_was_empty_lifts_nothing_that_comes_after():
    engine = overdue(LOW, count=30)
    engine.run(until=lambda e: len(e.log) >= 20)
    for lane in LANES:
        if lane.priority is LOW:
            engine.lanes[lane].clear()
            engine.scheduler.empty(lane, engine.now)
    engine.put(BARE[LOW], 64)
    for number in range(OVERDUE_EVERY):
        engine.scheduler.start(
            f"x{number}", BARE[HIGH], stored_at=2e9, pending=1, now=engine.now, wall_now=engine.wall_now
        )
        engine.scheduler.finish(f"x{number}", 1)
    # What is lifted is not charged.
    engine.scheduler.start("low", BARE[LOW], stored_at=2e9, pending=1, now=engine.now, wall_now=engine.wall_now)
    assert "low" in engine.scheduler._priorities._charged


# ---- within one priority


@pytest.mark.parametrize(
    ("saturated", "wanted"),
    [
        (False, {Task.UNTRIAGED: 1 / 3, Task.SIMPLE: 1 / 3, Task.COMPLEX: 1 / 3}),
        (True, {Task.UNTRIAGED: 2 / 7, Task.SIMPLE: 1 / 7, Task.COMPLEX: 4 / 7}),
    ],
)
def test_a_saturated_engine_prefers_complex_work_by_weight_and_not_strictly(saturated, wanted):
    engine = Engine(Scheduler(WEIGHTS), slots=1)
    for lane in LANES:
        for _ in range(400):
            engine.put(lane, 10)
    engine.run(until=lambda e: len(e.log) >= 420, saturated=saturated)
    for priority in Priority:
        of_priority = [lane.task for lane in engine.log if lane.priority is priority]
        for task, part in wanted.items():
            assert of_priority.count(task) == pytest.approx(part * len(of_priority), abs=1.5)
    assert_near(parts(Counter(lane.priority for lane in engine.log)), WEIGHTS_SHARE)


def test_simple_work_is_served_when_only_it_is_left_on_a_saturated_engine():
    engine = Engine(Scheduler(WEIGHTS), slots=1)
    for _ in range(10):
        engine.put(Lane(LOW, Task.SIMPLE), 10)
    engine.run(until=lambda e: len(e.log) >= 10, saturated=True)


def test_a_lane_that_was_empty_for_long_does_not_take_its_turns_later():
    engine = Engine(Scheduler(WEIGHTS), slots=1)
    simple, complex_ = Lane(HIGH, Task.SIMPLE), Lane(HIGH, Task.COMPLEX)
    for _ in range(300):
        engine.put(simple, 10)
    engine.run(until=lambda e: len(e.log) >= 200)
    for _ in range(100):
        engine.put(complex_, 10)
    engine.log.clear()
    engine.run(until=lambda e: len(e.log) >= 20)
    assert engine.log.count(complex_) in range(9, 12)


class Stream(Engine):
    """An engine whose lanes hold the sequences of one stream, as the broker announces and delivers them."""

    def __init__(self, slots=1):
        super().__init__(Scheduler(WEIGHTS), slots)
        self.sequences = itertools.count(1)
        self.taken = []

    def store(self, lane, *, announced=True):
        sequence = next(self.sequences)
        self.lanes[lane].append(sequence)
        if announced:
            self.scheduler.arrived(lane, sequence)

    def take(self, *, saturated=False):
        for lane in self.scheduler.order(self.now, wall_now=0.0, saturated=saturated):
            if not (queue := self.lanes[lane]):
                self.scheduler.empty(lane, self.now)
                continue
            sequence = queue.popleft()
            fields = {"stored_at": 0.0, "pending": len(queue), "now": self.now, "wall_now": 0.0}
            self.scheduler.start(str(sequence), lane, sequence=sequence, saturated=saturated, **fields)
            self.scheduler.finish(str(sequence), 10)
            self.taken.append(sequence)
            return


CLASSES = [Lane(LOW, task) for task in Task]


@pytest.mark.parametrize("announced", [True, False])
@given(lanes=st.lists(st.sampled_from(CLASSES), min_size=1, max_size=40))
def test_within_a_priority_the_order_is_that_of_arrival_whatever_the_class(lanes, announced):
    stream = Stream()
    for lane in lanes:
        stream.store(lane, announced=announced)
    for _ in lanes:
        stream.take()
    if announced:
        assert stream.taken == sorted(stream.taken)
    assert sorted(stream.taken) == list(range(1, len(lanes) + 1)), "none is left out"


def test_a_lane_that_another_worker_has_emptied_is_asked_once():
    stream = Stream()
    for lane in [CLASSES[1]] * 5 + [CLASSES[2]] * 5:
        stream.store(lane)
    for _ in range(3):
        stream.lanes[CLASSES[1]].popleft()
    for _ in range(7):
        stream.take()
    assert stream.taken == [4, 5, 6, 7, 8, 9, 10]


def test_a_request_that_is_delivered_again_goes_before_younger_ones():
    stream = Stream()
    for lane in [CLASSES[1], *[CLASSES[2]] * 5]:
        stream.store(lane)
    stream.take()
    stream.take()
    stream.lanes[CLASSES[1]].append(1)
    stream.now += RECHECK_S
    stream.take()
    assert stream.taken == [1, 2, 1]


def test_more_requests_than_are_remembered_are_served_all_the_same(monkeypatch):
    monkeypatch.setattr("pipeline.core.scheduler._MOST_REMEMBERED", 3)
    stream = Stream()
    for number in range(40):
        stream.store(CLASSES[number % 2])
    for _ in range(40):
        stream.take()
    assert sorted(stream.taken) == list(range(1, 41))


# ---- what is known of emptiness


def test_a_lane_found_empty_is_not_named_until_it_is_time_to_look_again():
    scheduler = Scheduler(WEIGHTS)
    lane = BARE[HIGH]
    scheduler.empty(lane, 1.0)
    assert lane not in scheduler.order(1.0, wall_now=0.0)
    assert lane not in scheduler.order(1.0 + RECHECK_S * 0.99, wall_now=0.0)
    assert lane in scheduler.order(1.0 + RECHECK_S, wall_now=0.0)


def test_an_arrival_undoes_emptiness():
    scheduler = Scheduler(WEIGHTS)
    for lane in LANES:
        scheduler.empty(lane, 1.0)
    assert scheduler.order(1.0, wall_now=0.0) == []
    scheduler.arrived(BARE[LOW])
    assert scheduler.order(1.0, wall_now=0.0) == [BARE[LOW]]


def test_after_forgetting_every_lane_is_asked_again():
    scheduler = Scheduler(WEIGHTS)
    for lane in LANES:
        scheduler.empty(lane, 1.0)
    scheduler.forget()
    assert set(scheduler.order(1.0, wall_now=0.0)) == set(LANES)


def test_only_the_lanes_given_are_named():
    lanes = tuple(lane for lane in LANES if lane.task is not Task.COMPLEX)
    assert set(Scheduler(WEIGHTS, lanes=lanes).order(0.0, wall_now=0.0)) == set(lanes)


def test_the_last_request_of_a_lane_tells_that_it_is_empty():
    engine = Engine(Scheduler(WEIGHTS))
    engine.put(BARE[HIGH], 10)
    engine.start_one()
    assert BARE[HIGH] not in engine.scheduler.order(engine.now, wall_now=0.0)


def test_asking_for_the_order_changes_nothing():
    engine = backlogged()
    engine.run(until=lambda e: len(e.log) >= 50)
    before = repr(engine.scheduler)
    orders = [engine.scheduler.order(engine.now, wall_now=0.0, saturated=True) for _ in range(3)]
    assert orders[0] == orders[1] == orders[2]
    assert repr(engine.scheduler) == before


def test_the_end_of_a_request_that_never_began_or_ended_before_is_ignored():
    scheduler = Scheduler(WEIGHTS)
    scheduler.start("a", BARE[LOW], stored_at=0.0, pending=1, now=0.0, wall_now=0.0)
    scheduler.finish("a", 100.0)
    before = repr(scheduler)
    scheduler.finish("a", 1e9)
    scheduler.finish("never", 1e9)
    assert repr(scheduler) == before


class Worker(RuleBasedStateMachine):
    """Any order of arrivals, thefts by other workers, starts, ends and reconnects, against what always holds."""

    def __init__(self):
        super().__init__()
        self.engine = Engine(Scheduler(WEIGHTS), slots=4)
        self.emptied = {}

    @rule(lane=st.sampled_from(LANES), count=st.integers(1, 5), cost=st.integers(0, 500))
    def arrive(self, lane, count, cost):
        for _ in range(count):
            self.engine.put(lane, cost)
        self.emptied.pop(lane, None)

    @rule(lane=st.sampled_from(LANES))
    def another_worker_takes_all(self, lane):
        self.engine.lanes[lane].clear()

    @rule(lane=st.sampled_from(LANES))
    def come_back_unannounced(self, lane):
        self.engine.lanes[lane].append((self.engine.wall_now, 10))

    @rule(saturated=st.booleans())
    @precondition(lambda self: len(self.engine.running) < self.engine.slots)
    def start(self, saturated):
        engine = self.engine
        named = engine.scheduler.order(engine.now, wall_now=engine.wall_now, saturated=saturated)
        waiting = [lane for lane in named if engine.lanes[lane]]
        started = engine.start_one(saturated=saturated)
        assert started == (waiting[0] if waiting else None)
        for lane in named[: named.index(started) if started else len(named)]:
            self.emptied[lane] = engine.now
        if started:
            self.emptied.pop(started, None)
            if not engine.lanes[started]:
                self.emptied[started] = engine.now

    @rule()
    @precondition(lambda self: self.engine.running)
    def finish(self):
        self.engine.advance()

    @rule(seconds=st.sampled_from([0.1, RECHECK_S, 700.0]))
    @precondition(lambda self: not self.engine.running)
    def wait(self, seconds):
        self.engine.now += seconds

    @rule()
    def reconnect(self):
        self.engine.scheduler.forget()
        self.emptied.clear()

    @invariant()
    def every_lane_is_named_once_but_for_those_known_to_be_empty(self):
        now = self.engine.now
        named = self.engine.scheduler.order(now, wall_now=self.engine.wall_now)
        known = {lane for lane, since in self.emptied.items() if now - since < RECHECK_S}
        assert sorted(named) == sorted(set(LANES) - known)

    @invariant()
    def nothing_is_charged_that_does_not_run(self):
        assert len(self.engine.scheduler._priorities._charged) <= len(self.engine.running)

    def teardown(self):
        """Whatever happened before, from here on shares are as they should be."""
        engine = self.engine
        for queue in engine.lanes.values():
            queue.clear()
        while engine.running:
            engine.advance()
        engine.now += RECHECK_S
        engine.fill()
        for priority in Priority:
            for _ in range(400):
                engine.put(BARE[priority], 60)
        engine.log.clear()
        engine.run(until=lambda e: len(e.log) >= 300)
        assert_near(parts(Counter(lane.priority for lane in engine.log)), WEIGHTS_SHARE)


TestWorker = Worker.TestCase
TestWorker.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


def put_unannounced(engine, lane, count, cost=50):
    """Requests in a lane that the scheduler has not heard of."""
    engine.lanes[lane].extend((engine.wall_now, cost) for _ in range(count))


def test_shares_hold_from_the_first_start_if_every_lane_was_filled_before_the_worker_came():
    engine = Engine(Scheduler(WEIGHTS))
    for priority in Priority:
        put_unannounced(engine, BARE[priority], 200)
    engine.run(until=lambda e: len(e.log) >= 100)
    assert_near(parts(Counter(lane.priority for lane in engine.log)), WEIGHTS_SHARE)


def test_shares_hold_after_a_reconnect_if_lanes_were_filled_meanwhile():
    engine = Engine(Scheduler(WEIGHTS))
    for _ in range(400):
        engine.put(BARE[HIGH], 50)
    engine.run(until=lambda e: len(e.log) >= 100)  # the other lanes are found empty
    for priority in (MEDIUM, LOW):
        put_unannounced(engine, BARE[priority], 200)
    engine.scheduler.forget()
    engine.log.clear()
    engine.run(until=lambda e: len(e.log) >= 100)
    assert_near(parts(Counter(lane.priority for lane in engine.log)), WEIGHTS_SHARE)


@pytest.mark.parametrize("lane", [BARE[LOW], Lane(LOW, Task.SIMPLE), Lane(HIGH, Task.COMPLEX)])
def test_a_request_that_comes_back_unannounced_is_found_while_high_is_endless(lane):
    engine = Engine(Scheduler(WEIGHTS))

    def feed(e):
        while len(e.lanes[BARE[HIGH]]) < 20:
            e.put(BARE[HIGH], 50)

    def until(e):
        feed(e)
        return lane in e.log or e.now > 20

    feed(engine)
    engine.run(until=lambda e: feed(e) or e.now > 1)  # the other lanes are found empty
    put_unannounced(engine, lane, 1)
    engine.run(until=until)
    assert lane in engine.log


def test_what_is_announced_before_an_older_answer_is_heard_keeps_its_lane_in_turn():
    scheduler = Scheduler(WEIGHTS)
    lane = Lane(Priority.MEDIUM, Task.UNTRIAGED)
    # The broker handed over request 1 when nothing else was there; request 2 was stored, and announced, meanwhile.
    scheduler.arrived(lane, 2)
    scheduler.start("1", lane, stored_at=0.0, pending=0, now=1.0, wall_now=1.0, sequence=1)
    assert lane in scheduler.order(1.0, wall_now=1.0)
    # Asked when 2 was the newest, the lane was empty; 3 came before that answer.
    asked = scheduler.announced(lane)
    scheduler.arrived(lane, 3)
    scheduler.empty(lane, 1.0, announced=asked)
    assert lane in scheduler.order(1.0, wall_now=1.0)
    scheduler.empty(lane, 1.0, announced=scheduler.announced(lane))
    assert lane not in scheduler.order(1.0, wall_now=1.0)


# ---- taking several at once


@pytest.mark.parametrize("count", [1, 7, 40])
def test_a_plan_gives_each_lane_what_it_would_get_one_request_after_another(count):
    engine = backlogged()
    engine.run(until=lambda e: len(e.log) >= 50)
    planned = engine.scheduler.plan(count, LANES, engine.now, wall_now=engine.wall_now)
    chosen = Counter()
    for number in range(count):
        lane = engine.scheduler.order(engine.now, wall_now=engine.wall_now)[0]
        chosen[lane] += 1
        engine.scheduler.start(
            f"next-{number}", lane, stored_at=engine.wall_now, pending=1, now=engine.now, wall_now=engine.wall_now
        )
    assert planned == chosen


def test_planning_changes_nothing():
    engine = backlogged()
    engine.run(until=lambda e: len(e.log) >= 50)
    before = repr(engine.scheduler)
    assert engine.scheduler.plan(16, LANES, engine.now, wall_now=engine.wall_now).total() == 16
    assert repr(engine.scheduler) == before


def test_a_plan_keeps_to_the_given_lanes_and_to_those_that_may_hold_work():
    scheduler = Scheduler(WEIGHTS)
    for lane in LANES:
        scheduler.empty(lane, 1.0)
    assert not scheduler.plan(8, LANES, 1.0, wall_now=0.0)
    scheduler.arrived(BARE[LOW])
    scheduler.arrived(BARE[HIGH])
    assert scheduler.plan(8, [BARE[LOW]], 1.0, wall_now=0.0) == {BARE[LOW]: 8}


def test_a_plan_asks_a_lane_that_was_empty_for_one_request():
    scheduler = Scheduler(WEIGHTS)
    for lane in LANES:
        if lane != BARE[HIGH]:
            scheduler.empty(lane, 1.0)
    planned = scheduler.plan(20, LANES, 1.0 + RECHECK_S, wall_now=0.0)
    others = [planned[lane] for lane in LANES if lane != BARE[HIGH]]
    assert max(others) == 1
    assert planned[BARE[HIGH]] == 20 - sum(others)


# ---- tenants


ANN, BOB = (BARE[HIGH]._replace(tenant=tenant) for tenant in ("ann", "bob"))


def served(scheduler, count, *, lanes, cost=lambda _: 100.0):
    """The lanes of the next requests, each of which ends before the next one starts."""
    found = []
    for number in range(count):
        lane = next(lane for lane in scheduler.order(0.0, wall_now=0.0) if lane in lanes)
        scheduler.start(f"{len(found)}-{number}", lane, stored_at=0.0, pending=1, now=0.0, wall_now=0.0)
        scheduler.finish(f"{len(found)}-{number}", cost(lane))
        found.append(lane)
    return found


def test_a_lane_of_a_tenant_is_asked_again_only_after_a_request_of_it_was_returned():
    scheduler = Scheduler(WEIGHTS, lanes=(*LANES, ANN))
    scheduler.empty(ANN, 1.0)
    assert ANN not in scheduler.order(1000.0, wall_now=0.0)
    scheduler.arrived(ANN, sequence=7)
    assert ANN in scheduler.order(1000.0, wall_now=0.0)
    scheduler.returned(ANN, 1000.0)
    assert scheduler.asked_again(1000.0) == [], "it is asked at once"
    scheduler.empty(ANN, 1000.0)
    assert scheduler.asked_again(1000.0) == [ANN]
    assert ANN not in scheduler.order(1000.0 + RECHECK_S * 0.99, wall_now=0.0)
    assert ANN in scheduler.order(1000.0 + RECHECK_S, wall_now=0.0)
    assert scheduler.asked_again(1000.0 + RETURNED_S) == []
    assert ANN not in scheduler.order(2000.0, wall_now=0.0)
    scheduler.returned(ANN, 3000.0)
    scheduler.empty(ANN, 3000.0 + RETURNED_S)
    assert ANN not in scheduler.order(4000.0, wall_now=0.0)


def test_others_have_what_this_process_gave_back_first():
    scheduler = Scheduler(WEIGHTS, lanes=(*LANES, ANN))
    scheduler.empty(ANN, 1.0)
    assert scheduler.asked_again_in(1000.0) is None
    scheduler.gave_back(ANN, 1000.0, 7.0)
    assert scheduler.asked_again(1000.0) == []
    assert scheduler.asked_again_in(1000.0) == pytest.approx(OTHERS_FIRST_S)
    assert ANN not in scheduler.order(1000.0, wall_now=0.0)
    later = 1000.0 + OTHERS_FIRST_S
    assert scheduler.asked_again(later) == [ANN]
    assert scheduler.asked_again_in(later) is None
    assert scheduler.asked_again(1007.0) == [ANN], "it is delivered again about now"
    assert scheduler.asked_again(1007.0 + RETURNED_S) == []


def test_a_lane_of_which_more_wait_is_asked_on_when_one_was_given_back():
    scheduler = Scheduler(WEIGHTS, lanes=(*LANES, ANN))
    scheduler.gave_back(ANN, 1000.0, 0.0)
    assert ANN in scheduler.order(1000.0, wall_now=0.0)


def test_a_paused_lane_to_which_a_request_was_given_back_is_not_asked():
    scheduler = Scheduler(WEIGHTS, lanes=(*LANES, ANN), paused=lambda lane: lane == ANN)
    scheduler.recheck(1.0)
    scheduler.gave_back(ANN, 1000.0, 0.0)
    assert scheduler.asked_again(1000.0 + OTHERS_FIRST_S) == []


@pytest.mark.parametrize(("cost", "share"), [(100.0, 0.5), (300.0, 0.25)])
def test_tenants_of_a_priority_get_the_same_service_in_tokens_and_the_default_one_is_one_of_them(cost, share):
    plain = BARE[HIGH]
    scheduler = Scheduler(WEIGHTS, lanes=(plain, ANN))
    found = served(scheduler, 200, lanes=(plain, ANN), cost=lambda lane: cost if lane == ANN else 100.0)
    assert found.count(ANN) == pytest.approx(200 * share, abs=3)


def test_a_tenant_that_comes_is_served_within_one_turn_of_each_and_is_owed_nothing():
    flood = [BARE[HIGH]._replace(tenant=f"t{number}") for number in range(20)]
    scheduler = Scheduler(WEIGHTS, lanes=flood)
    served(scheduler, 500, lanes=flood)
    scheduler.add(ANN)
    found = served(scheduler, 63, lanes=(*flood, ANN))
    assert ANN in found[:21]
    assert found.count(ANN) == pytest.approx(3, abs=1)


def test_the_lanes_of_one_tenant_are_served_in_the_order_of_arrival():
    first, second = ANN._replace(task=Task.COMPLEX), ANN
    scheduler = Scheduler(WEIGHTS, lanes=(first, second))
    for sequence, lane in enumerate((first, second, second, first), start=1):
        scheduler.arrived(lane, sequence)
    found = []
    for number in range(4):
        lane = scheduler.order(0.0, wall_now=0.0)[0]
        found.append(lane)
        scheduler.start(str(number), lane, stored_at=0.0, pending=1, now=0.0, wall_now=0.0, sequence=number + 1)
    assert found == [first, second, second, first]


def test_what_a_tenant_used_elsewhere_is_charged_here():
    scheduler = Scheduler(WEIGHTS, lanes=(ANN, BOB))
    served(scheduler, 4, lanes=(ANN, BOB))
    scheduler.used(HIGH, "ann", 1000.0)
    assert served(scheduler, 9, lanes=(ANN, BOB)) == [BOB] * 9


def test_a_request_out_of_turn_is_charged_to_its_tenant():
    scheduler = Scheduler(WEIGHTS, lanes=(*LANES, ANN._replace(priority=LOW)))
    ann = ANN._replace(priority=LOW)
    scheduler.start("head", ann, stored_at=0.0, pending=9, now=0.0, wall_now=0.0)
    scheduler.finish("head", 100.0)
    seen = served_late(scheduler, 40, (ann, BARE[LOW]))
    assert seen.count(ann) == pytest.approx(seen.count(BARE[LOW]), abs=2)


def served_late(scheduler, count, lanes):
    """The lanes of the next requests of LOW, while all of LOW has waited beyond the bound."""
    found, late = [], 10_000.0
    for number in range(count):
        lane = scheduler.order(0.0, wall_now=late)[0]
        scheduler.start(f"late-{number}", lane, stored_at=0.0, pending=9, now=0.0, wall_now=late)
        scheduler.finish(f"late-{number}", 100.0)
        if lane in lanes:
            found.append(lane)
    return found


def test_a_plan_shares_among_tenants_and_changes_nothing():
    scheduler = Scheduler(WEIGHTS, lanes=(BARE[HIGH], ANN, BOB))
    for number in range(30):
        scheduler.arrived(ANN, number + 1)
    before = scheduler.order(0.0, wall_now=0.0)
    planned = scheduler.plan(9, (BARE[HIGH], ANN, BOB), 0.0, wall_now=0.0)
    assert planned == {BARE[HIGH]: 3, ANN: 3, BOB: 3}
    assert scheduler.order(0.0, wall_now=0.0) == before
    assert scheduler._lanes[ANN].oldest() == 1


def test_a_lane_can_be_removed_and_added_again():
    scheduler = Scheduler(WEIGHTS, lanes=(ANN, BOB))
    scheduler.remove(ANN)
    scheduler.remove(ANN)
    assert ANN not in scheduler
    assert scheduler.order(0.0, wall_now=0.0) == [BOB]
    scheduler.add(ANN)
    scheduler.add(ANN)
    assert set(scheduler.order(0.0, wall_now=0.0)) == {ANN, BOB}


def test_a_lane_that_is_removed_between_two_choices_is_left_out():
    scheduler = Scheduler(WEIGHTS, lanes=(ANN, BOB))
    choices = scheduler.choices(0.0, wall_now=0.0)
    left = {ANN, BOB} - {next(choices)}
    scheduler.remove(left.pop())
    assert list(choices) == []


def test_names_that_come_and_go_leave_nothing_behind():
    scheduler = Scheduler(WEIGHTS, lanes=(BARE[HIGH],))
    for number in range(1000):
        lane = BARE[HIGH]._replace(tenant=f"t{number}")
        scheduler.add(lane)
        served(scheduler, 2, lanes=(lane, BARE[HIGH]))
        scheduler.remove(lane)
    assert len(scheduler._tenants[HIGH]) < 100
    assert len(scheduler._lanes) == 1


# ---- paused lanes


def paused_low(lanes=LANES):
    """A scheduler whose LOW lanes can be paused, and the set that says so."""
    held = set()
    return Scheduler(WEIGHTS, lanes=lanes, paused=lambda lane: lane.priority in held), held


def order(scheduler, now, *, wall_now=0.0):
    return [lane.priority for lane in scheduler.order(now, wall_now=wall_now)]


def test_a_paused_lane_is_not_asked_until_it_is_resumed():
    scheduler, held = paused_low()
    assert LOW in order(scheduler, 0.0)
    held.add(LOW)
    scheduler.recheck(1.0)
    scheduler.arrived(BARE[LOW], 7)
    scheduler.forget()
    assert LOW not in order(scheduler, 1.0)
    assert LOW not in order(scheduler, 1.0 + 1000 * RECHECK_S)
    held.clear()
    scheduler.recheck(1000.0)
    assert LOW in order(scheduler, 1000.0)


def test_the_rule_of_the_longest_wait_ignores_a_paused_lane():
    scheduler, held = paused_low()
    scheduler.start("a", BARE[LOW], stored_at=0.0, pending=9, now=0.0, wall_now=0.0)
    held.add(LOW)
    scheduler.recheck(0.0)
    for number in range(2 * OVERDUE_EVERY):
        assert order(scheduler, 0.0, wall_now=10_000.0)[0] is not LOW
        scheduler.start(f"h{number}", BARE[HIGH], stored_at=None, pending=9, now=0.0, wall_now=10_000.0)


def test_a_begun_request_of_a_paused_lane_goes_on_and_does_not_count_for_the_longest_wait():
    scheduler, held = paused_low()
    held.add(LOW)
    scheduler.recheck(0.0)
    scheduler.start("begun", BARE[LOW], stored_at=0.0, pending=0, now=0.0, wall_now=0.0)
    # MEDIUM waits beyond the bound, though not for as long.
    scheduler.start("m", BARE[MEDIUM], stored_at=1.0, pending=9, now=0.0, wall_now=1.0)
    for number in range(OVERDUE_EVERY):
        scheduler.start(f"h{number}", BARE[HIGH], stored_at=None, pending=9, now=0.0, wall_now=1.0)
    assert scheduler._lifted(10_000.0, OVERDUE_EVERY) is MEDIUM
    held.clear()
    scheduler.recheck(1.0)
    assert scheduler._lifted(10_000.0, OVERDUE_EVERY) is MEDIUM


@pytest.mark.parametrize("begun", [False, True], ids=["nothing runs", "a begun request goes on"])
def test_a_priority_saves_up_nothing_while_it_is_paused(begun):
    scheduler, held = paused_low()
    held.add(LOW)
    scheduler.recheck(0.0)
    if begun:
        scheduler.start("begun", BARE[LOW], stored_at=None, pending=0, now=0.0, wall_now=0.0)
        scheduler.finish("begun", 100.0)
    for number in range(500):
        scheduler.start(f"h{number}", BARE[HIGH], stored_at=None, pending=9, now=0.0, wall_now=0.0)
        scheduler.finish(f"h{number}", 100.0)
    held.clear()
    scheduler.recheck(0.0)
    first = []
    for number in range(40):
        lane = next(lane for lane in scheduler.order(0.0, wall_now=0.0) if lane.priority is not MEDIUM)
        first.append(lane.priority)
        scheduler.start(f"n{number}", lane, stored_at=None, pending=9, now=0.0, wall_now=0.0)
        scheduler.finish(f"n{number}", 100.0)
    assert 3 <= first.count(LOW) <= 12


def test_a_tenant_saves_up_nothing_while_it_is_paused_and_a_begun_request_goes_on():
    acme, bolt = (Lane(LOW, Task.UNTRIAGED, tenant) for tenant in ("acme", "bolt"))
    held = {"acme"}
    scheduler = Scheduler(WEIGHTS, lanes=(acme, bolt), paused=lambda lane: lane.tenant in held)
    scheduler.recheck(0.0)
    scheduler.start("begun", acme, stored_at=None, pending=0, now=0.0, wall_now=0.0)
    scheduler.finish("begun", 100.0)
    for number in range(500):
        scheduler.start(f"b{number}", bolt, stored_at=None, pending=9, now=0.0, wall_now=0.0)
        scheduler.finish(f"b{number}", 100.0)
    held.clear()
    scheduler.recheck(0.0)
    assert served(scheduler, 40, lanes=(acme, bolt)).count(acme) == pytest.approx(20, abs=2)


def test_a_paused_lane_of_a_priority_leaves_the_others_their_turns():
    acme, bolt = (Lane(LOW, Task.UNTRIAGED, tenant) for tenant in ("acme", "bolt"))
    scheduler = Scheduler(WEIGHTS, lanes=(*LANES, acme, bolt), paused=lambda lane: lane.tenant == "acme")
    scheduler.recheck(0.0)
    lanes = scheduler.order(0.0, wall_now=0.0)
    assert acme not in lanes
    assert bolt in lanes
