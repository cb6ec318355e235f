"""The tool calls of one answer: those between the marks of the model's family, and those without marks. No I/O."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from consumers.engines.local.child.calls.alone import LoneCalls, properties_of
from consumers.engines.local.child.calls.formats import CallFormat
from consumers.engines.local.child.calls.ids import nine_characters
from consumers.engines.local.child.calls.stream import CallParts, SectionSplitter
from pipeline.wire.answers import ToolCall


class AnswerCalls:
    """Takes the calls out of one answer, part by part.

    A part without a name continues the arguments of the call before it.

    Args:
        format_: how the model writes calls.
        tools: of the request, as the template sees them.
        request_id: ids of calls are made from it, so that an engine that resumes the answer makes the same.
        alone: whether a call without marks is a call.

    Attributes:
        notes: what became of text that was taken in another meaning.
    """

    def __init__(
        self, format_: CallFormat, tools: list[dict[str, Any]], request_id: str, *, alone: bool = True
    ) -> None:
        self._format = format_
        self._request_id = request_id
        self._splitter = SectionSplitter(format_.sections(tools), self._new_id, format_.marks)
        self._alone = LoneCalls(properties_of(tools)) if alone or format_.bare else None
        self._begun = 0
        self.notes: list[str] = []

    @property
    def begun(self) -> int:
        """How many calls have begun."""
        return self._begun

    @property
    def first_is_complete(self) -> bool:
        """Whether the first call is complete, as far as it is known."""
        return self._begun > 1 or self._splitter.closed

    def push(self, chunk: str) -> tuple[str, list[ToolCall]]:
        """The plain text, and the parts of calls, that chunk adds."""
        return self._plain(*self._splitter.push(chunk))

    def flush(self) -> tuple[str, list[ToolCall]]:
        """What remains at the end of the answer."""
        text, parts = self._plain(*self._splitter.flush())
        if self._alone is None:
            return text, parts
        found = self._alone.calls()
        if not found:
            return text + self._alone.release(), parts
        if not self._format.bare:
            names = ", ".join(dict.fromkeys(f"`{call.name}`" for call in found))
            self.notes.append(f"The model wrote its call of {names} as plain text. It is taken as a tool call.")
        return text, parts + CallParts(self._new_id).take(found)

    def _plain(self, text: str, parts: Sequence[ToolCall]) -> tuple[str, list[ToolCall]]:
        if self._alone is not None:
            text = self._alone.push(text) if text else ""
            if parts:
                # Not all that was said: the text before a call with marks is text. It is older than the call.
                text = self._alone.release() + text
        return text, list(parts)

    def _new_id(self, written: str) -> str:
        digest = hashlib.blake2b(f"{self._request_id}/{self._begun}".encode(), digest_size=12).hexdigest()
        self._begun += 1
        match self._format.ids:
            case "nine":
                return nine_characters(digest)
            case "model" if written:
                return written
            case _:
                return f"call_{digest}"
