"""JSON Schemas, narrowed for a small model."""

import jsonschema_rs
import pytest

from bench.shapes import shapes
from consumers.engines.local.child.schemas import MOST_INTEGER, narrowed

INTEGER = {"type": "integer"}
BOUNDED = {"type": "integer", "minimum": -MOST_INTEGER, "maximum": MOST_INTEGER}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"properties": {"a": INTEGER}}, {"properties": {"a": BOUNDED}, "additionalProperties": False}),
        (
            {"items": {"properties": {"a": {}}}},
            {"items": {"properties": {"a": {}}, "additionalProperties": False}},
        ),
        ({"$defs": {"x": INTEGER}, "anyOf": [INTEGER]}, {"$defs": {"x": BOUNDED}, "anyOf": [BOUNDED]}),
        ({"type": "string", "format": "of-our-own"}, {"type": "string"}),
        (
            {"oneOf": [INTEGER], "discriminator": {"propertyName": "k"}},
            {"anyOf": [BOUNDED], "discriminator": {"propertyName": "k"}},
        ),
    ],
)
def test_what_is_narrowed(schema, expected):
    assert narrowed(schema) == expected


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {}}, "additionalProperties": True},
        {"properties": {"a": {}}, "additionalProperties": {"type": "string"}},
        {"properties": {"a": {}}, "patternProperties": {"^b": {}}},
        {"properties": {"a": {}}, "required": ["b"]},
        {"properties": {"a": {}}, "anyOf": [{}]},
        {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]},
        {"properties": {"a": {"allOf": [{"properties": {"b": {}}}]}}},
        {"type": "object"},
        {"type": "integer", "minimum": 3},
        {"type": "string", "format": "date"},
        {"oneOf": [{"type": "string"}, {"type": "null"}]},
        {"const": {"properties": {"a": {"type": "integer"}}}},
        {"enum": [{"properties": {}}], "default": {"type": "integer"}},
    ],
)
def test_what_stays(schema):
    assert narrowed(schema) == schema


def test_the_schema_that_is_given_is_not_changed():
    schema = {"properties": {"a": {"type": "integer"}}}
    narrowed(schema)
    assert schema == {"properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize("schema", shapes())
def test_a_narrowed_schema_is_a_schema(schema):
    jsonschema_rs.validator_for(narrowed(schema))
