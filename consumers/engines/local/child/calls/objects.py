"""Calls that are JSON: whole objects (`{"name": ..., "arguments": {...}}`), or arguments after a header. No I/O."""

from __future__ import annotations

import json
import re
from typing import Any, Final, NamedTuple

from consumers.engines.local.child.calls.reading import Reader, Written, as_json, balanced

_NAMES: Final = frozenset({"name", "tool_name"})
_ARGUMENTS: Final = frozenset({"arguments", "parameters", "args"})
_IDS: Final = frozenset({"id", "call_id", "tool_call_id"})
_INNER: Final = frozenset({"function", "tool", "function_call"})
_KEY: Final = re.compile(r'[\s,]*"([^"\\]*(?:\\.[^"\\]*)*)"\s*:\s*', re.DOTALL)
_STRING: Final = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_SCALAR: Final = re.compile(r"[^\s,}\]]+(?=[\s,}\]])")
_CLOSE: Final = re.compile(r"[\s,]*}")
_SPACE: Final = re.compile(r"\s*")
_DEEPEST: Final = 4
"""How deep an object that says what is called may be in others. Models that repeat themselves write thousands."""


class _Value(NamedTuple):
    """A value of a JSON object, as text. `end` is -1 if it is not complete."""

    text: str
    end: int


class _Members:
    """The members of an object that say what is called, as far as they are written."""

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.name: str | None = None
        self.id = ""
        self.arguments: _Value | None = None

    def take(self, key: str, value: _Value) -> None:
        if value.end < 0 and key not in _ARGUMENTS:
            return
        if key in _NAMES or (key in _INNER and value.text.startswith('"')):
            self.name = _string(value.text)
        elif key in _IDS:
            self.id = _string(value.text) or ""
        elif key in _ARGUMENTS:
            self.arguments = value

    def call(self, *, complete: bool, ended: bool) -> Written | None:
        """The call, None if its name is not known, or if it is not known yet whether it has arguments."""
        if not self.name:
            return None
        if self.arguments is None:
            return Written(self.name, "{}", self.id) if complete else None
        text, end = self.arguments
        if not text.startswith("{"):
            # A string with JSON in it, as some templates show it, or what is no object: given as text.
            return Written(self.name, _inner(text), self.id) if end >= 0 else None
        return Written(self.name, as_json(text, ended=end >= 0 or ended), self.id)


def read_objects(body: str, ended: bool) -> list[Written]:  # noqa: FBT001 - as `Reader`
    """As `Reader`: one object, several, or a list of them. What is between them is ignored."""
    calls, at = list[Written](), 0
    while (at := body.find("{", at)) >= 0:
        members = _Members()
        end = _walk(body, at, members)
        call = members.call(complete=end >= 0, ended=ended)
        if call is None and (end < 0 or not ended):
            break
        if call is not None:
            calls.append(call)
        if end < 0:
            break
        at = end
    return calls


def _walk(body: str, start: int, members: _Members, depth: int = 0) -> int:
    """Read the members of the object at start. Returns where it ends, -1 if it is not complete."""
    at = start + 1
    while (key := _KEY.match(body, at)) is not None:
        at = key.end()
        members.keys.add(key[1])
        if key[1] in _INNER and body.startswith("{", at) and depth < _DEEPEST:
            at = _walk(body, at, members, depth + 1)
        else:
            value = _value(body, at)
            members.take(key[1], value)
            at = value.end
        if at < 0:
            return -1
    if (close := _CLOSE.match(body, at)) is not None:
        return close.end()
    # What follows is no member: the object ends where its brackets do, whatever is in it.
    return balanced(body, start)


def _value(body: str, at: int) -> _Value:
    if body.startswith(("{", "["), at):
        end = balanced(body, at)
    else:
        found = (_STRING if body.startswith('"', at) else _SCALAR).match(body, at)
        end = found.end() if found else -1
    return _Value(body[at:end] if end >= 0 else body[at:], end)


def _string(text: str) -> str | None:
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, str) else None


def _inner(text: str) -> str:
    inner = _string(text)
    if inner is None:
        return "{}" if text == "null" else text
    return as_json(inner, ended=True)


def read_headed(header: str) -> Reader:
    """The reader of calls whose JSON arguments follow a header.

    Args:
        header: a regular expression with the group `name`, and perhaps `id`. The arguments begin where it ends, or at
            its group `arguments`, which looks ahead.
    """
    pattern = re.compile(header, re.DOTALL)

    def read(body: str, ended: bool) -> list[Written]:  # noqa: FBT001 - as `Reader`
        calls, at = list[Written](), 0
        while (head := pattern.search(body, at)) is not None:
            start = _skip_space(body, head.end())
            arguments, at = _headed(body, start, pattern, ended=ended)
            calls.append(Written(head["name"], arguments, head.groupdict().get("id") or ""))
        return calls

    return read


def _headed(body: str, start: int, pattern: re.Pattern[str], *, ended: bool) -> tuple[str, int]:
    """The arguments from start, and where to look for the next header."""
    if body.startswith("{", start):
        end = balanced(body, start)
        if end >= 0:
            return as_json(body[start:end], ended=True), end
        # Never closed, and another call follows: these arguments are no JSON.
        following = pattern.search(body, start) if ended else None
        stop = following.start() if following else len(body)
        return as_json(body[start:stop].rstrip() if ended else body[start:], ended=ended), stop
    if not ended:
        return "", len(body)
    following = pattern.search(body, start)
    stop = following.start() if following else len(body)
    return _bare(body[start:stop]), stop


def _skip_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _bare(text: str) -> str:
    """Arguments that are no object: none, or text without the marks after it."""
    return re.sub(r"<[^<>]*>\s*\Z|```\s*\Z", "", text.strip()).strip() or "{}"


class Peek(NamedTuple):
    """An object as far as it is written: its keys and those of its `function`, what it calls, and where it ends."""

    keys: frozenset[str]
    name: str | None
    call: Written | None
    end: int


def peek(body: str, start: int) -> Peek:
    """Look at the object that begins at start. `name` and `call` are None if they are not known, `end` is then -1."""
    members = _Members()
    end = _walk(body, start, members)
    call = members.call(complete=end >= 0, ended=False)
    return Peek(frozenset(members.keys), members.name, call, end)


def is_object(text: str) -> bool:
    """Whether text is a JSON object."""
    try:
        value: Any = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict)
