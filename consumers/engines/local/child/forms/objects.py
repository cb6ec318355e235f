"""Calls whose arguments are JSON: in an object with the name, or after a header. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from consumers.engines.local.child.forms.lark import Rules, arguments_schema, as_json, json_of, quote
from pipeline.wire.requests import FunctionSpec


def in_object(name: str, arguments: str, after: str = "}", end: str = "") -> Rules:
    """A call as an object.

    Args:
        name: the text before the name.
        arguments: the text between the name and the arguments.
        after: the text after them.
        end: an expression that follows it.
    """
    return partial(_in_object, (name, arguments, after), end)


def after_header(before: str, between: str, after: str = "") -> Rules:
    """A call with a header. All are expressions: before the name, before the arguments, and after them."""
    return partial(_after_header, (before, between, after))


def _in_object(texts: tuple[str, str, str], end: str, function: FunctionSpec, rule: str) -> Iterator[str]:
    before, between, after = map(quote, texts)
    name = quote(as_json(function.name)[1:-1])
    yield f"{rule}: {before} {name} {between} {json_of(arguments_schema(function))} {after} {end}"


def _after_header(parts: tuple[str, str, str], function: FunctionSpec, rule: str) -> Iterator[str]:
    before, between, after = parts
    yield f"{rule}: {before} {quote(function.name)} {between} {json_of(arguments_schema(function))} {after}"
