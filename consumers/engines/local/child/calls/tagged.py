"""Calls with a tag around each argument, as Qwen3-Coder, GLM, MiniMax and others write them. No I/O.

A parser of mlx-lm turns values into JSON by the tool's schema. Arguments come out one by one. Those that are strings by
their schema come out while they are written.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from consumers.engines.local.child.calls.reading import Parser, Written, encoded, parsed

_NULLS: Final = ("null", "none", "nil")


@dataclass(frozen=True)
class Tags:
    """The tags of a format.

    Attributes:
        call: a regular expression of the opening of a call, with the group `name`.
        call_end: the end of a call; empty if it is the end of the section.
        value: a regular expression of the opening of a value, with the group `key`.
        value_end: the end of a value.
        strip: what the parser takes off a string's ends: all white space, or (`False`) one line break.
        strings: whether the parser leaves a value that its schema calls a string as it is.
    """

    call: str
    call_end: str
    value: str
    value_end: str
    strip: bool = True
    strings: bool = True


@dataclass(frozen=True)
class TaggedReader:
    """The reader of a tagged format: a `Reader`.

    Args:
        tags: of the format.
        parse: its parser.
        string_keys: the arguments of a function that are strings by its schema.
    """

    tags: Tags
    parse: Parser
    string_keys: Callable[[str], frozenset[str]]

    def __call__(self, body: str, ended: bool) -> list[Written]:  # noqa: FBT001 - as `Reader`
        """As `Reader`."""
        tags, calls, at = self.tags, list[Written](), 0
        call_at = re.compile(tags.call, re.DOTALL)
        while (opening := call_at.search(body, at)) is not None:
            name = opening["name"].strip()
            end = body.find(tags.call_end, opening.end()) if tags.call_end else -1
            stop = len(body) if end < 0 else end
            segment = body[opening.start() : stop]
            if end >= 0 or ended:
                arguments = _whole(parsed(self.parse, segment + tags.call_end), segment)
            else:
                arguments = self._begun(segment, opening.end() - opening.start(), name)
            calls.append(Written(name, arguments))
            at = stop + len(tags.call_end)
        return calls

    def _begun(self, segment: str, inside: int, name: str) -> str:
        """The arguments of a call that goes on; they begin at `inside`."""
        tags = self.tags
        closed = segment.rfind(tags.value_end)
        closed = inside if closed < 0 else closed + len(tags.value_end)
        found = parsed(self.parse, segment[:closed] + tags.call_end) if closed > inside else []
        arguments: Any = found[0][1] if found else {}
        if closed > inside and not (isinstance(arguments, dict) and arguments):
            return ""
        text = encoded(arguments)[:-1] if arguments else ""
        opening = re.compile(tags.value, re.DOTALL).search(segment, closed)
        if opening is None or not tags.strings or opening["key"].strip() not in self.string_keys(name):
            return text
        partial = _partial(segment[opening.end() :], tags)
        if not partial:
            return text
        return f"{text or '{'}{',' if arguments else ''}{encoded(opening['key'].strip())}:{encoded(partial)[:-1]}"


def _whole(found: list[tuple[str, Any]], segment: str) -> str:
    """The arguments of a complete call. Those that the parser cannot read are given as text."""
    if not found:
        return segment
    return found[0][1] if isinstance(found[0][1], str) else encoded(found[0][1])


def _partial(value: str, tags: Tags) -> str:
    """The part of a string that is certain: without what may be its end."""
    tail = max((n for n in range(1, len(tags.value_end)) if value.endswith(tags.value_end[:n])), default=0)
    value = value[: len(value) - tail]
    value = value.strip() if tags.strip else value.removeprefix("\n").removesuffix("\n")
    if any(word.startswith(value.casefold()) for word in _NULLS) or value.startswith("<![CDATA["):
        return ""
    return value
