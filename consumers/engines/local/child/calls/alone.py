"""Calls that a model writes as plain text, without the marks of its family. No I/O.

Small models answer `{"name": "f", "arguments": {...}}`, perhaps in a fenced block. It is a call if it is all that was
said, is JSON, and names a tool of the request.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from consumers.engines.local.child.calls.objects import Peek, is_object, peek
from consumers.engines.local.child.calls.reading import Written

_OPENING: Final = re.compile(
    r"\s*(?:```[A-Za-z_-]{0,16}\s*)?(?:<(?:tools?|tool_calls?|function_calls?|functions?)>\s*)?(?=\{|\[\s*(?:\{|\Z))"
)
_OPENING_SO_FAR: Final = re.compile(
    r"\s*(?:`{0,2}\Z|```[A-Za-z_-]{0,16}\s*)?(?:<[a-z_]{0,15}(?:\Z|>\s*))?\Z",
)
_CLOSING: Final = re.compile(r"[\s;,\]]*(?:</[a-z_]{0,15}>)?\s*(?:```)?\s*")
# Each call may have a list, a fence and a tag of its own.
_APART: Final = r"(?:[\s;,\[\]]|```[A-Za-z_-]{0,16}(?=\s)|</?[a-z_]{1,15}>)*"
_CLOSING_SO_FAR: Final = re.compile(_APART + r"(?:`{1,3}|```[A-Za-z_-]{0,16}|</?[a-z_]{0,15})?\Z")
_BETWEEN: Final = re.compile(_APART + r"(?=\{)")
_EXPLICIT: Final = frozenset({"arguments", "args"})
_KEYS: Final = frozenset({"name", "tool", "tool_name", "parameters", "type", "id", "function"}) | _EXPLICIT


class LoneCalls:
    """Holds the text of an answer back as long as it can be such a call.

    Args:
        properties: the names of the arguments of each tool of the request; None where any is allowed.
    """

    def __init__(self, properties: Mapping[str, frozenset[str] | None]) -> None:
        self._properties = properties
        self._held = ""
        self._decided = False
        self._checked = 0

    def push(self, chunk: str) -> str:
        """The text that is certainly no call."""
        if self._decided:
            return chunk
        self._held += chunk
        # The checks read the text from its start, so they are done again only after it has grown by a part.
        if len(self._held) - self._checked <= self._checked // 64:
            return ""
        self._checked = len(self._held)
        return "" if self._possible() else self.release()

    def release(self) -> str:
        """The text that was held back, as text. What follows is text, too."""
        self._decided = True
        held, self._held = self._held, ""
        return held

    def calls(self) -> list[Written]:
        """At the end of the answer: the calls that it consists of. Empty if it is text: see `release`."""
        opening = _OPENING.match(self._held)
        if self._decided or opening is None:
            return []
        objects, rest = self._objects(opening.end())
        if not objects or rest is None or _CLOSING.fullmatch(rest) is None:
            return []
        calls = [one.call for one in objects if one.call is not None and self._is_call(one)]
        if len(calls) < len(objects):
            return []
        self._decided, self._held = True, ""
        return calls

    def _possible(self) -> bool:
        """Whether the text so far can become calls and nothing else."""
        opening = _OPENING.match(self._held)
        if opening is None:
            return _OPENING_SO_FAR.match(self._held) is not None
        objects, rest = self._objects(opening.end())
        if not all(self._may_be(one) for one in objects):
            return False
        if not objects:
            return True  # the bracket of a list
        return rest is None or _CLOSING_SO_FAR.fullmatch(rest) is not None

    def _objects(self, start: int) -> tuple[list[Peek], str | None]:
        """The objects from start, and the text after the last one; None if that one is not complete."""
        objects = list[Peek]()
        while (found := _BETWEEN.match(self._held, start)) is not None:
            objects.append(peek(self._held, found.end()))
            start = objects[-1].end
            if start < 0:
                return objects, None
        return objects, self._held[start:]

    def _may_be(self, one: Peek) -> bool:
        return one.keys <= _KEYS and (one.end < 0 if one.name is None else one.name in self._properties)

    def _is_call(self, one: Peek) -> bool:
        if one.call is None or not self._may_be(one) or not is_object(one.call.arguments):
            return False
        if not one.keys.isdisjoint(_EXPLICIT):
            return True
        # A tool's own description has `parameters`, too.
        known = self._properties[one.call.name]
        return "parameters" in one.keys and (known is None or peek(one.call.arguments, 0).keys <= known)


def properties_of(tools: list[dict[str, Any]]) -> dict[str, frozenset[str] | None]:
    """The names of the arguments of each tool, None where its schema does not limit them."""
    found: dict[str, frozenset[str] | None] = {}
    for tool in tools:
        function = tool.get("function") or {}
        properties = (function.get("parameters") or {}).get("properties")
        limited = isinstance(properties, dict) and bool(properties)
        found[str(function.get("name"))] = frozenset(properties or ()) if limited else None
    return found
