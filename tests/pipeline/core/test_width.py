"""The width that is found on engines with known curves: it is the best one, stays, and follows a change."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from pipeline.core.width import WidthFinder, first_width
from pipeline.engine import FIRST_SLOTS

TARGET_S = 0.2


class Engine:
    """A full batch whose steps take a known time, with some noise."""

    def __init__(
        self, step_s: Callable[[int], float], *, cap: int = 0, noise: float = 0.05, high: bool = False
    ) -> None:
        self.finder = WidthFinder(TARGET_S, cap)
        self.step_s, self.noise, self.high = step_s, noise, high
        self.now = 1000.0
        self.chance = random.Random(7)
        self.widths: Counter[int] = Counter()

    def run(self, seconds: float, *, demand: int = 1024) -> Counter[int]:
        """Step for so long. Returns how many steps each width had."""
        self.widths = Counter()
        end = self.now + seconds
        while self.now < end:
            width = min(self.finder.now, demand)
            took = self.step_s(width) * (1 + self.chance.uniform(0, self.noise))
            self.now += took
            self.finder.has_stepped(width, took, high=self.high, now=self.now)
            self.widths[self.finder.now] += 1
        return self.widths


def share(widths: Counter[int], *wanted: int) -> float:
    return sum(widths[width] for width in wanted) / widths.total()


def flat_until(width: int, step_s: float = 0.01) -> Callable[[int], float]:
    """The curve of an engine that reads its weights for so many sequences in the time in which it does for one."""
    return lambda running: step_s * max(1.0, running / width)


@pytest.mark.parametrize("best", [8, 16, 32, 64])
def test_it_settles_at_the_width_beyond_which_the_tokens_do_not_gain_and_stays_there(best):
    engine = Engine(flat_until(best))
    engine.run(120)
    assert share(engine.run(600), best) > 0.95


def test_noise_does_not_move_it():
    engine = Engine(flat_until(16), noise=0.4)
    engine.run(120)
    assert share(engine.run(600), 12, 16, 24) > 0.9


def test_a_batch_whose_steps_miss_the_target_is_not_kept():
    engine = Engine(lambda width: 0.04 + 0.008 * width)
    engine.run(300)
    # 16 sequences take 168 ms, and 24 take 232.
    assert share(engine.run(900), 16) > 0.95


def test_while_high_requests_come_a_step_takes_a_third_of_the_target():
    engine = Engine(lambda width: 0.02 + 0.003 * width, high=True)
    engine.run(300)
    # 16 sequences take 68 ms, which is within the slack of a tenth, and 24 take 92.
    assert share(engine.run(600), 12, 16) > 0.95
    engine.high = False
    engine.run(1200)
    assert engine.finder.now >= 24
    engine.high = True
    engine.run(120)
    assert share(engine.run(600), 12, 16) > 0.95


def test_an_engine_that_cannot_meet_the_target_keeps_the_first_width():
    engine = Engine(lambda width: 0.5 + 0.01 * width)
    engine.run(300)
    assert share(engine.run(2000), FIRST_SLOTS) > 0.9


def test_a_lasting_change_is_followed_both_ways():
    engine = Engine(flat_until(32))
    engine.run(120)
    assert engine.finder.now == 32
    # Deep sequences: a step takes longer for each of them.
    engine.step_s = lambda width: 0.02 + 0.015 * width
    engine.run(300)
    assert share(engine.run(300), 8, 12) > 0.9
    engine.step_s = flat_until(32)
    engine.run(2000)
    assert engine.finder.now == 32


def test_without_enough_requests_it_stays():
    engine = Engine(flat_until(64))
    assert set(engine.run(60, demand=3)) == {FIRST_SLOTS}


@pytest.mark.parametrize("cap", [1, 3, 8, 20, 1000])
def test_the_setting_is_the_most(cap):
    engine = Engine(flat_until(2000), cap=cap)
    assert engine.finder.now == first_width(cap) == min(cap, FIRST_SLOTS)
    assert max(engine.run(60)) == cap
    assert engine.finder.now == cap


def test_trials_become_rare():
    engine = Engine(flat_until(8))
    engine.run(1000)
    assert share(engine.run(3000), 8) > 0.98
