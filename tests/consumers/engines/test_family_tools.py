"""Tool calls of models in the shape of families: one and several, streamed, in reasoning, and in the history."""

from __future__ import annotations

import json
from collections.abc import Iterator

import msgspec
import pytest

from pipeline.wire.answers import FunctionCall, ToolCall
from pipeline.wire.requests import ChatMessage, ChatRequest, FunctionSpec, NamedFunction, NamedToolChoice, Tool
from tests.consumers.engines import families
from tests.consumers.engines.conformance import Answer, work
from tests.consumers.engines.families import Family
from tests.consumers.engines.player import Player

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
    "gpt-oss": (
        "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>" + _WEATHER + "<|call|>",
        "",
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
CLOSED = {"phi": "]<|/tool_call|>", "deepseek": "<｜tool▁calls▁end｜>", "lfm2": "]<|tool_call_end|>"}
# What each writes around reasoning, where the template has not begun it.
_BLOCK = ("<think>\n", "\n</think>\n\n")
THOUGHT = {
    "qwen3": _BLOCK,
    "qwen35": ("", _BLOCK[1]),
    "gpt-oss": ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
    "gemma4": ("<|channel>thought\n", "\n<channel|>"),
    "glm": ("", _BLOCK[1]),
    "deepseek": ("", _BLOCK[1]),
    "mistral": ("[THINK]", "[/THINK]"),
    "lfm2": _BLOCK,
}
ON = {"deepseek": {"think": True}, "mistral": {"reasoning_effort": "high"}}
OPENED = ("qwen35", "glm", "deepseek")
FINE = "The weather is fine."
ONE, TWO, SAID, AFTER_TEXT, AFTER_THOUGHT, BROKEN = range(6)
FAMILIES = [family for family in families.FAMILIES if family.name in CALLS]


def scripts_of(family: Family) -> list[str]:
    first, second = CALLS[family.name]
    call = first + CLOSED.get(family.name, "")
    begun, ended = THOUGHT.get(family.name, ("", ""))
    if family is families.GPT_OSS:
        said, spoken = (
            "<|channel|>final<|message|>" + FINE,
            "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant",
        )
    else:
        said, spoken = FINE, "I look.\n"
    none = ended if family.name in OPENED else ""
    thought = f"{begun}I could write {first if family is not families.GPT_OSS else 'it'}{ended}"
    return [
        none + call,
        none + first + second,
        # After a result of a tool, one template does not open the reasoning.
        said if family is families.DEEPSEEK else none + said,
        none + spoken + call,
        thought + call if ended else call,
        none + call[: len(call) * 7 // 8],
    ]


@pytest.fixture(scope="module")
def player() -> Iterator[Player]:
    with Player() as player:
        yield player


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request) -> Family:
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return family.write(tmp_path_factory.mktemp("families") / family.name, scripts_of(family))


@pytest.fixture
def play(player, family, folder):
    """The answers to requests that play scripts together."""

    def play(*scripts: int, **more) -> list[Answer]:
        return player.together(folder, [work(playing(family, script), **more) for script in scripts])

    return play


def playing(family: Family, script: int) -> ChatRequest:
    return ChatRequest(prompt=f"Play «{script}».", max_tokens=600, tools=TOOLS, **ON.get(family.name, {}))


def told(calls: list[ToolCall]) -> list[tuple[str, object]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


def test_a_call_is_a_call_and_no_text(play):
    (answer,) = play(ONE)
    assert (answer.text, answer.reasoning, told(answer.tool_calls)) == ("", "", [WEATHER])
    assert (answer.finish_reason, answer.notes) == ("tool_calls", [])


def test_several_calls_have_ids_of_their_own(play, family):
    if family is families.GPT_OSS:  # ends its turn with a call
        return
    (answer,) = play(TWO)
    assert (answer.text, told(answer.tool_calls), answer.finish_reason) == ("", [WEATHER, ADD], "tool_calls")
    assert len({call.id for call in answer.tool_calls}) == 2


def test_arguments_come_while_they_are_written(play, family):
    (answer,) = play(ONE)
    parts = [part for part in answer.call_parts if not part.begins]
    if family is families.LLAMA3:  # a call is all that was said, which is known at the end
        assert parts == []
    else:
        assert len(parts) > (2 if family in (families.LFM2, families.GEMMA4) else 10) - 2
        assert all(not part.id and part.function.arguments for part in parts)


def test_text_before_a_call_is_text(play, family):
    (answer,) = play(AFTER_TEXT)
    if family is families.LLAMA3:
        assert (answer.text[:7], answer.tool_calls) == ("I look.", [])
    else:
        assert (answer.text.strip(), told(answer.tool_calls)) == ("I look.", [WEATHER])


def test_a_call_within_reasoning_is_no_call(play, family):
    (answer,) = play(AFTER_THOUGHT)
    assert told(answer.tool_calls) == [WEATHER]
    if family.name in THOUGHT:
        assert answer.reasoning.startswith("I could write ")


def test_a_call_that_breaks_off_leaves_no_marks_of_structure(play, family):
    (answer,) = play(BROKEN)
    assert answer.finish_reason in ("tool_calls", "stop")
    assert answer.text or answer.tool_calls
    if answer.tool_calls:
        assert answer.text == ""


def forced(family: Family, script: int, **more) -> ChatRequest:
    return msgspec.structs.replace(playing(family, script), tool_choice="required", **more)


def test_a_call_that_is_forced_is_the_models_own(player, family, folder):
    requests = [forced(family, script) for script in (ONE, AFTER_THOUGHT)]
    plain, thought = player.together(folder, [work(request) for request in requests])
    assert (plain.text, told(plain.tool_calls), plain.finish_reason) == ("", [WEATHER], "tool_calls")
    assert (thought.text, told(thought.tool_calls), thought.finish_reason) == ("", [WEATHER], "tool_calls")
    assert bool(thought.reasoning) == (family.name in THOUGHT)


def test_several_calls_can_be_forced(player, family, folder):
    if family is families.GPT_OSS:  # ends its turn with a call
        return
    (answer,) = player.together(folder, [work(forced(family, TWO))])
    assert (answer.text, told(answer.tool_calls), answer.finish_reason) == ("", [WEATHER, ADD], "tool_calls")


def test_a_forced_call_goes_on_after_its_reasoning_and_in_its_midst(player, family, folder):
    (whole,) = player.together(folder, [work(forced(family, AFTER_THOUGHT))])
    arguments = "".join(part.function.arguments for part in whole.call_parts)
    for cut in range(1, len(whole.token_ids), 11):
        (rest,) = player.together(folder, [work(forced(family, AFTER_THOUGHT), resume_tokens=whole.token_ids[:cut])])
        assert rest.token_ids == whole.token_ids[cut:]
        assert arguments.endswith("".join(part.function.arguments for part in rest.call_parts))


UNITS = ["celsius", "kelvin"]
CHOICES = {"unit": {"enum": UNITS, "type": "string"}, "on": {"type": "boolean"}, "any": {"type": "null"}}
SWITCH = Tool(
    function=FunctionSpec("switch", parameters={"type": "object", "properties": CHOICES, "required": ["unit", "on"]})
)


def test_a_model_that_would_answer_is_made_to_call(player, family, folder):
    if family is families.GPT_OSS:  # its reasoning takes any text, and this model would write without end
        return
    named = NamedToolChoice(NamedFunction("switch"))
    request = ChatRequest(
        prompt=f"Play «{SAID}».", max_tokens=400, tools=[*TOOLS, SWITCH], tool_choice=named, think=False
    )
    (answer,) = player.together(folder, [work(request)])
    assert (answer.text, answer.finish_reason) == ("", "tool_calls")
    ((name, arguments),) = told(answer.tool_calls)
    assert name == "switch"
    assert isinstance(arguments, dict)
    assert arguments["unit"] in UNITS
    assert arguments["on"] in (True, False)


def test_a_batch_calls_as_one_alone_does(play):
    alone = [play(script)[0] for script in (ONE, TWO)]
    together = play(ONE, TWO, ONE, TWO)
    assert [(a.text, told(a.tool_calls)) for a in together] == [(a.text, told(a.tool_calls)) for a in alone] * 2


def test_an_answer_goes_on_in_the_midst_of_a_call(play):
    (whole,) = play(TWO)
    arguments = "".join(part.function.arguments for part in whole.call_parts)
    for cut in range(1, len(whole.token_ids), 9):
        (rest,) = play(TWO, resume_tokens=whole.token_ids[:cut])
        written = "".join(part.function.arguments for part in rest.call_parts)
        assert arguments.endswith(written)
        assert rest.token_ids == whole.token_ids[cut:]
        assert rest.finish_reason == whole.finish_reason


def test_a_conversation_with_calls_and_results_is_taken(player, family, folder, play):
    one, two = play(ONE, TWO)
    kept = [one.tool_calls, two.tool_calls, [foreign(call) for call in two.tool_calls], [broken(one.tool_calls[0])]]
    answers = player.together(folder, [work(with_results(family, calls)) for calls in kept])
    assert [(answer.text, answer.finish_reason) for answer in answers] == [(FINE, "stop")] * len(kept)


def with_results(family: Family, calls: list[ToolCall]) -> ChatRequest:
    results = [ChatMessage(role="tool", tool_call_id=call.id, content=f"sunny «{SAID}»") for call in calls]
    asked = ChatMessage(role="user", content="What is the weather?")
    turns = [asked, ChatMessage(role="assistant", content="", tool_calls=calls), *results]
    return ChatRequest(messages=turns, tools=TOOLS, max_tokens=400, **ON.get(family.name, {}))


def foreign(call: ToolCall) -> ToolCall:
    """The call with an id as another server makes it."""
    return ToolCall(FunctionCall(call.function.name, call.function.arguments), f"call_{call.id}_abcdefghijkl")


def broken(call: ToolCall) -> ToolCall:
    """The call with arguments that are no JSON."""
    return ToolCall(FunctionCall(call.function.name, call.function.arguments[:-1]), call.id)


def test_a_call_without_marks_is_noted(player, tmp_path):
    script = '```json\n{"name": "add", "arguments": {"a": 1}}\n```'
    other = '{"name": "other", "arguments": {"a": 1}}'
    folder = families.QWEN3.write(tmp_path / "qwen3", [script, other])
    taken, left = player.together(folder, [work(playing(families.QWEN3, index)) for index in (0, 1)])
    assert (taken.text, told(taken.tool_calls), taken.finish_reason) == ("", [ADD], "tool_calls")
    assert taken.notes == ["The model wrote its call of `add` as plain text. It is taken as a tool call."]
    assert (left.text, left.tool_calls, left.finish_reason, left.notes) == (other, [], "stop", [])
