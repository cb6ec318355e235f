"""Calls with brackets around their arguments: LFM2's `[f(a="x")]`, Gemma's `call:f{a:<|"|>x<|"|>}`. No I/O.

A parser of mlx-lm turns values into JSON. Arguments come out one by one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from consumers.engines.local.child.calls.reading import Parser, Reader, Written, encoded, parsed


@dataclass(frozen=True)
class Brackets:
    """A format of this kind.

    Attributes:
        call: a regular expression of the opening of a call up to its bracket, with the group `name`.
        strings: a regular expression of a string, closed or not.
        before, after: what the parser wants around one call.
    """

    call: str
    strings: str
    before: str = ""
    after: str = ""


PYTHON: Final = Brackets(
    r"(?P<name>[A-Za-z_][\w.]*)\s*\(",
    r"""\"(?:[^"\\]|\\.)*(?:"|\\?\Z)|'(?:[^'\\]|\\.)*(?:'|\\?\Z)""",
    "[",
    "]",
)
GEMMA: Final = Brackets(r"call:\s*(?P<name>[\w.-]+)\s*\{", r'<\|"\|>.*?(?:<\|"\|>|\Z)')
GEMMA_QUOTE: Final = '<|"|>'
FUNCTION_GEMMA_QUOTE: Final = "<escape>"


def read_bracketed(brackets: Brackets, parse: Parser) -> Reader:
    """The reader of such a format, with its parser."""
    opening = re.compile(brackets.call, re.DOTALL)
    token = re.compile(rf"(?:{brackets.strings})|[()\[\]{{}},]", re.DOTALL)

    def read(body: str, ended: bool) -> list[Written]:  # noqa: FBT001 - as `Reader`
        calls, at = list[Written](), 0
        while (head := opening.search(body, at)) is not None:
            comma, end = _scan(body, head.end(), token)
            if end >= 0:
                arguments = _arguments(body[head.start() : end]) or body[head.end() - 1 : end]
            elif ended:
                arguments = body[head.end() - 1 :].rstrip()
            else:
                closing = ")" if body[head.end() - 1] == "(" else "}"
                arguments = _arguments(body[head.start() : comma] + closing)[:-1] if comma >= 0 else ""
            calls.append(Written(head["name"], arguments))
            at = end if end >= 0 else len(body)
        return calls

    def _arguments(call: str) -> str:
        found = parsed(parse, brackets.before + call + brackets.after)
        return encoded(found[0][1]) if found and isinstance(found[0][1], dict) else ""

    return read


def _scan(body: str, start: int, token: re.Pattern[str]) -> tuple[int, int]:
    """The last comma between the arguments that begin at start, and the end of the call; each -1 if it is absent."""
    depth, comma = 1, -1
    for found in token.finditer(body, start):
        mark = found[0]
        if mark in "([{":
            depth += 1
        elif mark in ")]}":
            depth -= 1
            if depth == 0:
                return comma, found.end()
        elif mark == "," and depth == 1:
            comma = found.start()
    return comma, -1


def parse_function_gemma(gemma4: Parser, function_gemma: Parser) -> Parser:
    """FunctionGemma's parser: Gemma 4's, which reads nested values, and its own where that one fails."""

    def parse(text: str) -> object:
        try:
            return gemma4(text.replace(FUNCTION_GEMMA_QUOTE, GEMMA_QUOTE))
        except ValueError:
            return function_gemma(text)

    return parse
