"""The language of llguidance's grammars (Lark): texts, schemas and rules as expressions. Pure.

Source of the language: llguidance's documentation of its syntax.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from consumers.engines.local.child.schemas import narrowed
from pipeline.wire.requests import FunctionSpec

_JSON_OPTIONS: Final = {"whitespace_flexible": True, "whitespace_pattern": r"\x20|\n\x20{0,24}"}
"""White space between the tokens of JSON: one space, or a new line with its indentation. Unlimited white space would
let a small model fill its answer with it."""

_NO_ARGUMENTS: Final = {"type": "object", "properties": {}, "additionalProperties": False}
_DEFINITIONS: Final = ("$defs", "definitions")
ANY_TEXT: Final = r"/(.|\n)*/"
NAME: Final = "/[A-Za-z_][A-Za-z0-9_]{0,63}/"
"""The name of an argument, where a schema names none."""

Mark = Callable[[str], str]
"""Makes a marker an expression: `<[7]>` if it is the special token 7, else its text in quotes."""

Rules = Callable[[FunctionSpec, str], Iterator[str]]
"""The rules of a call of one function. The first one has the name that is given, and begins the names of the others."""


@dataclass(frozen=True)
class Argument:
    """An argument of a function: its schema can be read alone."""

    name: str
    schema: dict[str, Any]
    required: bool

    @property
    def choices(self) -> list[str] | None:
        """The strings that it may be; None if it is no enumeration of strings."""
        values = self.schema.get("enum")
        return values if isinstance(values, list) and values and all(isinstance(one, str) for one in values) else None

    @property
    def is_string(self) -> bool:
        """Whether it is a string, and nothing else."""
        return self.schema.get("type") == "string"


def as_json(value: Any) -> str:
    """A value as compact JSON."""
    return msgspec.json.encode(value).decode()


def quote(text: str) -> str:
    """A text as a Lark string; nothing for an empty one."""
    return as_json(text) if text else ""


_MARKS: Final = re.compile(r"(<[^<>\s]+>|｜DSML｜)")


def marked(text: str, mark: Mark) -> str:
    """A text in which whole tags may be tokens of their own, as an expression."""
    return " ".join(mark(part) if _MARKS.fullmatch(part) else quote(part) for part in _MARKS.split(text) if part)


def one_of(texts: list[str]) -> str:
    """One of several texts."""
    return "(" + " | ".join(quote(text) or '""' for text in texts) + ")"


def json_of(schema: dict[str, Any]) -> str:
    """JSON of a schema."""
    return f"%json {as_json({**schema, 'x-guidance': _JSON_OPTIONS})}"


def text_until(end: str, rule: str) -> Iterator[str]:
    """The rule of a text and its end, which is an expression: the first place where it occurs."""
    # No text has a special token.
    yield f"{rule}: {ANY_TEXT} {end}" if "<[" in end else f"{rule}[lazy]: {ANY_TEXT} {end}"


def arguments_schema(function: FunctionSpec) -> dict[str, Any]:
    """The schema of a function's arguments, always an object. A function without parameters takes none."""
    return narrowed({"type": "object", **function.parameters}) if function.parameters else _NO_ARGUMENTS


def arguments_of(schema: dict[str, Any]) -> list[Argument] | None:
    """The members of an object's schema; None if it names none and allows any."""
    named, required = schema.get("properties"), schema.get("required") or []
    if not named and schema.get("additionalProperties", True) is not False:
        return None
    definitions: dict[str, Any] = {key: schema[key] for key in _DEFINITIONS if key in schema}
    return [
        Argument(name, {**(one if isinstance(one, dict) else {}), **definitions}, name in required)
        for name, one in (named or {}).items()
    ]


def in_order(members: list[tuple[str, bool]], comma: str, rule: str) -> Iterator[str]:
    """The rules of members with commas between them: those that are not required may be left out.

    Args:
        members: the expression of each, and whether it is required.
        comma: an expression.
        rule: the name of the first rule.
    """
    for at, (member, required) in enumerate(members):
        first, more = (rule if at == 0 else f"{rule}_first_{at}"), f"{rule}_more_{at + 1}"
        yield f"{first}: {member} {more}" + ("" if required else f" | {rule}_first_{at + 1}")
        if at:
            yield f"{rule}_more_{at}: " + (f"{comma} {member} {more}" if required else f"({comma} {member})? {more}")
    if members:
        yield f'{rule}_first_{len(members)}: ""'
        yield f'{rule}_more_{len(members)}: ""'
    else:
        yield f'{rule}: ""'
