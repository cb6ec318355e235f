"""The grammars of the calls of each family take what the family writes, and nothing that is no valid call."""

from __future__ import annotations

import pytest

from consumers.engines.local.child.forms.families import CallForm, call_form
from consumers.engines.local.child.forms.lark import quote
from tests.consumers.engines.local.child.calls.test_formats import ADD, CASES, PARIS, read, told
from tests.consumers.engines.local.child.test_grammars import accepts, asking

pytest.importorskip("llguidance")
pytest.importorskip("mlx_lm", reason="MLX is not installed")

CITY, DAYS, OPTIONS = {"type": "string"}, {"type": "integer"}, {"type": "object"}
WEATHER = {"type": "object", "properties": {"city": CITY, "days": DAYS, "options": OPTIONS}, "required": ["city"]}
SUM = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "add", "parameters": SUM}},
]
# Mistral's newer format has a special token in a call, so that no text shows it: `test_family_tools` has it.
FORMS = {
    "json_tools",
    "qwen3_coder",
    "glm47",
    "laguna",
    "minimax_m2",
    "kimi_k2",
    "pythonic",
    "gemma4",
    "mistral, older",
    "deepseek",
    "deepseek, older",
    "deepseek_v32",
    "deepseek_v4",
    "seed_oss",
    "phi4_mini",
    "phi4",
    "granite",
    "nemotron",
    "jamba",
    "hermes",
}
_BARE = '{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}; {"name": "add", "arguments": {"a": 1}}'
TEMPLATES = {"llama3, bare": '{"name": NAME, "parameters": {}}', "deepseek, older": "```json"}
TEXTS = {name: text for name, (_, text) in CASES.items() if name in FORMS} | {
    "llama3, bare": _BARE.replace("arguments", "parameters"),
    "no marks": _BARE,
}


def form_of(name: str) -> CallForm:
    format_, _ = CASES[name]
    section = next(iter(format_.sections([])), None)
    marks = (section.start, section.end) if section else ("", "")
    form = call_form(format_.name, quote, *marks, TEMPLATES.get(name, ""))
    assert form is not None
    return form


def takes(name: str, text: str) -> bool:
    return accepts(asking(tools=TOOLS, tool_choice="required"), text, form_of(name))


@pytest.mark.parametrize("name", TEXTS)
def test_calls_as_the_family_writes_them_are_taken_and_read(name):
    assert takes(name, TEXTS[name])
    assert told(read(CASES[name][0], [TEXTS[name]])[1]) == [PARIS, ADD]


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_no_valid_call_is_not_taken(name):
    text = TEXTS[name]
    for wrong in (
        text.replace("add", "other"),
        text.replace("get_weather", "other"),
        text.replace("3", '"x"'),
        text.replace("city", "town"),
        f"Let me see. {text}",
        "Hello.",
        "",
    ):
        assert not takes(name, wrong), wrong


@pytest.mark.parametrize("name", TEXTS)
def test_an_argument_that_is_not_required_may_be_left_out(name):
    # Each family's way to write the argument that goes.
    text = TEXTS[name]
    for days in (
        ', "days": 3',
        "<parameter=days>\n3\n</parameter>\n",
        "<arg_key>days</arg_key><arg_value>3</arg_value>",
        '<parameter name="days">3</parameter>\n',
        '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n',
        ", days=3",
        ",days:3",
    ):
        text = text.replace(days, "")
    assert "days" not in text
    assert takes(name, text)
