"""Values that clients send by habit are taken in the meaning that other servers give them, and the answer says so."""

from __future__ import annotations

import json

import pytest

from pipeline.wire.decoding import decode_request
from pipeline.wire.errors import HeadraceError
from pipeline.wire.requests import NO_LIMIT, NamedToolChoice


def decode(body):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return decode_request(data, max_body_bytes=1 << 20)


def taken(**fields):
    request = decode({"prompt": "a", **fields})
    return {name: getattr(request, name) for name in fields}, request.notes


@pytest.mark.parametrize(
    ("given", "meant", "note"),
    [
        ({"max_tokens": -1}, {"max_tokens": NO_LIMIT}, "`max_tokens` -1 means no limit."),
        ({"max_tokens": 0}, {"max_tokens": NO_LIMIT}, "`max_tokens` 0 means no limit."),
        ({"max_completion_tokens": 10**12}, {"max_completion_tokens": NO_LIMIT}, "means no limit."),
        ({"top_k": -1}, {"top_k": None}, "`top_k` -1 means all tokens."),
        ({"top_p": 0, "temperature": 0.7}, {"top_p": None, "temperature": 0}, "`top_p` 0 means the likeliest token"),
        ({"top_p": 0.0}, {"top_p": None}, "`top_p` 0 means the likeliest token"),
        ({"repetition_penalty": 0}, {"repetition_penalty": None}, "means no penalty."),
        ({"stop": ""}, {"stop": None}, "An empty `stop` string stops nothing."),
        ({"stop": ["", "a", None]}, {"stop": ["a"]}, "An empty `stop` string stops nothing."),
    ],
)
def test_a_value_is_taken_in_its_meaning_and_noted(given, meant, note):
    values, notes = taken(**given)
    assert values == meant
    assert len(notes) == 1
    assert note in notes[0]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"max_tokens": 256.0}, {"max_tokens": 256}),
        ({"seed": 7.0, "top_k": 40.0}, {"seed": 7, "top_k": 40}),
        ({"n": 1.0, "best_of": 1.0}, {"n": 1, "best_of": 1}),
        ({"max_tokens": None, "stop": None, "tools": None}, {"max_tokens": None, "stop": None, "tools": None}),
        ({"parallel_tool_calls": False}, {"parallel_tool_calls": False}),
        ({"temperature": 3.5}, {"temperature": 3.5}),
        ({"reasoning_effort": "none", "verbosity": "medium"}, {"reasoning_effort": "none", "verbosity": "medium"}),
    ],
)
def test_a_value_that_changes_nothing_is_taken_without_a_note(given, meant):
    assert taken(**given) == (meant, [])


TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("choice", "meant"),
    [
        ("", None),
        ("any", "required"),
        ({"type": "any"}, "required"),
        ({"type": "auto"}, "auto"),
        ({"type": "function", "name": "f"}, "f"),
        ({"type": "tool", "name": "f"}, "f"),
        ({"type": "function", "function": {"name": "f"}}, "f"),
    ],
)
def test_a_tool_choice_of_another_api_is_one(choice, meant):
    taken = decode({"prompt": "a", "tools": [TOOL], "tool_choice": choice}).tool_choice
    assert (taken.function.name if isinstance(taken, NamedToolChoice) else taken) == meant


def test_the_allowed_tools_are_those_that_the_model_sees():
    others = {"type": "function", "function": {"name": "g"}}
    allowed = {"mode": "required", "tools": [TOOL]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    request = decode({"prompt": "a", "tools": [TOOL, others], "tool_choice": choice})
    assert ([tool.function.name for tool in request.tools], request.tool_choice) == (["f"], "required")


def test_a_tool_of_the_responses_api_is_one():
    tool = {"type": "function", "name": "f", "description": None, "parameters": {"type": "object"}, "strict": True}
    (read,) = decode({"prompt": "a", "tools": [tool]}).tools
    assert (read.function.name, read.function.parameters, read.function.strict) == ("f", {"type": "object"}, True)


@pytest.mark.parametrize("choice", ["each", {"type": "allowed_tools", "allowed_tools": []}, {"type": "web_search"}, 1])
def test_an_unknown_tool_choice_is_refused(choice):
    with pytest.raises(HeadraceError) as refusal:
        decode({"prompt": "a", "tools": [TOOL], "tool_choice": choice})
    assert refusal.value.param == "tool_choice"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (["a", "b"], "ab"),
        ([{"type": "text", "text": None}, {"type": "text", "text": "a"}], "a"),
        ([{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}], "ab"),
        ([{"type": "refusal", "refusal": "no"}], "no"),
        ({"ok": True}, '{"ok": true}'),
    ],
)
def test_text_of_a_history_is_read_in_each_form(content, text):
    assert decode({"messages": [{"role": "user", "content": content}]}).messages[0].text() == text


