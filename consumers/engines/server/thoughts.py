"""What a model thinks anew, where an attempt before broke off in its thoughts. No I/O."""

from __future__ import annotations

from typing import Any, Final

from consumers.engines.server.dialect import PartReader
from pipeline.core.server_pace import Timing
from pipeline.engine import Piece

_GAP: Final = "\n\n"


class ThoughtsAnew:
    """Reads the parts of an answer with another reader, and leaves out the thoughts that the client has.

    A server begins such an answer again. If the model thinks the same, only the rest is new. Other thoughts follow
    whole, after an empty line.

    Args:
        reader: of the server's API.
        had: the thoughts that the client has.

    Attributes:
        timing: as `PartReader.timing`.
    """

    def __init__(self, reader: PartReader, had: str) -> None:
        self.timing: Timing | None = None
        self._reader = reader
        self._had = had
        self._left = had

    def read(self, part: dict[str, Any]) -> Piece:
        """As `PartReader.read`."""
        piece = self._reader.read(part)
        self.timing = self._reader.timing
        if self._left:
            piece.reasoning = self._new(piece.reasoning)
        return piece

    def _new(self, thought: str) -> str:
        common = min(len(self._left), len(thought))
        if thought[:common] == self._left[:common]:
            self._left = self._left[common:]
            return thought[common:]
        repeated, self._left = self._had[: len(self._had) - len(self._left)], ""
        return _GAP + repeated + thought
