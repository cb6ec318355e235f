"""The demo model's curriculum teaches right answers, and what trains the model makes the files that are shipped."""

import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.demo_model import curriculum, lexicon, offtopic, phrases, stories
from bench.demo_model.curriculum import Draw, Lesson
from consumers.demo_model import PATH

DRAWS = st.builds(Draw, st.integers(0, 2**32).map(random.Random), st.booleans())


def question(lesson: Lesson) -> str:
    return str(lesson.messages[-2]["content"])


def answer(lesson: Lesson) -> str:
    return str(lesson.messages[-1]["content"])


def whole_numbers(text: str) -> list[int]:
    return [int(found) for found in re.findall(r"\d+", text)]


@settings(deadline=None)
@given(DRAWS)
def test_a_taught_sum_is_the_sum(draw: Draw) -> None:
    lesson = curriculum.addition(draw)
    left, right, total = whole_numbers(answer(lesson))
    assert whole_numbers(question(lesson)) == [left, right]
    assert left + right == total


@settings(deadline=None)
@given(DRAWS)
def test_a_taught_count_goes_by_ones_between_the_numbers_asked_for(draw: Draw) -> None:
    lesson = curriculum.counting(draw)
    asked, counted = whole_numbers(question(lesson)), whole_numbers(answer(lesson))
    first, last = asked if len(asked) == 2 else (1, asked[0])
    assert (counted[0], counted[-1]) == (first, last)
    assert all(abs(after - before) == 1 for before, after in itertools.pairwise(counted))
    assert len(counted) == abs(last - first) + 1


@settings(deadline=None)
@given(DRAWS)
def test_a_taught_spelling_joins_to_the_word(draw: Draw) -> None:
    lesson = curriculum.spelling(draw)
    assert answer(lesson).replace(" ", "") in question(lesson)


@settings(deadline=None)
@given(DRAWS)
def test_a_taught_repetition_is_in_its_question(draw: Draw) -> None:
    lesson = curriculum.repeating(draw)
    assert question(lesson).endswith(answer(lesson))


@settings(deadline=None)
@given(DRAWS)
def test_a_taught_call_names_a_declared_tool_and_its_parameter(draw: Draw) -> None:
    lesson = curriculum.weather_call(draw)
    call = lesson.messages[-1]["tool_calls"][0]["function"]
    declared = {tool["function"]["name"]: tool["function"]["parameters"]["properties"] for tool in lesson.tools}
    assert call["arguments"].keys() <= declared[call["name"]].keys()


@settings(deadline=None)
@given(DRAWS)
def test_a_taught_weather_sentence_holds_what_the_tool_returned(draw: Draw) -> None:
    lesson = curriculum.weather_result(draw)
    returned = lesson.messages[-2]["content"]
    values = json.loads(returned).values() if returned.startswith("{") else [returned]
    told = answer(lesson)
    assert all(str(value) in told for value in values if value not in ("celsius", "C"))


@settings(deadline=None)
@given(DRAWS)
def test_what_was_not_taught_is_answered_honestly_in_its_language(draw: Draw) -> None:
    lesson = curriculum.off_topic(draw)
    assert answer(lesson) == stories.HONEST["ru" if offtopic.is_russian(question(lesson)) else "en"]


def test_held_out_phrasings_are_not_trained_on() -> None:
    everything = [value for value in vars(phrases).values() if isinstance(value, dict) and "en" in value]
    assert everything
    for ways in everything:
        for language in ("en", "ru"):
            assert not set(ways[language].trained) & set(ways[language].held_out)


def test_held_out_words_and_places_are_not_trained_on() -> None:
    known = {country.name for country in lexicon.COUNTRIES} | set(lexicon.UNKNOWN_PLACES)
    assert not known & set(lexicon.UNKNOWN_PLACES_HELD_OUT)
    assert not set(lexicon.WORDS) & set(lexicon.WORDS_HELD_OUT)
    assert not set(lexicon.WORDS_RU) & set(lexicon.WORDS_RU_HELD_OUT)


def test_the_same_seed_draws_the_same_conversations() -> None:
    first, second = (Draw(random.Random(7)) for _ in range(2))
    assert [curriculum.conversation(first) for _ in range(50)] == [curriculum.conversation(second) for _ in range(50)]


def test_the_model_was_trained_on_what_its_chat_template_renders() -> None:
    utils = pytest.importorskip("mlx_lm.utils", reason="MLX is not installed")
    from bench.demo_model.make import Renderer

    tokenizer = utils.load_tokenizer(PATH)
    render, draw = Renderer(), Draw(random.Random(3))
    for _ in range(200):
        lesson = curriculum.conversation(draw)
        tools = list(lesson.tools) or None
        rendered = tokenizer.apply_chat_template(list(lesson.messages), tools=tools, tokenize=False)
        assert render(lesson) == rendered


def test_a_stage_of_the_training_writes_a_model_like_the_one_that_is_shipped(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm", reason="MLX is not installed")
    options = ["--start", str(PATH), "--steps", "1", "--batch", "1"]
    command = [sys.executable, "-m", "bench.demo_model.make", str(tmp_path), *options]
    subprocess.run(command, cwd=Path(__file__).parents[3], check=True, capture_output=True)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in PATH.iterdir()}
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (PATH / name).read_bytes(), name