def test_null_in_an_earlier_call_is_absent():
    call = {"id": None, "type": None, "function": {"name": "f", "arguments": "{}"}}
    body = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]}
    (taken,) = decode(body).messages[1].tool_calls
    assert (taken.id, taken.function.name) == ("call_1_0", "f")


def test_null_in_the_schema_of_a_tool_is_absent():
    required = {"type": "string", "default": None, "description": None}
    given = {
        "type": "object",
        "required": None,
        "properties": {"required": required, "b": {"type": "array", "items": {"enum": None}}, "c": None},
        "anyOf": [{"properties": None}],
    }
    (tool,) = decode({"prompt": "a", "tools": [{"function": {"name": "f", "parameters": given}}]}).tools
    assert tool.function.parameters == {
        "type": "object",
        "properties": {
            "required": {"type": "string", "default": None},
            "b": {"type": "array", "items": {}},
            "c": None,
        },
        "anyOf": [{}],
    }


def test_null_in_a_tool_is_absent():
    tool = {"type": "function", "function": {"name": "f", "description": None, "parameters": None}}
    (read,) = decode({"prompt": "a", "tools": [tool]}).tools
    assert (read.function.description, read.function.parameters) == ("", {})


@pytest.mark.parametrize(("given", "meant"), [(None, "{}"), ({"a": 1}, '{"a": 1}'), ([1], "[1]"), ("", ""), ("{", "{")])
def test_arguments_of_an_earlier_call_are_kept_as_text(given, meant):
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": given}}
    body = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]}
    assert decode(body).messages[1].tool_calls[0].function.arguments == meant


@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        (b'{"prompt": "a \\ud83d b"}', "a \ufffd b"),
        (b'{"prompt": "\\udc00\\ud800"}', "\ufffd\ufffd"),
        (b'{"prompt": "\\ud83d\\ude00", "x": "\\ud800"}', "\U0001f600"),
        (b'\xef\xbb\xbf{"prompt": "a"}', "a"),
        (b"\xef\xbb\xbfa", "a"),
    ],
)
def test_half_a_character_is_replaced_and_a_byte_order_mark_is_no_part_of_the_body(body, prompt):
    assert decode(body).prompt == prompt


def test_what_is_wrong_beside_a_habit_is_refused_for_itself():
    with pytest.raises(HeadraceError) as refusal:
        decode({"prompt": "a", "max_tokens": -1, "temperature": "hot"})
    assert refusal.value.param == "temperature"


def test_a_body_cannot_bring_notes_of_its_own():
    assert decode({"prompt": "a", "headrace.notes": ["mine"]}).notes == []


def test_a_function_of_the_old_kind_is_a_tool():
    call = {"name": "f", "arguments": None}
    body = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "function_call": call},
            {"role": "function", "name": "f", "content": "7"},
        ]
    }
    _, called, result = decode(body).messages
    assert (called.tool_calls[0].function.name, called.tool_calls[0].function.arguments) == ("f", "{}")
    assert (result.role, result.name, result.text()) == ("tool", "f", "7")


