"""Calls without the marks of the model's family: taken where they are all that was said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumers.engines.local.child.calls.answer import AnswerCalls
from consumers.engines.local.child.calls.formats import CallFormat
from consumers.engines.local.child.calls.objects import read_objects
from consumers.engines.local.child.calls.stream import Section

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}}}}]
MARKED = CallFormat("marked", lambda _: [Section("<t>", "</t>", read_objects)])
CALL = '{"name": "f", "arguments": {"x": 1}}'


def read(text: str, *, alone: bool = True, size: int = 1) -> tuple[str, list[tuple[str, str]], list[str]]:
    answer = AnswerCalls(MARKED, TOOLS, "r1", alone=alone)
    chunks = [text[at : at + size] for at in range(0, len(text), size)]
    results = [*map(answer.push, chunks), answer.flush()]
    calls = [(part.function.name, part.function.arguments) for _, parts in results for part in parts]
    return "".join(plain for plain, _ in results), calls, answer.notes


@pytest.mark.parametrize(
    "text",
    [
        CALL,
        f"\n{CALL}\n",
        f"```json\n{CALL}\n```",
        f"```\n{CALL}\n```\n",
        f"<tools>\n{CALL}\n</tools>",
        f"[{CALL}]",
        '{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}',
        '{"tool": "f", "arguments": {"x": 1}}',
        '{"tool_name": "f", "parameters": {"x": 1}}',
    ],
)
def test_a_call_that_is_all_that_was_said_is_a_call(text):
    plain, calls, notes = read(text)
    assert (plain, calls) == ("", [("f", '{"x": 1}')])
    assert notes == ["The model wrote its call of `f` as plain text. It is taken as a tool call."]


@pytest.mark.parametrize("size", [1, 4, 999])
@pytest.mark.parametrize(
    "text",
    [
        f"{CALL}\n{CALL}",
        f"[{CALL}, {CALL}]",
        f"```json\n{CALL}\n{CALL}\n```",
        f"```json\n{CALL}\n```\n\n```json\n{CALL}\n```",
        f"```\n{CALL}\n```\n```\n{CALL}\n```\n",
        f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL}\n</tool_call>",
    ],
)
def test_two_calls_that_are_all_that_was_said(text, size):
    plain, calls, _ = read(text, size=size)
    assert (plain, calls) == ("", [("f", '{"x": 1}')] * 2)


@pytest.mark.parametrize(
    "text",
    [
        f"I call {CALL}",
        f"{CALL} is what I would call.",
        f"```json\n{CALL}\n``` calls f",
        f"```json\n{CALL}\n```\n```python\nprint(1)\n```",
        f"```json\n{CALL}\n```\nand\n```json\n{CALL}\n```",
        CALL.replace('"f"', '"g"'),
        CALL.replace("}}", "}"),
        CALL.replace("1", "one"),
        '{"name": "f"}',
        '{"name": "f", "arguments": 3}',
        '{"name": "f", "arguments": {"x": 1}, "because": "it helps"}',
        '{"name": "f", "parameters": {"type": "object", "properties": {}}}',
        '{"x": 1}',
        "[1, 2]",
        '{"function": ' * 2000,
        '{"function": ' * 2000 + CALL + "}" * 2000,
        f'{{"name": {"[" * 2000}{"]" * 2000}, "arguments": {{}}}}',
        "```python\nprint({})\n```",
        "",
    ],
)
def test_anything_else_stays_text(text):
    assert read(text, size=max(1, len(text) // 100)) == (text, [], [])


@pytest.mark.parametrize("text", ['{"function": ' * 2000, f'{{"name": {"[" * 2000}{"]" * 2000}}}'])
def test_a_model_that_repeats_itself_between_marks_writes_text(text):
    assert read(f"<t>{text}</t>", size=100) == (f"<t>{text}</t>", [], [])


def test_a_setting_switches_it_off():
    assert read(CALL, alone=False) == (CALL, [], [])


def test_a_call_with_marks_makes_the_text_before_it_text():
    plain, calls, notes = read(f"{CALL}<t>{CALL}</t>")
    assert (plain, notes) == (CALL, [])
    assert "".join(arguments for _, arguments in calls) == '{"x": 1}'


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("Hello", 0),
        (" H", 0),
        ("{", 1),
        ('{"nam', 5),
        ('{"name": "f"', 12),
        ('{"name": "g"', 0),
        ('{"city": "', 0),
        (CALL, len(CALL)),
        (f"{CALL} a", 0),
        ("```json\n{", 9),
        ("```json\n# ", 0),
        ("`x", 0),
        ("<tools>", 7),
        ("<b>x", 0),
    ],
)
def test_text_is_held_back_only_while_it_can_become_a_call(text, held):
    answer = AnswerCalls(MARKED, TOOLS, "r1")
    shown = "".join(answer.push(char)[0] for char in text)
    assert len(text) - len(shown) == held


@given(st.text('{}[]"`ab:, \\\nf1', max_size=60), st.integers(1, 9))
def test_no_text_is_lost(text, size):
    plain, calls, _ = read(text, size=size)
    assert calls or plain == text
    assert read(text, size=size) == read(text)
