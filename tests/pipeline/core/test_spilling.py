"""A spill is never a loss: in simulated queues, no request ends later than it would without the second engine."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from pipeline.core.spilling import ends_sooner, is_idle, room, wanted_back
from pipeline.core.waits import Capacity
from pipeline.wire.messages import Load, PerPriority, PerPriorityCount, Slots
from pipeline.wire.subjects import Priority

HIGH, MEDIUM, LOW = Priority
UNKNOWN = Capacity(slots_total=1)
# 50 tokens at 10 a second: an answer takes 5 s.
IDLE = Capacity(slots_total=1, tokens_per_s=10.0, answer_tokens_per_s=10.0, tokens_per_request=50.0)
BUSY = replace(IDLE, slots_used=1, pending_tokens=30.0)


def load(wait_s=0.0, used=0, total=8, queued=0, **fields):
    waits = PerPriority(high=wait_s * 1000, medium=wait_s * 1000, low=wait_s * 1000)
    return Load(
        "mlx", "saturated", 1.0, waits, PerPriorityCount(low=queued), Slots(used, total), 100.0, "", 0.0, **fields
    )


# ---- room


def test_an_engine_of_unknown_speed_is_tried_with_one_request():
    assert room(UNKNOWN, 0, most_waiting=4).free == 1
    assert room(UNKNOWN, 1, most_waiting=4).free == 0
    assert room(replace(UNKNOWN, slots_used=1), 0, most_waiting=4).free == 0


def test_an_engine_that_is_away_has_no_room():
    assert not room(Capacity(), 0, most_waiting=4).healthy
    assert room(Capacity(), 0, most_waiting=4).free <= 0


def test_what_was_just_spilled_counts():
    found = [room(IDLE, waiting, most_waiting=4) for waiting in range(3)]
    assert [r.free for r in found] == [2, 1, 0]
    assert [r.answer_ms for r in found] == [5000, 10000, 15000]


def test_what_runs_and_the_cold_load_count():
    assert room(BUSY, 0, most_waiting=4).answer_ms == 8000
    assert room(replace(IDLE, loading_s=20.0), 0, most_waiting=4).answer_ms == 25000
    assert room(replace(BUSY, loading_s=20.0), 0, most_waiting=4).answer_ms == 28000


def test_no_more_wait_than_may_and_than_run():
    four = replace(IDLE, slots_total=4)
    assert room(four, 0, most_waiting=2).free == 6
    assert room(four, 0, most_waiting=9).free == 8


# ---- taking back


def test_queued_requests_are_wanted_back_unless_they_begin_at_once():
    assert wanted_back(BUSY, {HIGH: 0, MEDIUM: 1, LOW: 0}) == {MEDIUM}
    assert wanted_back(replace(BUSY, pending_tokens=1.0), {MEDIUM: 1}) == set()
    assert wanted_back(replace(BUSY, pending_tokens=1.0), {HIGH: 1, LOW: 1}) == {LOW}
    assert wanted_back(IDLE, {MEDIUM: 1}) == set(), "the second engine is about to take it"
    assert wanted_back(BUSY, {}) == set()


def test_all_queued_requests_are_wanted_back_from_an_engine_that_is_away_or_unknown():
    assert wanted_back(Capacity(), {HIGH: 1, LOW: 2}) == {HIGH, LOW}
    assert wanted_back(replace(UNKNOWN, slots_used=1), {LOW: 1}) == {LOW}


FIRST = Capacity(slots_total=8, slots_used=4, tokens_per_s=100.0, tokens_per_request=50.0, prompt_tokens_per_s=500.0)


@pytest.mark.parametrize(
    ("wait_s", "rest_s", "keeps", "ends"),
    [(0.0, 30.0, True, True), (0.0, 2.0, True, False), (40.0, 30.0, True, False), (0.0, 4.0, False, False)],
)
def test_a_running_answer_is_taken_back_only_for_an_earlier_end(wait_s, rest_s, keeps, ends):
    assert ends_sooner(load(wait_s), FIRST, BUSY, LOW, rest_s, keeps=keeps) is ends


def test_an_answer_of_unknown_rest_is_taken_back_by_an_idle_engine_alone():
    assert ends_sooner(load(), FIRST, UNKNOWN, LOW, math.inf)
    assert not ends_sooner(load(queued=1), FIRST, UNKNOWN, LOW, math.inf)
    assert not ends_sooner(load(used=8), FIRST, UNKNOWN, LOW, math.inf)


def test_nothing_is_taken_back_by_an_engine_that_is_away_unknown_or_unmeasured():
    assert not ends_sooner(None, FIRST, BUSY, LOW, 30.0)
    assert not ends_sooner(load(available=False), FIRST, BUSY, LOW, 30.0)
    assert not ends_sooner(load(), Capacity(slots_total=8), BUSY, LOW, 30.0)
    assert not is_idle(load(available=False))


# ---- simulated


class Queues:
    """Two engines in virtual time, in steps of 50 ms: the first serves so many at once, the second one at a time.

    All that waits for the first is simple. The router spills the oldest while `room` says that the second ends it
    before the first begins it; the first takes the oldest that is wanted back.
    """

    STEP_S = 0.05

    def __init__(self, chance: random.Random, *, spills: bool) -> None:
        self.slots = chance.randint(1, 8)
        self.first_rate = chance.uniform(20, 200)
        self.second_rate = chance.uniform(3, 100)
        self.loading_s = chance.choice([0.0, chance.uniform(1, 40)])
        self.tokens = [chance.uniform(20, 100) for _ in range(chance.randint(5, 40))]
        self.spills = spills
        self.queue = list(range(len(self.tokens)))
        self.lane: list[int] = []
        self.left = dict(enumerate(self.tokens))
        self.at_first: list[int] = []
        self.at_second: int | None = None
        self.answered = 0
        self.ended: dict[int, float] = {}
        self.now = 0.0

    def run(self) -> float:
        """When the last request has ended."""
        while len(self.ended) < len(self.tokens):
            self.route()
            self.serve()
            self.now += self.STEP_S
        return max(self.ended.values())

    @property
    def mean(self) -> float:
        return sum(self.tokens) / len(self.tokens)

    def second(self) -> Capacity:
        known = self.answered > 0 or (self.at_second is not None and self.loading_s <= 0)
        rate = self.second_rate if known else 0.0
        pending = self.left[self.at_second] if self.at_second is not None else 0.0
        return Capacity(
            slots_used=int(self.at_second is not None),
            slots_total=1,
            pending_tokens=pending,
            tokens_per_s=rate,
            answer_tokens_per_s=rate,
            tokens_per_request=self.mean if rate else 0.0,
        )

    def wait_s(self) -> float:
        pending = sum(self.left[r] for r in self.at_first) / self.slots + len(self.queue) * self.mean
        return pending / self.first_rate if len(self.at_first) >= self.slots else 0.0

    def route(self) -> None:
        second = self.second()
        while len(self.at_first) < self.slots:
            if self.lane and wanted_back(second, {LOW: len(self.lane)}):
                self.at_first.append(self.lane.pop(0))
            elif self.queue:
                self.at_first.append(self.queue.pop(0))
            else:
                break
        while self.spills and self.queue:
            there = room(self.second(), len(self.lane), most_waiting=4)
            if there.free <= 0 or there.answer_ms >= self.wait_s() * 1000:
                break
            self.lane.append(self.queue.pop(0))
            if self.at_second is None:
                self.at_second = self.lane.pop(0)
        if self.at_second is None and self.lane:
            self.at_second = self.lane.pop(0)
        self.hand_over()

    def hand_over(self) -> None:
        """The first takes the running answer of the second, where it ends it sooner."""
        running = self.at_second
        if running is None or len(self.at_first) >= self.slots:
            return
        second = self.second()
        rest_s = self.left[running] / self.second_rate + self.loading_s if second.measured else math.inf
        first = Capacity(len(self.at_first), self.slots, tokens_per_s=self.first_rate, tokens_per_request=self.mean)
        state = load(self.wait_s(), len(self.at_first), self.slots, len(self.queue))
        if ends_sooner(state, first, second, LOW, rest_s):
            self.at_first.append(running)
            self.at_second = None

    def serve(self) -> None:
        for request in list(self.at_first):
            self.work(request, self.first_rate / max(1, len(self.at_first)), self.at_first)
        if self.at_second is not None:
            if self.loading_s > 0:
                self.loading_s -= self.STEP_S
            elif self.work(self.at_second, self.second_rate, []):
                self.at_second = None
                self.answered += 1

    def work(self, request: int, rate: float, among: list[int]) -> bool:
        self.left[request] -= rate * self.STEP_S
        if self.left[request] > 0:
            return False
        self.ended[request] = self.now
        if request in among:
            among.remove(request)
        return True


@pytest.mark.parametrize("seed", range(150))
def test_the_last_answer_of_a_burst_is_never_later_than_with_the_first_engine_alone(seed):
    alone = Queues(random.Random(seed), spills=False).run()
    spilling = Queues(random.Random(seed), spills=True).run()
    assert spilling <= alone * 1.05 + 3.0, "an answer that is nearly written is not moved for less than a second"


def test_where_the_second_engine_is_fast_the_whole_is_quicker():
    gains = []
    for seed in range(60):
        alone, spilling = (Queues(random.Random(seed), spills=spills) for spills in (False, True))
        for queues in (alone, spilling):
            queues.second_rate, queues.loading_s = queues.first_rate, 0.0
        gains.append(spilling.run() / alone.run())
    assert sorted(gains)[len(gains) // 2] < 0.75
