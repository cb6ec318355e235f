"""Calls with brackets around their arguments: LFM2's `f(a="x")`, Gemma's `call:f{a:<|"|>x<|"|>}`. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from consumers.engines.local.child.forms.lark import (
    NAME,
    Argument,
    Rules,
    arguments_of,
    arguments_schema,
    in_order,
    json_of,
    one_of,
    quote,
    text_until,
)
from pipeline.wire.requests import FunctionSpec

_SCALARS = frozenset({"integer", "number", "boolean", "null"})


def python_call(function: FunctionSpec, rule: str) -> Iterator[str]:
    """As `Rules`: values are JSON, which the parser reads among Python's."""
    arguments = arguments_of(arguments_schema(function))
    yield f'{rule}: {quote(function.name)} "(" {rule}_in ")"'
    if arguments is None:
        yield f'{rule}_in: ({rule}_any ("," {rule}_any)*)?'
        yield f'{rule}_any: {NAME} "=" {json_of({})}'
        return
    members = [(f"{quote(one.name + '=')} {json_of(one.schema)}", one.required) for one in arguments]
    yield from in_order(members, quote(", "), f"{rule}_in")


def gemma_call(string: str, end: str = "") -> Rules:
    """Gemma's calls.

    Args:
        string: the expression of the mark around a string.
        end: an expression after a call.
    """
    return partial(_gemma_call, string, end)


def _gemma_call(string: str, end: str, function: FunctionSpec, rule: str) -> Iterator[str]:
    yield f"{rule}: {quote('call:' + function.name)} {rule}_in {end}"
    yield from _gemma_object(string, arguments_schema(function), f"{rule}_in", f"{rule}_any")
    yield from _gemma_any(string, f"{rule}_any")


def _gemma_object(string: str, schema: dict[str, Any], rule: str, other: str) -> Iterator[str]:
    """The rules of an object: the first one is `rule`. `other` is a rule that takes any value."""
    members = arguments_of(schema)
    if members is None:
        yield f'{rule}: "{{" ({NAME} ":" {other} ("," {NAME} ":" {other})*)? "}}"'
        return
    yield f'{rule}: "{{" {rule}_of "}}"'
    named = [(f"{quote(one.name + ':')} {rule}_{at}", one.required) for at, one in enumerate(members)]
    yield from in_order(named, quote(","), f"{rule}_of")
    for at, one in enumerate(members):
        yield from _gemma_value(string, one, f"{rule}_{at}", other)


def _gemma_value(string: str, member: Argument, rule: str, other: str) -> Iterator[str]:
    kind = member.schema.get("type")
    if member.choices is not None:
        yield f"{rule}: {string} {one_of(member.choices)} {string}"
    elif member.is_string:
        yield f"{rule}: {string} {rule}_text"
        yield from text_until(string, f"{rule}_text")
    elif isinstance(kind, str) and kind in _SCALARS:
        yield f"{rule}: {json_of(member.schema)}"
    elif kind == "array" and isinstance(member.schema.get("items"), dict):
        yield f'{rule}: "[" ({rule}_item ("," {rule}_item)*)? "]"'
        yield from _gemma_value(string, Argument("", member.schema["items"], required=True), f"{rule}_item", other)
    elif kind == "object":
        yield from _gemma_object(string, member.schema, rule, other)
    else:
        yield f"{rule}: {other}"


def _gemma_any(string: str, rule: str) -> Iterator[str]:
    yield (
        f"{rule}: {string} {rule}_text | {json_of({'type': ['number', 'boolean', 'null']})} "
        f'| "[" ({rule} ("," {rule})*)? "]" | "{{" ({NAME} ":" {rule} ("," {NAME} ":" {rule})*)? "}}"'
    )
    yield from text_until(string, f"{rule}_text")
