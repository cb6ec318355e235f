"""A model's text, separated into reasoning, answer and tool calls by the marks that the model writes.

Pure. Text comes in pieces of any size. Text that could become a mark is held back. However a text is cut into pieces,
the same parts come out.

The white space around reasoning belongs to its marks: it is in no part. Blocks of one kind are joined by an empty line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Protocol

Kind = Literal["reasoning", "answer", "call"]
"""`call` is the raw text of a tool call with the marks around it. It is part of the answer's text, in its place."""

Place = Literal["reasoning", "answer", "between"]
"""Where the text ends: in reasoning, in the answer, or between the two, where the model has yet to say what follows."""

_GAP: Final = "\n\n"


class Stretch(NamedTuple):
    """A part of the text."""

    kind: Kind
    text: str


class Separator(Protocol):
    """Separates one text."""

    @property
    def place(self) -> Place:
        """Where the text ends at present."""
        ...

    def push(self, text: str) -> list[Stretch]:
        """The parts that text completes."""
        ...

    def flush(self) -> list[Stretch]:
        """What is still held back, at the end."""
        ...


def overlap(text: str, mark: str) -> int:
    """The length of the longest suffix of text that is a proper prefix of mark."""
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if mark.startswith(text[len(text) - n :])), 0)


class _Blocks:
    """Joins blocks of reasoning and of the answer, without the white space between them."""

    def __init__(self) -> None:
        self._kind: Kind = "answer"
        self._said: set[Kind] = set()
        self._fresh = True  # nothing of the present block came out
        self._only = True  # the present block is the first one
        self._space = ""

    def begin(self, kind: Kind, *, anew: bool = False) -> None:
        """A block begins. Text of the same kind goes on in the present block, unless it begins anew."""
        if kind != self._kind or anew:
            self._kind, self._fresh, self._only, self._space = kind, True, False, ""

    def add(self, text: str) -> list[Stretch]:
        """The part of the present block that text completes."""
        text = self._space + text
        if self._fresh and not self._only:
            text = text.lstrip()
        body = text.rstrip() if self._kind == "reasoning" or (self._fresh and not text.strip()) else text
        self._space = text[len(body) :]
        if not body:
            return []
        gap = _GAP if self._fresh and self._kind in self._said else ""
        self._fresh = False
        self._said.add(self._kind)
        return [Stretch(self._kind, gap + body)]

    def flush(self) -> list[Stretch]:
        """White space that is the whole text."""
        space, self._space = self._space, ""
        return [Stretch("answer", space)] if space and self._only else []


@dataclass(frozen=True)
class _Mark:
    text: str
    opens: Kind


class ThinkSeparator:
    """Reasoning stands between two marks, such as `<think>` and `</think>`.

    Args:
        start: the mark before reasoning.
        end: the mark after it.
        opened: whether the prompt ends with the first mark.
        silent: marks around the answer. They are in no part.
    """

    def __init__(self, start: str, end: str, *, opened: bool = False, silent: tuple[str, ...] = ()) -> None:
        marks = [_Mark(start, "reasoning"), *(_Mark(mark, "answer") for mark in silent)]
        self._marks: dict[Place, list[_Mark]] = {"answer": marks, "reasoning": [_Mark(end, "answer")]}
        self._place: Place = "reasoning" if opened else "answer"
        self._held = ""
        self._blocks = _Blocks()
        self._blocks.begin("reasoning" if opened else "answer")

    @property
    def place(self) -> Place:
        """As `Separator.place`."""
        return self._place

    def push(self, text: str) -> list[Stretch]:
        """As `Separator.push`."""
        self._held += text
        parts: list[Stretch] = []
        while found := self._first():
            at, mark = found
            before, self._held = self._held[:at], self._held[at + len(mark.text) :]
            parts += self._blocks.add(before)
            self._place = "reasoning" if mark.opens == "reasoning" else "answer"
            self._blocks.begin(mark.opens)
        keep = max(overlap(self._held, mark.text) for mark in self._marks[self._place])
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return parts + (self._blocks.add(ready) if ready else [])

    def flush(self) -> list[Stretch]:
        """As `Separator.flush`."""
        held, self._held = self._held, ""
        return (self._blocks.add(held) if held else []) + self._blocks.flush()

    def _first(self) -> tuple[int, _Mark] | None:
        """The mark that comes first, and where."""
        found = [(at, mark) for mark in self._marks[self._place] if (at := self._held.find(mark.text)) >= 0]
        return min(found, key=lambda pair: pair[0], default=None)


