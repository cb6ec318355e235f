"""A server's speed is what it counted, decayed alike in tokens and seconds, and unknown before that."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.server_pace import ModelPace, ServerPace, Timing

LOADED = frozenset({"m"})


def answered(pace, key, began_at, timing, *, model="m", parts=0):
    pace.begun(key, model, began_at, limit=512)
    first_at = began_at + timing.loading_s + timing.reading_s
    for number in range(parts or timing.tokens):
        pace.part(key, first_at + number * timing.writing_s / max(1, timing.tokens))
    ended_at = first_at + timing.writing_s
    pace.ended(key, ended_at, timing)
    return ended_at


def test_nothing_is_known_before_the_first_answer():
    assert ServerPace().pace("m", 0.0) == ModelPace()


@given(st.integers(20, 400), st.floats(5, 100))
def test_the_rate_is_the_servers_own_however_long_the_answers_are(tokens, per_s):
    pace, now = ServerPace(), 0.0
    for number in range(6):
        timing = Timing(tokens, tokens / per_s, prompt_tokens=40, reading_s=0.5)
        now = answered(pace, str(number), now, timing) + 1000.0
    found = pace.pace("m", now)
    assert found.tokens_per_s == pytest.approx(per_s, rel=0.01)
    assert found.prompt_tokens_per_s == pytest.approx(80)
    assert found.tokens_per_request == pytest.approx(tokens)


def test_a_short_answer_weighs_as_little_as_it_took():
    pace = ServerPace()
    now = answered(pace, "a", 0.0, Timing(100, 10.0))
    now = answered(pace, "b", now, Timing(1, 0.00005))
    assert pace.pace("m", now).tokens_per_s == pytest.approx(10, rel=0.02)


def test_a_new_speed_is_followed_within_some_answers():
    pace, now = ServerPace(), 0.0
    for number in range(20):
        now = answered(pace, f"a{number}", now, Timing(100, 5.0))
    for number in range(8):
        now = answered(pace, f"b{number}", now, Timing(100, 20.0))
    assert pace.pace("m", now).tokens_per_s == pytest.approx(5, rel=0.1)


def test_answers_side_by_side_count_together_and_one_of_them_alone():
    pace = ServerPace()
    for key in "ab":
        pace.begun(key, "m", 0.0, limit=100)
    for key in "ab":
        pace.part(key, 1.0)
    for key in "ab":
        pace.ended(key, 11.0, Timing(100, 10.0))
    found = pace.pace("m", 11.0)
    assert found.tokens_per_s == pytest.approx(20)
    assert found.answer_tokens_per_s == pytest.approx(10)


def test_a_running_answer_shows_a_speed_before_it_ends():
    pace = ServerPace()
    pace.begun("a", "m", 0.0, limit=100)
    for number in range(4):
        pace.part("a", 5.0 + number / 10)
    assert pace.pace("m", 5.4).tokens_per_s == 0, "too few parts"
    for number in range(4, 21):
        pace.part("a", 5.0 + number / 10)
    assert pace.pace("m", 7.0).tokens_per_s == pytest.approx(10)
    assert pace.rest_s("a", 7.0) == pytest.approx(7.9)


def test_a_model_that_must_be_loaded_first_is_unknown_until_its_loading_was_measured():
    pace = ServerPace()
    now = answered(pace, "a", 0.0, Timing(100, 10.0))
    pace.loaded(frozenset())
    assert pace.pace("m", now) == ModelPace()
    now = answered(pace, "b", now, Timing(100, 10.0, loading_s=8.0))
    assert pace.pace("m", now).loading_s == 0
    pace.loaded(frozenset())
    assert pace.pace("m", now).loading_s == 8
    pace.begun("c", "m", now, limit=100)
    assert pace.pace("m", now + 3).loading_s == 5
    pace.part("c", now + 4)
    assert pace.pace("m", now + 4).loading_s == 0


def test_each_model_has_figures_of_its_own():
    pace = ServerPace()
    now = answered(pace, "a", 0.0, Timing(100, 10.0))
    now = answered(pace, "b", now, Timing(100, 2.0), model="other")
    assert pace.pace("m", now).tokens_per_s == pytest.approx(10)
    assert pace.pace("other", now).tokens_per_s == pytest.approx(50)


def test_what_is_left_is_the_mean_less_what_has_come_and_never_nothing():
    pace = ServerPace()
    now = answered(pace, "a", 0.0, Timing(50, 5.0, prompt_tokens=40, reading_s=1.0))
    pace.begun("b", "m", now, limit=30)
    assert pace.left("b") == (30, 40)
    assert pace.rest_s("b", now) == pytest.approx(1 + 3)
    for _ in range(40):
        pace.part("b", now + 1)
    assert pace.left("b") == (1, 0)
    assert pace.left("gone") == (0, 0)


def test_the_rest_of_an_unknown_model_is_unknown():
    pace = ServerPace()
    pace.begun("a", "m", 0.0, limit=30)
    assert pace.rest_s("a", 1.0) == math.inf


def test_an_answer_that_broke_off_changes_no_figure():
    pace = ServerPace()
    now = answered(pace, "a", 0.0, Timing(50, 5.0))
    pace.begun("b", "m", now, limit=30)
    pace.ended("b", now + 60, None)
    assert pace.pace("m", now + 60).tokens_per_s == pytest.approx(10)
    assert pace.in_flight == 0


@given(st.randoms(use_true_random=False))
def test_random_histories_never_give_a_speed_that_no_answer_had(chance: random.Random):
    pace, now, speeds = ServerPace(), 0.0, []
    for number in range(30):
        tokens, per_s = chance.randint(1, 300), chance.uniform(2, 80)
        speeds.append(per_s)
        now = answered(pace, str(number), now, Timing(tokens, tokens / per_s)) + chance.uniform(0, 100)
        assert min(speeds) * 0.999 <= pace.pace("m", now).tokens_per_s <= max(speeds) * 1.001


def test_a_server_that_reports_counts_alone_is_timed_by_its_parts():
    pace = ServerPace()
    for number in range(3):
        began_at = 100.0 * number
        pace.begun(str(number), "m", began_at, limit=512)
        for part in range(11):
            pace.part(str(number), began_at + 2.0 + part * 0.1)
        pace.ended(str(number), began_at + 3.0, Timing(44, None, prompt_tokens=50))
        found = pace.pace("m", began_at + 3.0)
        # 40 of the 44 tokens were written between the first part and the last.
        assert found.tokens_per_s == pytest.approx(40)
        # The first prompt may have waited until the model was loaded.
        assert found.prompt_tokens_per_s == pytest.approx(25 if number else 0)
    assert (found.tokens_per_request, found.prompt_tokens_per_request) == (44, 50)


def test_an_answer_in_one_part_shows_no_speed():
    pace = ServerPace()
    pace.begun("a", "m", 0.0, limit=512)
    pace.part("a", 5.0)
    pace.ended("a", 5.0, Timing(40, None))
    assert pace.pace("m", 5.0).tokens_per_s == 0
    assert pace.pace("m", 5.0).tokens_per_request == 40
