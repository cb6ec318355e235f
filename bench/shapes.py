"""JSON Schemas of many shapes: the keywords of the JSON Schema specification (2020-12) that answers can be held to.

Each bounds its texts, names, lists and fractions, because the demo model writes without end where it may.
"""

from __future__ import annotations

from typing import Any

WORD = {"type": "string", "maxLength": 12}
NUMBER = {"type": "number", "minimum": -1000, "maximum": 1000, "multipleOf": 0.01}
INTEGER = {"type": "integer"}


def record(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    """An object; all of its properties are required unless some are named."""
    return {"type": "object", "properties": properties, "required": list(properties) if required is None else required}


def listed(items: Any, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, "maxItems": 4, **more}


def shapes() -> list[dict[str, Any]]:
    """Each keyword alone, then combined as programs combine them."""
    return [*_simple(), *_texts(), *_lists(), *_objects(), *_combined(), *_as_programs_write_them()]


def _simple() -> list[dict[str, Any]]:
    return [
        {"type": "null"},
        {"type": "boolean"},
        INTEGER,
        NUMBER,
        WORD,
        {"type": ["integer", "null"]},
        {"type": ["boolean", "integer", "null"]},
        {"const": "yes"},
        {"const": {"a": [1, None, "x"]}},
        {"enum": ["red", "green", "blue"]},
        {"enum": [1, "1", None, True, {"a": 1}, [2]]},
        {"type": "integer", "minimum": 3},
        {"type": "integer", "minimum": 3, "maximum": 3},
        {"type": "integer", "exclusiveMinimum": -7, "exclusiveMaximum": 12},
        {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 700},
        {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25},
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 10, "multipleOf": 0.5},
    ]


def _texts() -> list[dict[str, Any]]:
    formats = ["date", "time", "date-time", "uuid", "ipv4"]
    return [
        {"type": "string", "minLength": 3, "maxLength": 5},
        {"type": "string", "maxLength": 0},
        {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"},
        {"type": "string", "pattern": "^(yes|no|maybe)$"},
        {"type": "string", "pattern": "^\\d{3}-\\d{4}$"},
        {"type": "string", "pattern": "^[а-я]{2,6}$"},
        {"type": "string", "enum": ['with "quotes"', "with \\ backslash", "with\nline", "ünïcode"]},
        *({"type": "string", "format": each, "maxLength": 40} for each in formats),
        {"type": "string", "format": "of-our-own", "maxLength": 8},
    ]


def _lists() -> list[dict[str, Any]]:
    return [
        listed(INTEGER),
        listed(WORD, minItems=2),
        listed({"enum": ["a", "b"]}, minItems=4),
        listed(listed({"type": "boolean"})),
        listed(record(x=INTEGER), minItems=1),
        {"type": "array", "prefixItems": [{"const": "a"}, INTEGER], "items": False, "minItems": 2},
        {"type": "array", "prefixItems": [WORD], "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        {"type": "array", "maxItems": 0},
        listed({"anyOf": [INTEGER, {"type": "null"}]}, minItems=2),
    ]


def _objects() -> list[dict[str, Any]]:
    closed = {"type": "object", "additionalProperties": False}
    words = {"title": "T", "description": "D", "default": {}, "examples": [{"a": 1}]}
    return [
        record(a=INTEGER),
        record(a=INTEGER, b=WORD, c={"type": "boolean"}),
        record([], a=INTEGER, b=WORD),
        record(["b"], a=INTEGER, b={"type": "boolean"}, c={"type": "null"}),
        {**record(a=INTEGER), "additionalProperties": False},
        {**record(), "additionalProperties": False},
        {**record([], a=INTEGER), "minProperties": 1, "additionalProperties": False},
        {**closed, "patternProperties": {"^k[0-9]$": INTEGER}, "maxProperties": 2},
        {**record(a=INTEGER), "additionalProperties": {"type": "boolean"}, "maxProperties": 1},
        record(inner=record(deeper=record(value=INTEGER))),
        record(**{"with space": INTEGER, 'with "quote"': INTEGER, "ключ": INTEGER}),
        record(**{f"p{index}": {"type": "boolean"} for index in range(12)}),
        {**record(a=INTEGER), **words},
    ]


def _combined() -> list[dict[str, Any]]:
    node = {**record(["v"], v=INTEGER), "additionalProperties": False}
    cat, dog = record(kind={"const": "cat"}, lives=INTEGER), record(kind={"const": "dog"}, tricks=listed(WORD))
    union = {"$defs": {"cat": cat, "dog": dog}, "discriminator": {"propertyName": "kind"}}
    return [
        {"anyOf": [INTEGER, {"type": "boolean"}]},
        {"oneOf": [{"type": "integer", "maximum": 3, "minimum": 0}, {"type": "boolean"}]},
        {"oneOf": [cat, dog]},
        {**union, "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}]},
        {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
        {"allOf": [{**record(a=INTEGER), "additionalProperties": False}]},
        {"$defs": {"count": {"type": "integer", "minimum": 1, "maximum": 5}}, "$ref": "#/$defs/count"},
        {"$defs": {"n": node}, **record(first={"$ref": "#/$defs/n"}, second={"$ref": "#/$defs/n"})},
        {"definitions": {"w": WORD}, **record(w={"$ref": "#/definitions/w"})},
        record(either={"anyOf": [record(a=INTEGER), record(b={"type": "boolean"})]}),
        record(["x"], x={"anyOf": [{"type": "integer"}, {"type": "null"}]}, y={"anyOf": [WORD, {"type": "null"}]}),
    ]


def _as_programs_write_them() -> list[dict[str, Any]]:
    week = {"type": "integer", "minimum": 1, "maximum": 7}
    share = {**NUMBER, "minimum": 0, "maximum": 1}
    narrow = record([], since=INTEGER, exact={"type": "boolean"})
    step = record(explanation=WORD, output=WORD)
    person = record(["name", "age"], name=WORD, age={"type": "integer", "minimum": 0, "maximum": 130}, email=WORD)
    return [
        {**record(steps=listed(step), final_answer=WORD), "additionalProperties": False},
        record(people=listed(person)),
        record(city=WORD, unit={"enum": ["celsius", "fahrenheit"]}, days=week),
        record(sentiment={"enum": ["positive", "negative", "neutral"]}, confidence=share),
        record(title=WORD, tags=listed({"enum": ["news", "sport", "art"]}), published={"type": "boolean"}),
        record(id={"type": "string", "format": "uuid"}, when={"type": "string", "format": "date"}, total=NUMBER),
        record(query=WORD, filters=narrow, limit={"const": 10}),
    ]
