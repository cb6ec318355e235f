"""What a reader of tool calls returns, and the scanning that readers share. No I/O."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Final, NamedTuple

_JSON_STRING: Final = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
# A string that is not closed reaches to the end of the text.
_JSON_TOKEN: Final = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[{}\[\]]', re.DOTALL)
_UNFINISHED: Final = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?\Z")
_CONTROLS: Final = re.compile(r"[\x00-\x1f]")


class Written(NamedTuple):
    """A tool call as far as it is written.

    Attributes:
        name: of the function.
        arguments: JSON, or the beginning of it. Text that is no JSON stays as the model wrote it.
        id: that the model gave the call; empty if it gave none.
    """

    name: str
    arguments: str
    id: str = ""


Reader = Callable[[str, bool], list[Written]]
"""Reads the text between the markers of a section, or its beginning, and whether it has ended.

A longer text has the same calls, and the last of them may have more arguments.
"""

Parser = Callable[[str], Any]
"""A parser of mlx-lm with the tools of the request: one call or a list of calls, each with `name` and `arguments`. It
may raise any exception."""


def balanced(text: str, start: int) -> int:
    """The end of the JSON object or array that begins at start; -1 if its end is not written yet."""
    depth = 0
    for token in _JSON_TOKEN.finditer(text, start):
        if token[0] in "{[":
            depth += 1
        elif token[0] in "}]":
            depth -= 1
            if depth <= 0:
                return token.end()
    return -1


def as_json(text: str, *, ended: bool) -> str:
    """JSON as a model wrote it, with the line breaks inside its strings escaped. Other text is returned as it is.

    An escape sequence at the end of text that goes on is left out.
    """
    if not ended:
        text = _UNFINISHED.sub("", text)
    return _JSON_STRING.sub(lambda string: _CONTROLS.sub(_escaped, string[0]), text)


def _escaped(control: re.Match[str]) -> str:
    return json.dumps(control[0])[1:-1]


def encoded(arguments: Any) -> str:
    """Arguments as compact JSON."""
    return json.dumps(arguments, ensure_ascii=False, separators=(",", ":"), default=str)


def parsed(parse: Parser, text: str) -> list[tuple[str, Any]]:
    """The names and arguments of the calls that a parser of mlx-lm finds; empty if it finds none."""
    try:
        found = parse(text)
        calls = found if isinstance(found, list) else [found]
        return [(str(call["name"]), call.get("arguments", {})) for call in calls]
    except Exception:
        return []


def read_whole(parse: Parser) -> Reader:
    """The reader of a format that only its parser knows: calls are read when the section has ended."""

    def read(body: str, ended: bool) -> list[Written]:  # noqa: FBT001 - as `Reader`
        if not ended:
            return []
        return [
            Written(name, arguments if isinstance(arguments, str) else encoded(arguments))
            for name, arguments in parsed(parse, body)
        ]

    return read