@pytest.mark.parametrize(
    ("given", "thinking"),
    [
        ({}, None),
        ({"think": False, "reasoning_effort": "high"}, "none"),
        ({"think": True}, "medium"),
        ({"think": "low"}, "low"),
        ({"reasoning_effort": "minimal"}, "low"),
        ({"reasoning_effort": "xhigh"}, "high"),
        ({"reasoning_effort": "none"}, "none"),
        ({"enable_thinking": True}, "medium"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "none"),
        ({"chat_template_kwargs": {"reasoning": False}}, "none"),
        ({"chat_template_kwargs": {"reasoning_effort": "high"}}, "high"),
        ({"chat_template_kwargs": {"enable_thinking": "False"}}, "none"),
        ({"reasoning": {"effort": "high"}}, "high"),
        ({"reasoning": {"effort": "none"}}, "none"),
        ({"reasoning": {"enabled": False}}, "none"),
        ({"reasoning": {"effort": None, "enabled": True}}, "medium"),
        ({"reasoning": {"exclude": True}}, None),
        ({"reasoning": {"max_tokens": 2000}}, "medium"),
        ({"reasoning": {"max_tokens": 0}}, "none"),
        ({"chat_template_kwargs": {"enable_thinking": 0}}, "none"),
        ({"reasoning": "off"}, "none"),
        ({"thinking": {"type": "disabled"}}, "none"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "medium"),
        ({"thinking": False}, "none"),
        ({"thinking": {"type": "disabled"}, "reasoning_effort": "high"}, "high"),
        ({"think": "false"}, "none"),
        ({"think": "true"}, "medium"),
        ({"reasoning_effort": "off"}, "none"),
        ({"reasoning_effort": "Disabled"}, "none"),
    ],
)
def test_how_much_a_model_thinks_is_read_from_whichever_parameter_says_it(given, thinking):
    assert decode({"prompt": "a", **given}).thinking == thinking


@pytest.mark.parametrize(
    ("given", "effective"),
    [
        ({"min_tokens": 0, "ignore_eos": False, "stop_token_ids": [], "typical_p": 1.0, "mirostat": 0}, {}),
        ({"min_tokens": 5, "ignore_eos": True}, {"min_tokens": 5, "ignore_eos": True}),
        ({"xtc_probability": 0.5, "thinking_budget": 0}, {"xtc_probability": 0.5, "thinking_budget": 0}),
    ],
)
def test_parameters_of_other_servers_are_kept_where_they_would_change_the_answer(given, effective):
    assert decode({"prompt": "a", **given}).of_others == effective


def test_a_word_for_no_is_no_to_the_template():
    arguments = {"enable_thinking": "false", "thinking": "ON", "tone": "off"}
    taken = decode({"prompt": "a", "chat_template_kwargs": arguments}).chat_template_kwargs
    assert taken == {"enable_thinking": False, "thinking": True, "tone": "off"}


def test_a_word_for_yes_is_no_amount_of_thinking():
    assert [decode({"prompt": "a", "think": word}).worded_thinking for word in ("true", "off", "high")] == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("given", "penalty", "notes"),
    [
        ({"repeat_penalty": 1.3}, 1.3, 0),
        ({"repeat_penalty": 0}, None, 1),
        ({"repeat_penalty": 1.3, "repetition_penalty": 1.1}, 1.1, 0),
    ],
)
def test_a_penalty_has_two_names(given, penalty, notes):
    request = decode({"prompt": "a", **given})
    assert (request.repetition_penalty, request.repeat_penalty, len(request.notes)) == (penalty, None, notes)


@pytest.mark.parametrize(
    ("given", "alternatives"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 3}, 3),
        ({"top_logprobs": 3.0}, 3),
        ({"logprobs": 2}, 2),
        ({"top_logprobs": 0}, None),
    ],
)
def test_log_probabilities_are_asked_for_in_each_form(given, alternatives):
    assert decode({"prompt": "a", **given}).alternatives == alternatives


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"logit_bias": {"hello": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
        ({"adapters": "a/folder"}, "adapters"),
    ],
)
def test_what_no_engine_could_take_is_refused(given, field):
    with pytest.raises(HeadraceError) as refusal:
        decode({"prompt": "a", **given})
    assert refusal.value.param == field


def test_an_image_is_read_from_its_url_and_no_address_is_fetched():
    def asked(url):
        return decode({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]})

    for url in ({"url": "data:image/png;base64,aGk="}, "data:image/jpeg;base64,aGk="):
        assert asked(url).messages[0].images() == ["aGk="]
        assert asked(url).needs_ollama == "images"
    for url in ("https://a.example/b.png", "", None, "data:text/plain;base64,aGk=", "data:image/png;base64,!"):
        with pytest.raises(HeadraceError) as refusal:
            asked(url)
        assert refusal.value.param == "messages"


def test_an_empty_text_is_embedded_as_a_space_and_said():
    for given, texts in (("", [" "]), (["a", ""], ["a", " "])):
        request = decode({"input": given})
        assert request.texts == texts
        assert request.notes == ["An empty text has no embedding. A space stands for it."]
    request = decode({"input": "a", "dimensions": 8.0})
    assert (request.dimensions, request.notes) == (8, [])
