"""Tool calls of models in the shape of families, in the engine's process."""

from __future__ import annotations

import asyncio
import json

import pytest

from consumers.engines.local.process import EngineProcess
from pipeline.config import Config
from pipeline.wire.messages import FunctionCall, ToolCall
from pipeline.wire.requests import ChatMessage, ChatRequest, FunctionSpec, Tool
from tests.consumers.engines import families
from tests.consumers.engines.conformance import ask, until_ready
from tests.consumers.engines.families import Family
from tests.consumers.engines.processes import engine_of

pytest.importorskip("mlx_lm", reason="MLX is not installed")

PROPERTIES = {"city": {"type": "string"}, "days": {"type": "integer"}}
TOOLS = [
    Tool(function=FunctionSpec("get_weather", parameters={"type": "object", "properties": PROPERTIES})),
    Tool(function=FunctionSpec("add", parameters={"type": "object", "properties": {"a": {"type": "integer"}}})),
]
WEATHER = ("get_weather", {"city": 'Paris – "Ville"', "days": 3})
ADD = ("add", {"a": 1})
_WEATHER = json.dumps(WEATHER[1], ensure_ascii=False)
_HERMES = '<tool_call>\n{"name": "get_weather", "arguments": ' + _WEATHER + "}\n</tool_call>"

# How each family writes the two calls.
CALLS: dict[str, tuple[str, str]] = {
    "qwen3": (_HERMES, '\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'),
    "qwen35": (
        (
            '<tool_call>\n<function=get_weather>\n<parameter=city>\nParis – "Ville"\n</parameter>\n'
            "<parameter=days>\n3\n"
            "</parameter>\n</function>\n</tool_call>"
        ),
        "\n<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
    ),
    "gemma4": (
        '<|tool_call>call:get_weather{city:<|"|>Paris – "Ville"<|"|>,days:3}<tool_call|>',
        "<|tool_call>call:add{a:1}<tool_call|>",
    ),
    "glm": (
        (
            '<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris – "Ville"</arg_value>'
            "<arg_key>days</arg_key><arg_value>3</arg_value></tool_call>"
        ),
        "<tool_call>add<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>",
    ),
    "deepseek": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>" + _WEATHER + "<｜tool▁call▁end｜>",
        '<｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    ),
    "mistral": ("[TOOL_CALLS]get_weather[ARGS]" + _WEATHER, '[TOOL_CALLS]add[ARGS]{"a": 1}'),
    "llama3": (
        '{"name": "get_weather", "parameters": ' + _WEATHER + "}",
        '; {"name": "add", "parameters": {"a": 1}}',
    ),
    "phi": (
        '<|tool_call|>[{"name": "get_weather", "arguments": ' + _WEATHER + "}",
        ', {"name": "add", "arguments": {"a": 1}}]<|/tool_call|>',
    ),
    "lfm2": (
        '<|tool_call_start|>[get_weather(city="Paris – \\"Ville\\"", days=3)',
        ", add(a=1)]<|tool_call_end|>",
    ),
}
FAMILIES = [family for family in families.FAMILIES if family.name in CALLS]
each = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
CLOSED = {"phi": "]<|/tool_call|>", "deepseek": "<｜tool▁calls▁end｜>", "lfm2": "]<|tool_call_end|>"}


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", families.scripted_path())


def engine_with(folder) -> EngineProcess:
    return engine_of(Config(engine="mlx", model=str(folder), step_timeout_s=30.0))


def play(index: int, **options) -> ChatRequest:
    return ChatRequest(prompt=f"Play «{index}».", max_tokens=400, tools=TOOLS, **options)


def told(calls: list[ToolCall]) -> list[tuple[str, object]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


@each
async def test_a_family_calls_tools(tmp_path, family: Family):
    """One call, two, text before one, and the second turn."""
    one, two = CALLS[family.name]
    closed = CLOSED.get(family.name, "")
    scripts = [one + closed, one + two, "The weather is fine.", f"I look it up.\n{one}{closed}"]
    async with engine_with(family.write(tmp_path / family.name, scripts)) as engine:
        await until_ready(engine)
        single, both, before = await asyncio.gather(*(ask(engine, play(index)) for index in (0, 1, 3)))
        assert (single.text, told(single.tool_calls), single.finish_reason) == ("", [WEATHER], "tool_calls")
        assert (both.text, told(both.tool_calls), both.finish_reason) == ("", [WEATHER, ADD], "tool_calls")
        assert len({call.id for call in both.tool_calls}) == 2
        if family.name != "llama3":  # a call of its kind is all that is said
            assert (before.text.strip(), told(before.tool_calls)) == ("I look it up.", [WEATHER])

        for calls in (single.tool_calls, both.tool_calls, [foreign(call) for call in both.tool_calls]):
            results = [
                ChatMessage(role="tool", tool_call_id=call.id, content=f"sunny «2» {index}")
                for index, call in enumerate(calls)
            ]
            turns = [
                ChatMessage(role="user", content="What is the weather?"),
                ChatMessage(role="assistant", content="", tool_calls=calls),
                *results,
            ]
            answer = await ask(engine, ChatRequest(messages=turns, tools=TOOLS, max_tokens=400))
            assert (answer.text, answer.finish_reason) == ("The weather is fine.", "stop")


def foreign(call: ToolCall) -> ToolCall:
    """The call with an id as another server makes it."""
    return ToolCall(FunctionCall(call.function.name, call.function.arguments), f"call_{call.id}_abcdefghijkl")


@each
async def test_arguments_come_as_they_are_written(tmp_path, family: Family):
    one, two = CALLS[family.name]
    async with engine_with(family.write(tmp_path / family.name, [one + two])) as engine:
        await until_ready(engine)
        answer = await ask(engine, play(0))
    assert told(answer.tool_calls) == [WEATHER, ADD]


async def test_a_call_without_marks_is_noted(tmp_path):
    script = '```json\n{"name": "add", "arguments": {"a": 1}}\n```'
    other = '{"name": "other", "arguments": {"a": 1}}'
    folder = families.QWEN3.write(tmp_path / "qwen3", [script, other])
    async with engine_with(folder) as engine:
        await until_ready(engine)
        taken, left = await asyncio.gather(ask(engine, play(0)), ask(engine, play(1)))
    assert (taken.text, told(taken.tool_calls), taken.finish_reason) == ("", [ADD], "tool_calls")
    assert (left.text, left.tool_calls, left.finish_reason) == (other, [], "stop")
