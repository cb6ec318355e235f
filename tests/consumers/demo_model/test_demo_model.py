"""The demo model that is shipped answers right."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from bench.demo_model import probes, stories
from consumers.demo_model import MODEL_NAME, PATH


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
