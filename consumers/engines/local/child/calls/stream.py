"""From the text of an answer to its tool calls, part by part. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from consumers.engines.local.child.calls.reading import Reader, Written
from consumers.engines.local.child.separator import overlap
from pipeline.wire.answers import FunctionCall, ToolCall

_REREAD_SHARE: Final = 64
"""A section is read again when it has grown by one part in so many, so that long arguments cost linear time."""


@dataclass(frozen=True)
class Section:
    """A part of an answer that holds calls.

    Attributes:
        start: the marker before it.
        end: the marker after it; empty if it extends to the end of the answer.
        read: the reader of the text between them.
    """

    start: str
    end: str
    read: Reader


class CallParts:
    """What is new in the calls of one section, each time they are read.

    Args:
        new_id: makes the id of a call from the id that the model gave it, which may be empty.
    """

    def __init__(self, new_id: Callable[[str], str]) -> None:
        self._new_id = new_id
        self._sent: list[str] = []

    @property
    def begun(self) -> bool:
        """Whether a part of a call was returned."""
        return bool(self._sent)

    def take(self, calls: Sequence[Written]) -> list[ToolCall]:
        """The parts that are new: a call with its id and name, or more arguments of the last one, without them."""
        parts = []
        for index, call in enumerate(calls):
            arguments = _storable(call.arguments)
            if index == len(self._sent):
                self._sent.append(arguments)
                parts.append(ToolCall(FunctionCall(_storable(call.name), arguments), self._new_id(call.id)))
            elif index == len(self._sent) - 1 and len(arguments) > len(self._sent[-1]):
                sent = self._sent[-1]
                if arguments.startswith(sent):
                    parts.append(ToolCall(FunctionCall("", arguments[len(sent) :])))
                    self._sent[-1] = arguments
        return parts


def _storable(text: str) -> str:
    """Text without halves of characters, which JSON's escapes can make and UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode()


class SectionSplitter:
    """Takes the sections with calls out of an answer. A section in which no call begins stays text, with its markers.

    Args:
        sections: how the model writes calls.
        new_id: as in `CallParts`.
        marks: text of special tokens that belongs in sections. Outside of them it is dropped.

    Attributes:
        closed: whether a section with a call has ended.
    """

    def __init__(self, sections: Sequence[Section], new_id: Callable[[str], str], marks: Sequence[str] = ()) -> None:
        self._sections = sections
        self._new_id = new_id
        self._marks = [mark for mark in marks if all(mark != section.start for section in sections)]
        self._held = ""
        self._section: Section | None = None
        self._parts = CallParts(new_id)
        self._searched = 0
        self._read_chars = 0
        self._after_call = False
        self.closed = False

    def push(self, chunk: str) -> tuple[str, list[ToolCall]]:
        """The plain text, and the parts of calls, that chunk adds."""
        if not self._sections:
            return chunk, []
        self._held += chunk
        text, parts = "", list[ToolCall]()
        while True:
            if self._section is None:
                plain, found = self._outside()
                text += plain
                if not found:
                    break
            else:
                plain, more, found = self._inside(self._section)
                text += plain
                parts += more
                if not found:
                    break
        return text, parts

    def flush(self) -> tuple[str, list[ToolCall]]:
        """What remains at the end: a section whose end marker is missing, or text."""
        section, held = self._section, self._held
        self._held, self._section = "", None
        return (self._plain(held), []) if section is None else self._close(section, held, "")

    def _outside(self) -> tuple[str, bool]:
        """The text up to the next marker, and whether there is one."""
        found = [
            (at, -len(start), section)
            for section in self._sections
            for start in [section.start]
            if (at := self._held.find(start)) >= 0
        ]
        first = min(found, key=lambda one: one[:2], default=None)
        stray = [(at, mark) for mark in self._marks if (at := self._held.find(mark)) >= 0]
        if stray and (first is None or min(stray)[0] < first[0]):
            at, mark = min(stray)
            text, self._held = self._held[:at], self._held[at + len(mark) :]
            return self._plain(text), True
        if first is None:
            keep = max(overlap(self._held, mark) for mark in [*self._marks, *(one.start for one in self._sections)])
            text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
            return self._plain(text), False
        at, length, section = first
        text, self._held = self._held[:at], self._held[at - length :]
        self._section, self._parts = section, CallParts(self._new_id)
        self._searched = self._read_chars = 0
        return self._plain(text), True

    def _inside(self, section: Section) -> tuple[str, list[ToolCall], bool]:
        """The parts that are new, and whether the section has ended. Text if it had no call."""
        at = self._held.find(section.end, self._searched) if section.end else -1
        if at >= 0:
            body, self._held = self._held[:at], self._held[at + len(section.end) :]
            self._section = None
            return *self._close(section, body, section.end), True
        self._searched = max(0, len(self._held) - len(section.end))
        body = self._held[: len(self._held) - overlap(self._held, section.end)]
        if len(body) - self._read_chars <= self._read_chars // _REREAD_SHARE:
            return "", [], False
        self._read_chars = len(body)
        return "", self._parts.take(section.read(body, False)), False

    def _close(self, section: Section, body: str, end: str) -> tuple[str, list[ToolCall]]:
        parts = self._parts.take(section.read(body, True))
        if not self._parts.begun:
            return self._plain(section.start + body + end), []
        self._after_call = self.closed = True
        return "", parts

    def _plain(self, text: str) -> str:
        """The text, without white space that only separates calls."""
        if self._after_call:
            text = text.lstrip()
            self._after_call = not text
        return text
