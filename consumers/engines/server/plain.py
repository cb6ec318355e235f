"""Tool calls that a server's model writes as plain text: Ollama and other servers return them as text."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from consumers.engines.local.child.calls.alone import LoneCalls, properties_of
from consumers.engines.server.dialect import PartReader
from pipeline.core.server_pace import Timing
from pipeline.engine import Piece, Work
from pipeline.wire.answers import FunctionCall, ToolCall

NO_CALL: Final = "The answer calls no tool: the server ignored `tool_choice`."


class PlainCallReader:
    """Reads the parts of an answer with another reader, and takes text that is a call as a call.

    Text is held back as long as it can be one. An answer of a given form, the rest of an answer and an answer with
    log-probabilities keep their text: `reader_of` leaves them alone.

    Args:
        reader: of the server's API.
        work: what the server answers. It offers tools.

    Attributes:
        timing: as `PartReader.timing`.
    """

    def __init__(self, reader: PartReader, work: Work) -> None:
        self.timing: Timing | None = None
        self._reader = reader
        self._lone = LoneCalls(properties_of(msgspec.to_builtins(work.request.tools)))
        self._id = f"call_{work.id.replace('.', '_')}"

    def read(self, part: dict[str, Any]) -> Piece:
        """As `PartReader.read`."""
        piece = self._reader.read(part)
        self.timing = self._reader.timing
        piece.text = self._lone.push(piece.text)
        if piece.tool_calls:
            piece.text = self._lone.release() + piece.text
        elif piece.usage is not None:
            self._end(piece)
        return piece

    def _end(self, piece: Piece) -> None:
        found = self._lone.calls()
        if not found:
            piece.text += self._lone.release()
            return
        piece.tool_calls = [
            ToolCall(FunctionCall(call.name, _storable(call.arguments)), id=f"{self._id}_plain_{number}")
            for number, call in enumerate(found, 1)
        ]
        names = ", ".join(dict.fromkeys(f"`{call.name}`" for call in found))
        piece.notes = [note for note in piece.notes if note != NO_CALL]
        piece.notes.append(f"The model wrote its call of {names} as plain text. It is taken as a tool call.")
        if piece.finish_reason == "stop":
            piece.finish_reason = "tool_calls"


def reader_of(reader: PartReader, work: Work, *, plain_calls: bool) -> PartReader:
    """The reader of an answer, whose text may be a call if the settings allow it."""
    request = work.request
    calls = bool(request.tools) and request.tool_choice != "none"
    keeps_text = request.constraint is not None or request.alternatives is not None or bool(work.resume_text)
    return PlainCallReader(reader, work) if plain_calls and calls and not keeps_text else reader


def _storable(text: str) -> str:
    """Text without halves of characters, which JSON's escapes can make and UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode()
