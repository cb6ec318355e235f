"""Tool calls as families write them: read whole, in pieces, and broken."""

from __future__ import annotations

import importlib
import json
from types import SimpleNamespace

import pytest

from consumers.engines.local.child.calls.answer import AnswerCalls
from consumers.engines.local.child.calls.formats import CallFormat, format_of
from pipeline.wire.answers import ToolCall, add_call

pytest.importorskip("mlx_lm", reason="MLX is not installed")

PROPERTIES = {"city": {"type": "string"}, "days": {"type": "integer"}, "options": {"type": "object"}}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": {"properties": PROPERTIES}}},
    {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "number"}}}}},
]
PARIS = ("get_weather", {"city": "Paris", "days": 3})
ADD = ("add", {"a": 1})


def of_parser(parser: str) -> CallFormat:
    """The format of a model whose parser mlx-lm knows."""
    module = importlib.import_module(f"mlx_lm.tool_parsers.{parser}")
    tokenizer = SimpleNamespace(
        has_tool_calling=True,
        tool_parser=module.parse_tool_call,
        tool_call_start=module.tool_call_start,
        tool_call_end=module.tool_call_end,
        get_vocab=lambda: {"[ARGS]": 1, "[CALL_ID]": 2, '<|"|>': 3},
    )
    return found(tokenizer)


def of_template(template: str, *tokens: str) -> CallFormat:
    """The format of a model without a parser in mlx-lm."""
    return found(
        SimpleNamespace(has_tool_calling=False, chat_template=template, get_vocab=lambda: dict.fromkeys(tokens, 1))
    )


def found(tokenizer: SimpleNamespace) -> CallFormat:
    format_ = format_of(tokenizer)
    assert format_ is not None
    return format_


def read(format_: CallFormat, chunks: list[str]) -> tuple[str, list[ToolCall], int]:
    """The text, the calls joined from their parts, and the number of parts."""
    answer = AnswerCalls(format_, TOOLS, "r1")
    text, parts = "", list[ToolCall]()
    for plain, new in [*map(answer.push, chunks), answer.flush()]:
        text += plain
        parts += new
    calls: list[ToolCall] = []
    for part in parts:
        add_call(calls, part)
    return text, calls, len(parts)


