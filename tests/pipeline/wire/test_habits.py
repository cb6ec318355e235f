"""Values that clients send by habit are taken in the meaning that other servers give them, and the answer says so."""

from __future__ import annotations

import json

import pytest

from pipeline.wire.errors import HeadraceError
from pipeline.wire.requests import decode_request


def decode(body):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return decode_request(data, max_body_bytes=1 << 20)


def taken(**fields):
    request = decode({"prompt": "a", **fields})
    return {name: getattr(request, name) for name in fields}, request.notes


@pytest.mark.parametrize(
    ("given", "meant", "note"),
    [
        ({"max_tokens": -1}, {"max_tokens": None}, "`max_tokens` -1 means no limit."),
        ({"max_tokens": 0}, {"max_tokens": None}, "`max_tokens` 0 means no limit."),
        ({"max_completion_tokens": 10**12}, {"max_completion_tokens": None}, "means no limit."),
        ({"top_k": -1}, {"top_k": None}, "`top_k` -1 means all tokens."),
        ({"top_p": 0, "temperature": 0.7}, {"top_p": None, "temperature": 0}, "`top_p` 0 means the likeliest token"),
        ({"top_p": 0.0}, {"top_p": None}, "`top_p` 0 means the likeliest token"),
        ({"repetition_penalty": 0}, {"repetition_penalty": None}, "means no penalty."),
        ({"stop": ""}, {"stop": None}, "An empty `stop` string stops nothing."),
        ({"stop": ["", "a", None]}, {"stop": ["a"]}, "An empty `stop` string stops nothing."),
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low"}, "`reasoning_effort` has no effect"),
        ({"verbosity": "high"}, {"verbosity": "high"}, "`verbosity` has no effect"),
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
        ({"max_tokens": None, "stop": None, "tools": None}, {"max_tokens": None, "stop": None, "tools": None}),
        ({"parallel_tool_calls": False}, {"parallel_tool_calls": False}),
        ({"temperature": 3.5}, {"temperature": 3.5}),
        ({"reasoning_effort": "none", "verbosity": "medium"}, {"reasoning_effort": "none", "verbosity": "medium"}),
    ],
)
def test_a_value_that_changes_nothing_is_taken_without_a_note(given, meant):
    assert taken(**given) == (meant, [])


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
