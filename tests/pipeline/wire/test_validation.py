"""What a person reads of a value that does not fit: the field, what was given, what is accepted."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta, Struct

from pipeline.wire.requests import ChatRequest, EmbeddingRequest
from pipeline.wire.validation import MAX_LEVELS, NotValid, Problem, decode, explain


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Door(Struct, forbid_unknown_fields=True):
    name: Annotated[str, Meta(pattern="^[a-z]+$", description="1 or more small letters")]
    code: Annotated[str, Meta(pattern="^[0-9]+$")] = "0"
    colour: Colour = Colour.RED
    width: Annotated[float, Meta(gt=0)] = 1.0
    height: Annotated[float, Meta(ge=1, lt=3)] = 2.0
    floor: Annotated[int, Meta(ge=0)] = 0
    shares: dict[Colour, Annotated[float, Meta(gt=0)]] = {}
    size: Literal[1, 3] = 1
    windows: list[Door] = []


FIELDS = "The fields are name, code, colour, width, height, floor, shares, size and windows."


def problem(value: object, kind: Any, *, strict: bool = True) -> Problem:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert(value, kind, strict=strict)
    return explain(caught.value, kind, value, strict=strict)


@pytest.mark.parametrize(
    ("body", "sentence", "param"),
    [
        ({"max_tokens": 0}, "`max_tokens` must be an integer from 1 to 2147483647, not 0.", "max_tokens"),
        ({"max_tokens": "x"}, '`max_tokens` must be an integer from 1 to 2147483647, not "x".', "max_tokens"),
        ({"max_tokens": True}, "`max_tokens` must be an integer from 1 to 2147483647, not true.", "max_tokens"),
        ({"temperature": 300}, "`temperature` must be a number from 0 to 100, not 300.", "temperature"),
        ({"top_p": 0}, "`top_p` must be a number above 0 and at most 1, not 0.", "top_p"),
        ({"stream": "yes"}, '`stream` must be true or false, not "yes".', "stream"),
        ({"prompt": ""}, "`prompt` must be a non-empty string, not an empty string.", "prompt"),
        (
            {"model": "m" * 300},
            "`model` must be a string of at most 256 characters, not a string of 300 characters.",
            "model",
        ),
        ({"messages": []}, "`messages` must be a list of at least 1 item, not an empty list.", "messages"),
        ({"messages": {}}, "`messages` must be a list of at least 1 item, not an object.", "messages"),
        ({"messages": [{"content": "x"}]}, "`messages[0].role` is required.", "messages"),
        (
            {"messages": [{"role": "user"}, {"role": "boss"}]},
            '`messages[1].role` must be "assistant", "developer", "system", "tool" or "user", not "boss".',
            "messages",
        ),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "`messages[0].content` must be a string or a list, not 5.",
            "messages",
        ),
        ({"stop": ["a", 5]}, "`stop[1]` must be a string of 1 to 256 characters, not 5.", "stop"),
        (
            {"stop": ["a"] * 65},
            "`stop` must be a string of 1 to 256 characters or a list of at most 64 items, not a list of 65 items.",
            "stop",
        ),
        (
            {"tool_choice": "maybe"},
            '`tool_choice` must be "auto", "none", "required" or an object, not "maybe".',
            "tool_choice",
        ),
        ({"tool_choice": {"function": {}}}, "`tool_choice.function.name` is required.", "tool_choice"),
        (
            {"response_format": {"type": "xml"}},
            '`response_format.type` must be "json_object", "json_schema" or "text", not "xml".',
            "response_format",
        ),
        (
            {"logit_bias": {"5": 1, "7": "x"}},
            '`logit_bias["7"]` must be a number from -100 to 100, not "x".',
            "logit_bias",
        ),
        ([1], "The body must be an object, not a list of 1 item.", None),
    ],
)
def test_a_chat_is_refused_with_the_field_what_was_given_and_what_is_accepted(body, sentence, param):
    found = problem(body, ChatRequest)
    assert (found.sentence(), found.param) == (sentence, param)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"name": "A b"}, '`name` must be 1 or more small letters, not "A b".'),
        ({"name": "a", "code": "x"}, '`code` must be a string that matches ^[0-9]+$, not "x".'),
        ({"name": "a", "colour": "green"}, '`colour` must be "red" or "blue", not "green".'),
        ({"name": "a", "width": "wide"}, '`width` must be a number above 0, not "wide".'),
        ({"name": "a", "height": "3"}, '`height` must be a number of at least 1 and below 3, not "3".'),
        ({"name": "a", "floor": "-1"}, '`floor` must be an integer of at least 0, not "-1".'),
        ({"name": "a", "shares": {"red": 1, "blue": "0"}}, '`shares["blue"]` must be a number above 0, not "0".'),
        ({"name": "a", "shares": {"green": 1}}, '`shares` must be an object whose keys are "red" or "blue".'),
        ({"name": "a", "size": "2"}, '`size` must be 1 or 3, not "2".'),
        ({"name": "a", "kye": 1}, f"`kye` is not a known field. {FIELDS}"),
        ({"name": "a", "windows": [{"name": "b", "kye": 1}]}, f"`windows[0].kye` is not a known field. {FIELDS}"),
        ({}, "`name` is required."),
    ],
)
def test_texts_that_stand_for_values_are_told_as_they_were_written(value, sentence):
    assert problem(value, Door, strict=False).sentence() == sentence


def test_a_problem_gives_its_parts_to_those_who_write_their_own_sentence():
    found = problem({"name": "a", "floor": "first"}, Door, strict=False)
    assert found == Problem("floor", '"first"', "an integer of at least 0", value="first")
    missing = problem({}, Door)
    assert missing == Problem("name", accepted="1 or more small letters", missing=True)


def test_where_the_value_is_not_known_the_field_and_what_is_accepted_are():
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.json.decode(b'{"shares": {"red": 0}}', type=Door)
    assert explain(caught.value, Door).sentence() == "`shares[...]` must be a number above 0."


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b'{"prompt": "', "The body is not valid JSON: it ends too early."),
        (b'{"prompt" 1}', "The body is not valid JSON (see byte 10)."),
        (b'{"prompt": "\xff"}', "The body is not valid UTF-8."),
        (b'{"audio": ' + b"[" * 100_000, "The body is nested too deeply. The limit is 500 levels."),
        (b" ", "The body is empty. Send a JSON object."),
    ],
)
def test_what_is_no_json_is_told_by_its_place(body, sentence):
    with pytest.raises(NotValid) as caught:
        decode(body, ChatRequest)
    assert caught.value.sentence == sentence


@pytest.mark.parametrize("inner", [b"1", b'"[[{{"', b'"' + b'\\"[{' * 1000 + b'"', b"[]," * 1000 + b"{}"])
def test_every_version_of_python_reads_the_same_levels(inner):
    def nested(levels: int) -> bytes:
        return b'{"a":' * (levels - 1) + b"[" + inner + b"]" + b"}" * (levels - 1)

    most = MAX_LEVELS - inner.endswith(b"{}")  # one more level is in there
    assert "a" in decode(nested(most), dict[str, Any])
    with pytest.raises(NotValid, match="nested too deeply"):
        decode(nested(most + 1), dict[str, Any])


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_fields = st.sampled_from(ChatRequest.__struct_fields__ + EmbeddingRequest.__struct_fields__)


@given(st.dictionaries(_fields, _json, min_size=1, max_size=3), st.sampled_from([ChatRequest, EmbeddingRequest]))
def test_no_word_of_msgspec_is_left_and_the_sentence_is_short(body: dict[str, Any], kind: Any):
    try:
        msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        sentence = explain(error, kind, body).sentence()
        assert not any(word in sentence for word in ("Expected", "Object ", "Invalid", "`int`", " - at "))
        assert sentence.endswith(".")
        assert len(sentence) < 500
