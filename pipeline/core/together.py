"""Whether an engine still computes sequences together, after steps of its batch have failed.

A step that fails while several sequences run can be the fault of one of them, or of running them together. The
sequences run again one at a time. If the one at fault fails there, it is known. If all of them succeed and the next
batch fails as well, the batch is at fault: from then on each sequence is computed by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

_MOST: Final = 2
"""So many failures of batches in a row, without one of a single sequence between them, are the fault of batches."""


@dataclass(slots=True)
class BatchFaults:
    """The failures of one engine's steps. One writer: the engine's loop."""

    _in_a_row: int = field(init=False, default=0)

    def failed(self, sequences: int) -> bool:
        """A step with so many sequences failed. Returns whether batches are at fault."""
        self._in_a_row = self._in_a_row + 1 if sequences > 1 else 0
        return self._in_a_row >= _MOST