HARMONY_MARKS: Final = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")
_MESSAGE: Final = "<|message|>"
_ENDS: Final = ("<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>")
_HEADS: Final = ("<|start|>", "<|channel|>", "<|message|>", " to=", "to=")
_CHANNEL: Final = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT: Final = re.compile(r"\bto=([^\s<]+)")
CALL_HEAD: Final = "<|channel|>commentary to="
CALL_END: Final = "<|call|>"


class HarmonySeparator:
    """Messages with a header each, as GPT-OSS writes them; the prompt ends where the first header goes on.

    The channel `analysis` is reasoning, and each other one is part of the answer. A message to a function is a call:
    its text is `<|channel|>commentary to=NAME<|message|>ARGUMENTS<|call|>`, however the model wrote its header.

    Args:
        calls: whether functions are offered. If not, a message to one is part of the answer.
    """

    def __init__(self, *, calls: bool = False) -> None:
        self._calls = calls
        self._place: Place = "between"
        self._call = False
        self._opened = ""
        self._begun = False
        self._held = ""
        self._blocks = _Blocks()

    @property
    def place(self) -> Place:
        """As `Separator.place`."""
        return "between" if self._call else self._place

    def push(self, text: str) -> list[Stretch]:
        """As `Separator.push`."""
        self._held += text
        parts: list[Stretch] = []
        while True:
            if self._place == "between":
                if not self._head():
                    return parts
                if self._call:
                    parts.append(Stretch("call", self._opened))
            at, mark = self._end()
            if not mark:
                ready, self._held = self._held[:at], self._held[at:]
                return parts + self._body(ready)
            body, self._held = self._held[:at], self._held[at:].removeprefix(mark if mark in _ENDS[:3] else "")
            parts += self._body(body)
            if self._call:
                parts.append(Stretch("call", CALL_END))
            self._place, self._call = "between", False

    def flush(self) -> list[Stretch]:
        """As `Separator.flush`. A header that the model left incomplete is nothing."""
        if self._place == "between" and (self._begun or self._is_head()):
            return []
        held, self._held = self._held, ""
        return self._body(held) + self._blocks.flush()

    def _head(self) -> bool:
        """Read a header. Returns whether a message has begun."""
        head, found, rest = self._held.partition(_MESSAGE)
        if not self._begun and self._held and not self._may_be_head():
            self._begin("")  # no header at all
        elif found:
            self._held = rest
            self._begin(head)
        else:
            return False
        self._begun = True
        return True

    def _may_be_head(self) -> bool:
        return self._is_head() or any(mark.startswith(self._held) for mark in _HEADS)

    def _is_head(self) -> bool:
        return self._held.startswith(_HEADS)

    def _begin(self, head: str) -> None:
        recipient, channel = _RECIPIENT.search(head), _CHANNEL.search(head)
        self._call = self._calls and recipient is not None
        if self._call and recipient:
            self._place, self._opened = "answer", f"{CALL_HEAD}{recipient[1]}{_MESSAGE}"
        else:
            reasons = channel is not None and channel[1] == "analysis" and recipient is None
            self._place = "reasoning" if reasons else "answer"
            self._blocks.begin("reasoning" if reasons else "answer", anew=True)

    def _end(self) -> tuple[int, str]:
        """Where the body ends and by which mark; with no mark, how much of it certainly belongs to it."""
        found = [(at, mark) for mark in _ENDS if (at := self._held.find(mark)) >= 0]
        if found:
            return min(found)
        return len(self._held) - max(overlap(self._held, mark) for mark in _ENDS), ""

    def _body(self, text: str) -> list[Stretch]:
        if not text:
            return []
        return [Stretch("call", text)] if self._call else self._blocks.add(text)