def told(calls: list[ToolCall]) -> list[tuple[str, object]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


PARSED = {
    "json_tools": (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>\n'
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    ),
    "qwen3_coder": (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
    ),
    "glm47": (
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value>"
        "<arg_key>days</arg_key><arg_value>3</arg_value></tool_call>"
        "<tool_call>add<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>"
    ),
    "longcat": (
        "<longcat_tool_call>get_weather<longcat_arg_key>city</longcat_arg_key>"
        "<longcat_arg_value>Paris</longcat_arg_value><longcat_arg_key>days</longcat_arg_key>"
        "<longcat_arg_value>3</longcat_arg_value></longcat_tool_call>"
        '<longcat_tool_call>{"name": "add", "arguments": {"a": 1}}</longcat_tool_call>'
    ),
    "minimax_m2": (
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris</parameter>\n'
        '<parameter name="days">3</parameter>\n</invoke>\n<invoke name="add">\n<parameter name="a">1</parameter>\n'
        "</invoke>\n</minimax:tool_call>"
    ),
    "minicpm5": (
        '<function name="get_weather"><param name="city">Paris</param><param name="days">3</param></function>\n'
        '<function name="add"><param name="a"><![CDATA[1]]></param></function>'
    ),
    "muse_spark": (
        '<atem:function_calls>\n<atem:invoke name="get_weather">\n<atem:parameter name="city">Paris</atem:parameter>\n'
        '<atem:parameter name="days">3</atem:parameter>\n</atem:invoke>\n<atem:invoke name="add">'
        '<atem:parameter name="a">1</atem:parameter></atem:invoke></atem:function_calls>'
    ),
    "kimi_k2": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city": "Paris", "days": 3}<|tool_call_end|><|tool_call_begin|>functions.add:1<|tool_call_argument_begin|>'
        '{"a": 1}<|tool_call_end|><|tool_calls_section_end|>'
    ),
    "kimi_k3": (
        '<|open|>tools<|sep|><|open|>call tool="get_weather" index="1"<|sep|><|open|>argument key="city" type="string"'
        '<|sep|>Paris<|close|>argument<|sep|><|open|>argument key="days" type="number"<|sep|>3<|close|>argument<|sep|>'
        '<|close|>call<|sep|><|open|>call tool="add" index="2"<|sep|><|open|>json type="object"<|sep|>{"a": 1}'
        "<|close|>json<|sep|><|close|>call<|sep|><|close|>tools<|sep|>"
    ),
    "mistral": '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "days": 3}[TOOL_CALLS]add[CALL_ID]x1[ARGS]{"a": 1}',
    "pythonic": '<|tool_call_start|>[get_weather(city="Paris", days=3), add(a=1)]<|tool_call_end|>',
    "gemma4": (
        '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:3}<tool_call|><|tool_call>call:add{a:1}<tool_call|>'
    ),
    "function_gemma": (
        "<start_function_call>call:get_weather{city:<escape>Paris<escape>,days:3}<end_function_call>"
        "<start_function_call>call:add{a:1}<end_function_call>"
    ),
    "laguna": (
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value>"
        "<arg_key>days</arg_key><arg_value>3</arg_value></tool_call>"
        "<tool_call>add<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>"
    ),
}
_OBJECTS = '{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}, {"name": "add", "arguments": {"a": 1}}'
OURS = {
    "mistral, older": (of_parser("mistral"), f"[TOOL_CALLS][{_OBJECTS}]"),
    "llama3": (
        of_template("{{ tools }}", "<|python_tag|>"),
        ('<|python_tag|>{"name": "get_weather", "parameters": ARGS}; {"name": "add", "parameters": {"a": 1}}'),
    ),
    "llama3, bare": (
        of_template("{{ tools }}", "<|python_tag|>"),
        (
            '{"type": "function", "name": "get_weather", "parameters": ARGS};\n'
            '{"type": "function", "function": {"name": "add", "parameters": {"a": 1}}}'
        ),
    ),
    "llama3, custom": (
        of_template("{{ tools }}", "<|python_tag|>"),
        '<function=get_weather>ARGS</function><function=add>{"a": 1}</function>',
    ),
    "llama3, built in": (
        of_template("{{ tools }}", "<|python_tag|>"),
        '<|python_tag|>get_weather.call(city="Paris", days=3) add.call(a=1)',
    ),
    "harmony": (
        of_template("{{ tools }}", "<|channel|>", "<|message|>", "<|call|>"),
        (
            "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>ARGS<|call|>"
            '<|channel|>commentary to=functions.add<|message|>{"a": 1}<|call|>'
        ),
    ),
    "deepseek": (
        of_template("{{ tools }}<｜tool▁calls▁begin｜>"),
        (
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
            'ARGS<｜tool▁call▁end｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'
            "<｜tool▁calls▁end｜>"
        ),
    ),
    "deepseek, older": (
        of_template("{{ tools }}<｜tool▁calls▁begin｜>"),
        (
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
            "ARGS\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
            '{"a": 1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
        ),
    ),
    "deepseek_v32": (
        of_template("{{ tools }}<｜DSML｜function_calls>"),
        (
            '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
            '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'
            '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
            '<｜DSML｜invoke name="add">\n<｜DSML｜parameter name="a" string="false">1</｜DSML｜parameter>\n'
            "</｜DSML｜invoke>\n"
            "</｜DSML｜function_calls>"
        ),
    ),
    "deepseek_v4": (
        of_template("{% set mark = '｜DSML｜' %}{{ tools }}"),
        (
            '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get_weather">\n'
            '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'
            '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
            '<｜DSML｜invoke name="add">\n<｜DSML｜parameter name="a" string="false">1</｜DSML｜parameter>\n'
            "</｜DSML｜invoke>\n"
            "</｜DSML｜tool_calls>"
        ),
    ),
    "seed_oss": (
        of_template("{{ tools }}<seed:tool_call>"),
        PARSED["qwen3_coder"].replace("tool_call>", "seed:tool_call>"),
    ),
    "phi4_mini": (of_template("{{ tools }}", "<|/tool_call|>"), f"<|tool_call|>[{_OBJECTS}]<|/tool_call|>"),
    "phi4": (of_template("{{ tools }}functools"), f"functools[{_OBJECTS}]"),
    "granite": (of_template("{{ tools }}", "<|tool_call|>"), f"<|tool_call|>[{_OBJECTS}]"),
    "nemotron": (of_template("{{ tools }}<TOOLCALL>"), f"<TOOLCALL>[{_OBJECTS}]</TOOLCALL>"),
    "command": (
        of_template("{{ tools }}", "<|START_ACTION|>"),
        (
            '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "get_weather", "parameters": ARGS},'
            '{"tool_call_id": "1", "tool_name": "add", "parameters": {"a": 1}}]<|END_ACTION|>'
        ),
    ),
    "internlm": (
        of_template("{{ tools }}", "<|action_start|>"),
        f"<|action_start|><|plugin|>\n{_OBJECTS}<|action_end|>",
    ),
    "jamba": (of_template("{{ tools }}<tool_calls>"), f"<tool_calls>[{_OBJECTS}]</tool_calls>"),
    "hermes": (of_template("{{ tools }}<tool_call>"), PARSED["json_tools"]),
    "no marks": (of_template("{{ tools }}"), f"[{_OBJECTS}]"),
}
CASES = {name: (of_parser(name), text) for name, text in PARSED.items()} | {
    name: (format_, text.replace("ARGS", '{"city": "Paris", "days": 3}')) for name, (format_, text) in OURS.items()
}
# Those without marks are calls if they are all that is said, which is known at the end.
MARKED = {name: case for name, case in CASES.items() if name not in ("llama3, bare", "no marks")}
marked = pytest.mark.parametrize(("format_", "text"), MARKED.values(), ids=MARKED.keys())
every = pytest.mark.parametrize(("format_", "text"), CASES.values(), ids=CASES.keys())


