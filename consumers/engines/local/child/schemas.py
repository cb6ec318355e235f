"""A JSON Schema as constrained decoding needs it: narrower where a small model would never end. Pure."""

from __future__ import annotations

from typing import Any, Final

MOST_INTEGER: Final = 2**53 - 1
"""The largest integer that every reader of JSON keeps exactly. Without a bound, a small model writes digits without
end."""

_BY_NAME: Final = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_ONE: Final = frozenset({"items", "additionalProperties", "additionalItems", "contains", "not", "if", "then", "else"})
_MANY: Final = frozenset({"allOf", "anyOf", "oneOf", "prefixItems", "items"})
_SAYS_OF_OTHERS: Final = frozenset({"additionalProperties", "patternProperties", "unevaluatedProperties"})
_COMBINES: Final = frozenset({"anyOf", "oneOf", "$ref"})
_BOUNDS: Final = frozenset(
    {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "enum", "const"}
)
_FORMATS: Final = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
)


def narrowed(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema whose instances are instances of the given one, and that a model can be held to.

    - An object that names its properties has no others, where the schema says nothing about others. A small model
      would add properties until its answer is full.
    - An integer without bounds has at most 53 bits.
    - A `oneOf` with a `discriminator`, whose alternatives exclude each other, is an `anyOf`.
    - A `format` that the library does not know is left out. JSON Schema has it as a remark.

    A schema with `allOf` keeps its objects open: two closed objects have no common instance.
    """
    return dict(_narrow(schema, closes="allOf" not in _keywords(schema)))


def _narrow(schema: Any, *, closes: bool) -> Any:
    if not isinstance(schema, dict):
        return schema
    result = {name: _below(name, value, closes=closes) for name, value in schema.items()}
    if closes and _can_be_closed(schema):
        result["additionalProperties"] = False
    if schema.get("type") == "integer" and not _BOUNDS & schema.keys():
        result |= {"minimum": -MOST_INTEGER, "maximum": MOST_INTEGER}
    if isinstance(schema.get("discriminator"), dict) and "oneOf" in result and "anyOf" not in result:
        result["anyOf"] = result.pop("oneOf")
    if isinstance(schema.get("format"), str) and schema["format"] not in _FORMATS:
        del result["format"]
    return result


def _can_be_closed(schema: dict[str, Any]) -> bool:
    named, required = schema.get("properties"), schema.get("required") or []
    if not isinstance(named, dict) or (_SAYS_OF_OTHERS | _COMBINES) & schema.keys():
        return False
    return isinstance(required, list) and all(name in named for name in required)


def _below(name: str, value: Any, *, closes: bool) -> Any:
    """The value of a keyword, with the schemas in it narrowed."""
    if name in _BY_NAME and isinstance(value, dict):
        return {key: _narrow(inner, closes=closes) for key, inner in value.items()}
    if name in _MANY and isinstance(value, list):
        return [_narrow(inner, closes=closes) for inner in value]
    return _narrow(value, closes=closes) if name in _ONE else value


def _keywords(schema: Any) -> set[str]:
    """The keywords of a schema and of those inside it."""
    if not isinstance(schema, dict):
        return set()
    found = set(schema)
    for name, value in schema.items():
        if name in _BY_NAME and isinstance(value, dict):
            found = found.union(*map(_keywords, value.values()))
        elif name in _MANY and isinstance(value, list):
            found = found.union(*map(_keywords, value))
        elif name in _ONE:
            found |= _keywords(value)
    return found
