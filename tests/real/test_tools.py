"""Tools with a small real model, through OpenAI's and Ollama's dialect: on demand.

`TOOLS_MODEL` names the folder of a model that calls tools, such as Qwen2.5-Coder-0.5B-Instruct. Small models
write many calls without their family's marks, and those count.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest

from tests.e2e.conftest import Pipeline, running

pytestmark = [pytest.mark.real, pytest.mark.timeout(1200)]

VARIABLE = "TOOLS_MODEL"
AT_ONCE = 4
MOST_TOKENS = 96
# Of twenty questions, so many must be answered by a call of the right tool: half, because the model is small.
LEAST = 10

WEATHER, TIME = "get_weather", "get_time"


def _tool(name: str, description: str, argument: str, meaning: str) -> dict[str, Any]:
    properties = {argument: {"type": "string", "description": meaning}}
    parameters = {"type": "object", "properties": properties, "required": [argument]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [
    _tool(WEATHER, "Get the current weather in a city.", "city", "The name of the city"),
    _tool(TIME, "Get the current local time in a city.", "city", "The name of the city"),
]
RESULTS = {WEATHER: '{"weather": "sunny", "temperature": 21}', TIME: '{"time": "14:35"}'}
CITIES = ("Paris", "Tokyo", "Cairo", "Lima", "Oslo", "Rome", "Delhi", "Berlin", "Madrid", "Sydney")
QUESTIONS = [(f"What is the weather in {city}?", WEATHER, city) for city in CITIES]
QUESTIONS += [(f"What time is it in {city} now?", TIME, city) for city in CITIES]


class Turn(NamedTuple):
    """What a model answered: the calls with their arguments, the text, and the message as the client sends it back."""

    calls: list[tuple[str, Any]]
    text: str
    notes: list[str]
    message: dict[str, Any]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    folder = os.environ.get(VARIABLE, "")
    if not Path(folder, "config.json").is_file():
        pytest.skip(f"{VARIABLE} names no folder of a model.")
    environ = {"HEADRACE_MODEL": folder, "HEADRACE_OLLAMA_HOST": "none"}
    with running(tmp_path_factory.mktemp("tools"), environ=environ) as running_pipeline:
        yield running_pipeline


def asked_openai(pipeline: Pipeline, messages: list[dict[str, Any]]) -> Turn:
    """A turn of OpenAI's client, streamed."""
    client = openai.OpenAI(base_url=f"{pipeline.http}/v1", api_key="unused", timeout=600, max_retries=0)
    with client.chat.completions.stream(
        model="auto",
        messages=messages,
        tools=TOOLS,
        temperature=0,
        max_tokens=MOST_TOKENS,
        stream_options={"include_usage": True},
    ) as stream:
        completion = stream.get_final_completion()
    message = completion.choices[0].message
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]
    notes = (completion.model_extra or {}).get("headrace", {}).get("notes", [])
    sent = message.model_dump(include={"role", "content"})
    if message.tool_calls:
        sent["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": call.function.arguments},
            }
            for call in message.tool_calls
        ]
    return Turn(calls, message.content or "", notes, sent)


def asked_ollama(pipeline: Pipeline, messages: list[dict[str, Any]]) -> Turn:
    """A turn of a client of Ollama's, whole."""
    options = {"temperature": 0, "num_predict": MOST_TOKENS}
    body = {"model": "auto", "messages": messages, "tools": TOOLS, "stream": False, "options": options}
    answer = httpx.post(f"{pipeline.http}/api/chat", json=body, timeout=600).raise_for_status().json()
    message = answer["message"]
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or ()]
    return Turn(calls, message["content"], answer["headrace"].get("notes", []), message)


def results_openai(turn: Turn) -> list[dict[str, Any]]:
    return [
        {"role": "tool", "tool_call_id": call["id"], "content": RESULTS[call["function"]["name"]]}
        for call in turn.message["tool_calls"]
    ]


def results_ollama(turn: Turn) -> list[dict[str, Any]]:
    return [{"role": "tool", "tool_name": name, "content": RESULTS[name]} for name, _ in turn.calls]


DIALECTS = {"openai": (asked_openai, results_openai), "ollama": (asked_ollama, results_ollama)}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_twenty_questions_with_two_tools(pipeline: Pipeline, dialect: str, figure: Callable[[str], None]) -> None:
    ask, results = DIALECTS[dialect]

    def play(question: str) -> tuple[Turn, Turn | None]:
        messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
        first = ask(pipeline, messages)
        return first, ask(pipeline, [*messages, first.message, *results(first)]) if first.calls else None

    with ThreadPoolExecutor(AT_ONCE) as pool:
        played = list(pool.map(play, [question for question, _, _ in QUESTIONS]))
    called = [first for first, _ in played if first.calls]
    right = [
        first.calls[0] == (tool, {"city": city})
        for (first, _), (_, tool, city) in zip(played, QUESTIONS, strict=True)
        if first.calls
    ]
    answered = [second.text for _, second in played if second is not None and second.text.strip()]
    unmarked = sum(bool(first.notes) for first in called)
    figure(f"{len(called)} of {len(QUESTIONS)} called, {unmarked} of them without marks; {sum(right)} as expected")
    again = sum(bool(second.calls) for _, second in played if second is not None)
    figure(f"{len(answered)} of {len(called)} second turns are text, such as {answered[:1]}; {again} call again")
    for (first, _), (question, _, _) in zip(played, QUESTIONS, strict=True):
        if not first.calls:
            figure(f"no call: {question!r}: {first.text[:120]!r}")
    assert all(isinstance(arguments, dict) for turn in called for _, arguments in turn.calls)
    assert sum(right) >= LEAST
    # A small model often answers the result with another call.
    seconds = [second for _, second in played if second is not None]
    assert all(second.text.strip() or second.calls for second in seconds)
