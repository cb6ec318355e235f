"""The form of an answer, by whichever parameter a request asks for it."""

import json

import pytest

from pipeline.wire.constraints import MAX_CHOICES, Constraint
from pipeline.wire.decoding import decode_chat
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatRequest

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
F = {"type": "function", "function": {"name": "f"}}


def decoded(**fields) -> ChatRequest:
    return decode_chat(json.dumps({"prompt": "x", **fields}).encode(), max_body_bytes=1 << 20)


def refused(**fields) -> HeadraceError:
    with pytest.raises(HeadraceError) as caught:
        decoded(**fields)
    return caught.value


@pytest.mark.parametrize(
    ("fields", "kind", "value", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", {}, "response_format"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
                }
            },
            "json_schema",
            SCHEMA,
            "response_format",
        ),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "json_schema", SCHEMA, "response_format"),
        ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, "json_schema", SCHEMA, "response_format"),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", SCHEMA, "response_format"),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json_schema", SCHEMA, "response_format"),
        ({"structured_outputs": {"json_object": True}}, "json_object", {}, "response_format"),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+", "structured_outputs"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", ["a", "b"], "structured_outputs"),
        ({"structured_outputs": {"grammar": "start: X"}}, "grammar", "start: X", "structured_outputs"),
        ({"guided_json": SCHEMA}, "json_schema", SCHEMA, "response_format"),
        ({"guided_json": json.dumps(SCHEMA)}, "json_schema", SCHEMA, "response_format"),
        ({"guided_regex": "a+"}, "regex", "a+", "structured_outputs"),
        ({"guided_choice": ["a"]}, "choice", ["a"], "structured_outputs"),
        ({"guided_grammar": "start: X"}, "grammar", "start: X", "structured_outputs"),
        ({"json_schema": SCHEMA}, "json_schema", SCHEMA, "response_format"),
        ({"json_schema": json.dumps(SCHEMA)}, "json_schema", SCHEMA, "response_format"),
        ({"grammar": "start: X", "ebnf": ""}, "grammar", "start: X", "structured_outputs"),
        ({"ebnf": 'root ::= "a"'}, "grammar", 'root ::= "a"', "structured_outputs"),
        ({"regex": "a+", "grammar": None}, "regex", "a+", "structured_outputs"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": None, "schema": SCHEMA}}},
            "json_schema",
            SCHEMA,
            "response_format",
        ),
    ],
)
def test_each_dialect_of_a_form_is_the_same_request(fields, kind, value, param):
    assert decoded(**fields).constraint == Constraint(kind, value, param)


def test_an_empty_grammar_asks_for_nothing():
    assert decoded(grammar="").constraint is None


@pytest.mark.parametrize("fields", [{"grammar": "start: X", "regex": "a"}, {"json_schema": "no JSON"}])
def test_what_is_wrong_with_another_servers_form_is_named(fields):
    assert refused(**fields).param == next(iter(fields))


def test_a_request_in_hand_has_one_place_for_its_form():
    request = decoded(guided_json=SCHEMA)
    assert request.guided_json is None
    assert request.response_format.json_schema.schema == SCHEMA
    assert decoded(guided_regex="a").structured_outputs.regex == "a"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": {"type": "text"}},
        {"response_format": None, "structured_outputs": None, "guided_json": None},
        {"structured_outputs": {}},
        {"structured_outputs": {"json_object": False}},
    ],
)
def test_no_form_is_asked_for(fields):
    assert decoded(**fields).constraint is None


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_json", "`guided_json` and `guided_regex`"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "response_format",
            "`response_format` and `structured_outputs.regex`",
        ),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "cannot be used together"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema` is required"),
        ({"guided_json": "no schema"}, "guided_json", "must be a JSON schema"),
        ({"structured_outputs": {"json": "[]"}}, "structured_outputs", "must be a JSON schema"),
        ({"guided_choice": []}, "guided_choice", "1 to 1000 texts"),
        ({"guided_choice": ["a"] * (MAX_CHOICES + 1)}, "guided_choice", "1 to 1000 texts"),
        ({"guided_regex": ""}, "guided_regex", "must be a text"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "choice"),
    ],
)
def test_a_form_that_cannot_be_is_refused(fields, param, words):
    error = refused(**fields)
    assert (error.code, error.param) == (ErrorCode.INVALID_REQUEST, param)
    assert words in error.message


def test_a_structural_tag_is_refused_by_name():
    error = refused(structured_outputs={"structural_tag": "{}"})
    assert (error.code, error.param) == (ErrorCode.UNSUPPORTED_PARAMETER, "structured_outputs")
    assert "structural_tag" in error.message


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
def test_a_tool_call_is_forced(choice):
    assert decoded(tools=[F], tool_choice=choice).forces_tools


@pytest.mark.parametrize("choice", [None, "none", "auto"])
def test_a_tool_call_is_left_to_the_model(choice):
    assert not decoded(tools=[F], tool_choice=choice).forces_tools


@pytest.mark.parametrize(
    ("tools", "choice"),
    [([], "required"), (None, "required"), ([F], {"type": "function", "function": {"name": "g"}})],
)
def test_a_choice_that_no_answer_can_satisfy_is_refused(tools, choice):
    error = refused(tools=tools, tool_choice=choice)
    assert (error.code, error.param) == (ErrorCode.INVALID_REQUEST, "tool_choice")


@pytest.mark.parametrize(
    ("fields", "needs"),
    [
        ({"guided_regex": "a"}, "structured_outputs"),
        ({"guided_choice": ["a"]}, "structured_outputs"),
        ({"guided_grammar": "start: X"}, "structured_outputs"),
        ({"tools": [F], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [F]}, ""),
        ({"guided_json": SCHEMA}, ""),
    ],
)
def test_what_only_mlx_honours_is_named(fields, needs):
    assert decoded(**fields).needs_mlx == needs
