"""The simulated engine's answers of a given form."""

import json

import jsonschema_rs
import pytest

from bench.shapes import shapes
from consumers.engines.local.child.instance import simplest
from pipeline.wire.decoding import decode_chat
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatRequest


def asking(**fields) -> ChatRequest:
    return decode_chat(json.dumps({"prompt": "x", **fields}).encode(), max_body_bytes=1 << 20)


def test_every_shape_has_a_simplest_instance():
    for schema in shapes():
        text = simplest(asking(guided_json=schema))
        assert jsonschema_rs.is_valid(schema, json.loads(text)), (schema, text)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, ""),
        ({"response_format": {"type": "json_object"}}, "{}"),
        ({"guided_json": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}}, '{"a":""}'),
        ({"guided_json": {"type": "array", "items": {"type": "boolean"}, "minItems": 1}}, "[false]"),
        ({"guided_regex": "a+/[0-9]{3}b*"}, "a/000"),
        ({"guided_grammar": 'root ::= "x" [0-9]+'}, "x0"),
        ({"guided_grammar": 'start: /[0-9]+/ "!"'}, "0!"),
    ],
)
def test_the_simplest_text(fields, text):
    assert simplest(asking(**fields)) == text


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"guided_regex": "[a-z]{5000}"}, ErrorCode.UNSUPPORTED_PARAMETER, "short texts only"),
        ({"guided_regex": "(?=a)"}, ErrorCode.INVALID_REQUEST, "look-around"),
        ({"guided_grammar": "start: foo"}, ErrorCode.INVALID_REQUEST, "foo"),
        ({"guided_grammar": "root ::= ("}, ErrorCode.INVALID_REQUEST, "line 1"),
        ({"guided_json": {"$ref": "#/nowhere"}}, ErrorCode.INVALID_REQUEST, "nowhere"),
        ({"guided_json": {"$ref": "https://example.org/s.json"}}, ErrorCode.INVALID_REQUEST, "another document"),
        ({"guided_json": {"type": "string", "not": {"const": "a"}}}, ErrorCode.INVALID_REQUEST, '"not"'),
    ],
)
def test_a_form_without_a_text_is_refused_with_its_reason(fields, code, words):
    with pytest.raises(HeadraceError) as caught:
        simplest(asking(**fields))
    assert caught.value.code is code
    assert words in caught.value.message
