"""Engines that share a machine: a spill that brings nothing is seen, said, and not made."""

from __future__ import annotations

import pytest

from pipeline.core.sharing import SharedMachine
from pipeline.core.waits import Capacity


class Pair:
    """Two engines whose rates depend on whether the other is busy, observed ten times a second."""

    def __init__(self, alone: float, beside: float, other: float) -> None:
        self.machine = SharedMachine()
        self.rates = {False: (alone, 0.0), True: (beside, other)}
        self.now = 100.0

    def run(self, seconds: float, *, busy: bool, loaded: bool = True, models: object = None) -> None:
        first, second = self.rates[busy]
        for _ in range(round(seconds * 10)):
            self.now += 0.1
            self.machine.observe(
                Capacity(slots_used=8, slots_total=8, tokens_per_s=first),
                Capacity(slots_used=int(busy), slots_total=1, tokens_per_s=second),
                self.now,
                loaded=loaded,
                models=models,
            )

    def verdict(self, high: int = 0):
        return self.machine.judge(self.now, high=high)


def test_the_first_engine_is_measured_alone_before_anything_is_spilled():
    pair = Pair(48.0, 38.0, 55.0)
    pair.run(0.5, busy=False)
    assert "measured alone" in pair.verdict().keeps
    assert not pair.verdict().takes_back
    pair.run(2.0, busy=False)
    assert not pair.verdict().keeps


def test_engines_with_cores_of_their_own_gain():
    pair = Pair(48.0, 38.6, 55.5)
    pair.run(3, busy=False)
    pair.run(3, busy=True)
    assert pair.machine.gain == pytest.approx(94.1 / 48)
    assert not pair.verdict().keeps


def test_engines_that_share_cores_are_no_quicker_and_the_reason_says_so():
    pair = Pair(48.0, 5.1, 2.0)
    pair.run(3, busy=False)
    pair.run(1.5, busy=True)
    assert not pair.verdict().keeps, "it is tried"
    pair.run(2, busy=True)
    verdict = pair.verdict()
    assert verdict.takes_back
    assert verdict.keeps == ("ollama shares this machine: both together are no quicker (5 + 2 tokens/s, mlx alone 48)")


def test_a_verdict_lasts_for_minutes_and_is_tried_again():
    pair = Pair(48.0, 5.1, 2.0)
    pair.run(3, busy=False)
    pair.run(4, busy=True)
    assert pair.verdict().takes_back
    pair.run(200, busy=False)
    assert pair.verdict().takes_back
    pair.run(120, busy=False)
    assert not pair.verdict().keeps
    pair.rates[True] = (40.0, 40.0)
    pair.run(4, busy=True)
    assert not pair.verdict().keeps


def test_nothing_is_spilled_beside_high_requests_where_it_slows_them():
    pair = Pair(48.0, 38.6, 55.5)
    pair.run(3, busy=False)
    pair.run(3, busy=True)
    assert not pair.verdict(high=0).keeps
    slowed = pair.verdict(high=1)
    assert "HIGH" in slowed.keeps
    assert not slowed.takes_back


def test_high_requests_change_nothing_where_the_first_engine_is_as_quick_as_alone():
    pair = Pair(100.0, 100.0, 22.0)
    pair.run(3, busy=False)
    pair.run(3, busy=True)
    assert not pair.verdict(high=5).keeps


def test_only_times_of_overload_count_and_dips_in_between_do_no_harm():
    pair = Pair(48.0, 38.0, 55.0)
    pair.run(10, busy=False, loaded=False)
    assert pair.machine.gain is None
    assert not pair.verdict().keeps, "there is nothing to spill"
    for _ in range(30):
        pair.run(0.1, busy=False)
        pair.run(0.1, busy=False, loaded=False)
    pair.run(0.1, busy=False)
    assert not pair.verdict().keeps


def test_an_engine_that_is_never_measured_alone_is_not_waited_for():
    pair = Pair(48.0, 38.0, 55.0)
    for _ in range(5):
        pair.run(0.5, busy=False)
        pair.run(0.5, busy=True)
    pair.run(0.1, busy=False)
    assert not pair.verdict().keeps


def test_other_models_are_measured_anew():
    pair = Pair(48.0, 5.1, 2.0)
    pair.run(3, busy=False, models="small")
    pair.run(4, busy=True, models="small")
    assert pair.verdict().takes_back
    pair.run(0.1, busy=True, models="other")
    assert not pair.verdict().takes_back


def test_an_engine_without_a_rate_is_not_waited_for():
    pair = Pair(0.0, 0.0, 10.0)
    pair.run(1, busy=False)
    assert not pair.verdict().keeps
