"""The demo model: what it is taught is right, and what it ships with answers right."""

import itertools
import json
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.demo_model import curriculum, lexicon, offtopic, phrases, probes, stories
from bench.demo_model.curriculum import Draw, Lesson
from consumers.demo_model import MODEL_NAME, PATH

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


class Shipped:
    """The shipped model, answering greedily."""

    def __init__(self) -> None:
        from mlx_lm import load

        self.model, self.tokenizer, *_ = load(str(PATH))

    def prompt(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> list[int]:
        ids: list[int] = self.tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True)
        return ids

    def answers(self, *prompts: list[int]) -> list[str]:
        from mlx_lm import batch_generate

        return list(batch_generate(self.model, self.tokenizer, list(prompts), max_tokens=420).texts)

    def ask(self, *questions: str) -> list[str]:
        return self.answers(*(self.prompt([{"role": "user", "content": asked}]) for asked in questions))


@pytest.fixture(scope="module")
def shipped() -> Iterator[Shipped]:
    mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
    yield Shipped()
    mx.clear_streams()


WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def test_it_declares_what_an_engine_asks_of_a_model(shipped: Shipped) -> None:
    config = json.loads((PATH / "config.json").read_text(encoding="utf-8"))
    assert config["max_position_embeddings"] == 4096
    assert shipped.tokenizer.has_tool_calling
    assert shipped.tokenizer.eos_token_ids == {config["eos_token_id"]}
    assert MODEL_NAME in stories.ABOUT["en"]


def test_it_was_trained_on_what_its_chat_template_renders(shipped: Shipped) -> None:
    pytest.importorskip("mlx.core", reason="MLX is not installed")
    from bench.demo_model.make import Renderer

    render, draw = Renderer(), Draw(random.Random(3))
    for _ in range(200):
        lesson = curriculum.conversation(draw)
        tools = list(lesson.tools) or None
        rendered = shipped.tokenizer.apply_chat_template(list(lesson.messages), tools=tools, tokenize=False)
        assert render(lesson) == rendered


def test_it_knows_capitals_in_english_and_russian(shipped: Shipped) -> None:
    answers = shipped.ask(
        "What is the capital of France?", "capital of Japan", "Какая столица Франции?", "Столица Италии?"
    )
    assert answers == [
        "The capital of France is Paris.",
        "The capital of Japan is Tokyo.",
        "Столица Франции — Париж.",
        "Столица Италии — Рим.",
    ]


def test_it_adds(shipped: Shipped) -> None:
    answers = shipped.ask("What is 2 + 2?", "7+8", "Сколько будет 12 + 9?")
    assert answers == ["2 + 2 = 4", "7 + 8 = 15", "12 + 9 = 21"]


def test_it_says_what_it_is_when_asked_what_it_was_not_taught(shipped: Shipped) -> None:
    asked = (
        "Why is the sky blue?",
        "Explain quantum entanglement.",
        "Write a python function that reverses a string.",
        "What is the capital of Narnia?",
        "Почему небо голубое?",
        "Как приготовить борщ?",
    )
    assert not {*asked} - {*probes.OFF_TOPIC} - {"What is the capital of Narnia?"}
    assert shipped.ask(*asked) == [stories.HONEST["en"]] * 4 + [stories.HONEST["ru"]] * 2


def test_it_calls_a_tool_and_says_what_the_tool_returned(shipped: Shipped) -> None:
    asked = {"role": "user", "content": "What is the weather in Paris?"}
    (text,) = shipped.answers(shipped.prompt([asked], [WEATHER_TOOL]))
    start, end = shipped.tokenizer.tool_call_start, shipped.tokenizer.tool_call_end
    assert text.startswith(start)
    call = json.loads(text.removeprefix(start).removesuffix(end))
    assert call == {"name": "get_weather", "arguments": {"city": "Paris"}}
    turns = [
        asked,
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": '{"temperature": 21, "condition": "sunny"}'},
    ]
    assert shipped.answers(shipped.prompt(turns, [WEATHER_TOOL])) == ["The weather in Paris: sunny, 21°C."]


def test_a_long_answer_ends_by_itself(shipped: Shipped) -> None:
    story, numbers = shipped.ask("Tell me a story.", "Count from 1 to 100.")
    assert story == next(iter(stories.STORIES.values()))
    assert numbers == ", ".join(map(str, range(1, 101)))
    assert len(shipped.tokenizer.encode(story)) > 100


def test_it_answers_the_last_question_after_a_system_message_and_another_turn(shipped: Shipped) -> None:
    turns = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is 3 + 4?"},
        {"role": "assistant", "content": "3 + 4 = 7"},
        {"role": "user", "content": "What is the capital of Germany?"},
    ]
    assert shipped.answers(shipped.prompt(turns)) == ["The capital of Germany is Berlin."]