@every
def test_two_calls_are_read(format_, text):
    plain, calls, _ = read(format_, [text])
    assert (plain, told(calls)) == ("", [PARIS, ADD])
    assert len({call.id for call in calls}) == 2


@every
def test_calls_are_the_same_however_the_text_is_cut(format_, text):
    whole = read(format_, [text])[:2]
    assert read(format_, list(text))[:2] == whole
    for cut in range(0, len(text), 7):
        assert read(format_, [text[:cut], text[cut:]])[:2] == whole


@marked
def test_text_before_a_call_is_text(format_, text):
    plain, calls, _ = read(format_, list(f"Let me see. {text}"))
    assert (plain, told(calls)) == ("Let me see. ", [PARIS, ADD])


@every
def test_an_answer_that_breaks_off_in_a_call_ends(format_, text):
    for cut in range(len(text)):
        plain, calls, _ = read(format_, [text[:cut]])
        assert len(calls) <= 2
        assert plain or calls or not text[:cut].strip()


@marked
def test_arguments_come_while_they_are_written(format_, text):
    assert read(format_, list(text))[2] > 2


def test_a_long_string_comes_while_it_is_written():
    for name, before, after in (
        ("json_tools", '<tool_call>{"name": "get_weather", "arguments": {"city": "', '"}}</tool_call>'),
        ("qwen3_coder", "<tool_call><function=get_weather><parameter=city>\n", "\n</parameter></function></tool_call>"),
        ("glm47", "<tool_call>get_weather<arg_key>city</arg_key><arg_value>", "</arg_value></tool_call>"),
        ("mistral", '[TOOL_CALLS]get_weather[ARGS]{"city": "', '"}'),
    ):
        text = "Lorem ipsum dolor sit amet. " * 200
        _, calls, parts = read(of_parser(name), list(before + text.strip() + after))
        assert told(calls) == [("get_weather", {"city": text.strip()})]
        assert parts > 100


@pytest.mark.parametrize(
    ("name", "text", "arguments"),
    [
        ("json_tools", '<tool_call>{"name": "add", "arguments": {"a": oops}}</tool_call>', '{"a": oops}'),
        ("json_tools", '<tool_call>{"name": "add", "arguments": "no json"}</tool_call>', "no json"),
        ("json_tools", '<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "[1]"),
        ("mistral", '[TOOL_CALLS]add[ARGS]{"a": 1, oops', '{"a": 1, oops'),
        ("mistral", "[TOOL_CALLS]add[ARGS]one and two", "one and two"),
        ("gemma4", "<|tool_call>call:add{a:oops oops}<tool_call|>", "{a:oops oops}"),
        ("pythonic", "<|tool_call_start|>[add(a=1 2)]<|tool_call_end|>", None),
    ],
)
def test_arguments_that_are_no_json_are_given_as_text(name, text, arguments):
    plain, calls, _ = read(of_parser(name), list(text))
    assert plain == ""
    assert [call.function.name for call in calls] == ["add"]
    assert arguments is None or calls[0].function.arguments == arguments


@pytest.mark.parametrize(
    ("value", "expected"),
    [("a\nb\tc", "a\nb\tc"), (r"a \"b\" \\", 'a "b" \\'), ("}{</x>", "}{</x>"), (r"\u00e9\ud83d\ude42", "é🙂")],
)
def test_strings_in_json_arguments(value, expected):
    text = f'<tool_call>{{"name": "get_weather", "arguments": {{"city": "{value}"}}}}</tool_call>'
    assert told(read(of_parser("json_tools"), list(text))[1]) == [("get_weather", {"city": expected})]


def test_special_tokens_of_calls_are_no_text():
    assert read(of_parser("mistral"), ['So[ARGS] it is.<|"|>'])[0] == "So it is."


def test_ids_have_the_form_that_the_family_takes():
    ids = [call.id for call in read(of_parser("mistral"), [PARSED["mistral"]])[1]]
    assert all(len(call_id) == 9 and call_id.isalnum() for call_id in ids)
    assert [call.id for call in read(of_parser("kimi_k2"), [PARSED["kimi_k2"]])[1]] == [
        "functions.get_weather:0",
        "functions.add:1",
    ]


@pytest.mark.parametrize("text", ["<tool_call>add</tool_call>", "<tool_call>add\n</tool_call>"])
def test_a_name_alone_is_a_call_without_arguments(text):
    for tag, name in (("tool_call", "glm47"), ("longcat_tool_call", "longcat")):
        written = text.replace("tool_call", tag)
        for chunks in ([written], list(written)):
            plain, calls, _ = read(CASES[name][0], chunks)
            assert (plain, told(calls)) == ("", [("add", {})])
        other = written.replace("add", "other")
        assert read(CASES[name][0], [other])[:2] == (other, [])


def test_a_template_without_tools_has_no_format():
    tokenizer = SimpleNamespace(
        has_tool_calling=False, chat_template="{{ messages }}", get_vocab=lambda: {"<|call|>": 1}
    )
    assert format_of(tokenizer) is None
