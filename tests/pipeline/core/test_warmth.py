"""When an internal model is loaded, when it is asked, and when a question is left out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.warmth import KEPT_S, RETRY_S, WarmStep, Warmth


@pytest.fixture
def warmth():
    """A model that is loaded at 0."""
    warmth = Warmth(at_once=3)
    assert warmth.next(0.0) is WarmStep.LOAD
    warmth.loaded(0.0, well=True)
    warmth.ended(0.0, answered=True, late=False)
    return warmth


def test_a_model_is_loaded_before_it_is_asked_and_by_one_question_only():
    warmth = Warmth(at_once=3)
    assert warmth.next(0.0) is WarmStep.LOAD
    assert warmth.next(60.0) is WarmStep.SKIP
    warmth.loaded(90.0, well=True)
    assert warmth.next(90.0) is WarmStep.ASK


def test_questions_are_asked_side_by_side_up_to_a_number(warmth):
    assert [warmth.next(1.0) for _ in range(4)] == [WarmStep.ASK, WarmStep.ASK, WarmStep.ASK, WarmStep.SKIP]
    warmth.ended(2.0, answered=True, late=False)
    assert warmth.next(2.0) is WarmStep.ASK


def test_after_a_late_question_none_is_asked_before_its_end(warmth):
    assert warmth.next(1.0) is WarmStep.ASK
    warmth.late()
    assert warmth.next(2.0) is WarmStep.SKIP
    warmth.ended(9.0, answered=True, late=True)
    assert warmth.next(9.0) is WarmStep.ASK


def test_a_model_that_was_not_asked_for_long_is_loaded_again(warmth):
    assert warmth.next(1.0) is WarmStep.ASK
    warmth.ended(1.0, answered=True, late=False)
    assert warmth.next(1.0 + KEPT_S) is WarmStep.LOAD


def test_a_question_without_an_answer_loads_the_model_again_after_a_pause(warmth):
    assert warmth.next(1.0) is WarmStep.ASK
    warmth.ended(1.0, answered=False, late=False)
    assert warmth.next(1.0) is WarmStep.SKIP
    assert warmth.next(1.0 + RETRY_S) is WarmStep.LOAD


def test_a_load_that_failed_is_tried_again_after_a_pause():
    warmth = Warmth(at_once=3)
    assert warmth.next(0.0) is WarmStep.LOAD
    warmth.loaded(5.0, well=False)
    warmth.ended(5.0, answered=False, late=False)
    assert warmth.next(5.0) is WarmStep.SKIP
    assert warmth.next(5.0 + RETRY_S) is WarmStep.LOAD


@given(st.lists(st.tuples(st.sampled_from(["next", "end", "late"]), st.booleans(), st.floats(0, 200)), max_size=60))
def test_open_questions_are_bounded_and_a_late_one_is_alone_with_those_before_it(steps):
    """`late` is said of a question that is open, as the shell does."""
    warmth, now, asked, late, loading = Warmth(at_once=3), 0.0, 0, 0, False
    for step, well, pause_s in steps:
        now += pause_s
        if step == "next":
            what = warmth.next(now)
            assert what is WarmStep.SKIP or (late == 0 and not loading and asked < 3)
            assert what is not WarmStep.LOAD or asked == 0
            asked += what is not WarmStep.SKIP
            loading = what is WarmStep.LOAD or loading
        elif step == "late" and late < asked:
            warmth.late()
            late += 1
        elif step == "end" and asked:
            if loading:
                warmth.loaded(now, well=well)
                loading = False
            warmth.ended(now, answered=well, late=late > 0)
            asked, late = asked - 1, max(0, late - 1)
