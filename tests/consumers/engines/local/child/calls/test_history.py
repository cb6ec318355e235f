"""Which form of earlier calls a chat template takes, and conversations in that form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from consumers.engines.local.child.calls.history import CallHistory, Turn, history_of
from consumers.engines.local.child.calls.writing import write_each, write_list, write_python
from consumers.engines.local.child.checks import template_messages
from pipeline.wire.decoding import decode_chat
from tests.consumers.engines import families
from tests.consumers.engines.families import Family

CITY, NUMBER, RESULTS = "Lima-1", 4711, ("sunny-1", "sum-2")
CALLS: list[Turn] = [
    {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": CITY}}},
    {"id": "call_2", "type": "function", "function": {"name": "add", "arguments": {"a": NUMBER}}},
]


def conversation(said: str = "") -> list[Turn]:
    return [
        {"role": "user", "content": "Asked."},
        {"role": "assistant", "content": said, "tool_calls": CALLS},
        {"role": "tool", "tool_call_id": "call_1", "content": RESULTS[0]},
        {"role": "tool", "tool_call_id": "call_2", "content": RESULTS[1]},
    ]


class Template:
    """A chat template that writes each turn as a line: its role, and what `show` makes of it."""

    def __init__(self, show: Any) -> None:
        self._show = show

    def __call__(self, turns: list[Turn], **_: Any) -> str:
        return "\n".join(f"{turn['role']}: {self._show(turn)}" for turn in turns)


def shown(turn: Turn, calls: list[Turn]) -> str:
    return f"{turn['content']} {json.dumps([call['function'] for call in calls])}"


def everything(turn: Turn) -> str:
    return shown(turn, turn.get("tool_calls", []))


def the_first_call(turn: Turn) -> str:
    return shown(turn, turn.get("tool_calls", [])[:1])


def calls_or_text(turn: Turn) -> str:
    return json.dumps([call["function"] for call in turn["tool_calls"]]) if "tool_calls" in turn else turn["content"]


def calls_if_content_is_null(turn: Turn) -> str:
    if turn["content"] is not None:
        return str(turn["content"])
    return " ".join("```" + call["function"]["arguments"] + "```" for call in turn["tool_calls"])


def no_calls(turn: Turn) -> str:
    return str(turn["content"])


def objects_alone(turn: Turn) -> str:
    calls = turn.get("tool_calls", [])
    return shown(turn, [call for call in calls if isinstance(call["function"]["arguments"], dict)])


@pytest.mark.parametrize(
    ("show", "form"),
    [
        (everything, CallHistory()),
        (the_first_call, CallHistory(single=True)),
        (calls_or_text, CallHistory(apart=True)),
        (calls_if_content_is_null, CallHistory(text=True, null=True, apart=True)),
        (objects_alone, CallHistory(wrapped=True)),
        (no_calls, CallHistory()),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_form_is_the_one_in_which_nothing_is_lost(show, form):
    assert history_of(Template(show)) == form


@pytest.mark.parametrize(
    "show", [everything, the_first_call, calls_or_text, calls_if_content_is_null, objects_alone, no_calls]
)
def test_a_conversation_in_that_form_loses_nothing(show):
    template = Template(show)
    text = template(history_of(template, write_list("<call>", "</call>")).rewritten(conversation("I look.")))
    assert [needle for needle in ("I look.", CITY, str(NUMBER), *RESULTS) if needle not in text] == []


def test_names_in_the_tools_are_not_taken_for_calls():
    def template(turns: list[Turn], tools: Any) -> str:
        return json.dumps(tools) + Template(no_calls)(turns)

    assert history_of(template, write_each("", "")).write is not None


def test_calls_are_written_as_models_write_them():
    calls: list[tuple[str, Any]] = [("f", {"city": 'é"', "on": True, "none": None}), ("g", {})]
    first, second = (
        '{"name": "f", "arguments": {"city": "é\\"", "on": true, "none": null}}',
        '{"name": "g", "arguments": {}}',
    )
    assert write_list("<", ">")(calls) == f"<[{first}, {second}]>"
    assert write_each("<", ">")(calls) == f"<{first}>\n<{second}>"
    assert write_python("<", ">")(calls) == '<[f(city="é\\"", on=True, none=None), g()]>'


FAMILIES = [family for family in families.FAMILIES if family is not families.DEEPSEEK_R1]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_template_of_each_family_loses_no_call_and_no_result(family: Family, tmp_path: Path):
    pytest.importorskip("mlx_lm", reason="MLX is not installed")
    from mlx_lm.tokenizer_utils import load

    from consumers.engines.local.child.calls.model import ModelCalls

    tokenizer = load(family.write(tmp_path, []))
    turns = ModelCalls(tokenizer).history.rewritten(conversation())
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert [needle for needle in (CITY, str(NUMBER), *RESULTS) if needle not in text] == []


def nine_everywhere(turn: Turn) -> str:
    ids = [call["id"] for call in turn.get("tool_calls", [])]
    ids += [turn["tool_call_id"]] if turn["role"] == "tool" else []
    assert all(len(one) == 9 for one in ids)
    return everything(turn)


def test_results_of_a_history_without_ids_have_those_that_the_template_takes():
    call = {"function": {"name": "f", "arguments": "{}"}}
    history = [
        {"role": "user", "content": "Asked."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "f", "content": RESULTS[0]},
    ]
    template = Template(nine_everywhere)
    request = decode_chat(json.dumps({"messages": history}).encode(), max_body_bytes=1 << 20)
    turns = history_of(template).rewritten(template_messages(request.chat))
    assert RESULTS[0] in template(turns)
    assert turns[1]["tool_calls"][0]["id"] == turns[2]["tool_call_id"]
