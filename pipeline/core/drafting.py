"""Whether a draft model proposes the next tokens of an answer: decided by the tokens per second with and without it."""

from __future__ import annotations

from typing import Final

MEASURED_STEPS: Final = 8
"""A rate is that of so many steps in a row."""

GAIN: Final = 1.05
"""Proposals must yield this many times the tokens per second of plain steps."""

AGAIN_TOKENS: Final = 256
"""How many tokens later the way that is not in use is measured again: texts differ, and the load of the machine too."""


class DraftPolicy:
    """The decision for one engine. One writer: its batch.

    It is told of each step of an answer that is written alone. Such steps come in blocks, with or without proposals.
    After a block, the quicker way is chosen; the other one is tried for a block if it was not measured lately.

    Args:
        most: how many tokens are proposed at once.

    Attributes:
        drafted: the tokens that were proposed.
        accepted: those of them that became part of an answer.
    """

    def __init__(self, most: int) -> None:
        self.drafted = self.accepted = 0
        self._most = most
        self._drafts = False
        self._rates: dict[bool, float] = {}
        self._measured_at: dict[bool, int] = {}
        self._written = 0
        self._steps = self._tokens = 0
        self._seconds = 0.0

    def count(self) -> int:
        """How many tokens are to be proposed for the next step; 0 for a plain step."""
        return self._most if self._drafts else 0

    def stepped(self, tokens: int, seconds: float, *, drafted: int = 0) -> None:
        """A step has written so many tokens, after a proposal of `drafted` ones.

        Args:
            tokens: one more than were accepted.
            seconds: that the step took, with the proposal.
            drafted: the proposed tokens; 0 for a plain step.
        """
        if drafted:
            self.drafted += drafted
            self.accepted += tokens - 1
        self._written += tokens
        self._steps += 1
        self._tokens += tokens
        self._seconds += seconds
        if self._steps == MEASURED_STEPS:
            self._end_block()

    def _end_block(self) -> None:
        self._rates[self._drafts] = self._tokens / max(self._seconds, 1e-9)
        self._measured_at[self._drafts] = self._written
        self._steps = self._tokens = 0
        self._seconds = 0.0
        other = not self._drafts
        if other not in self._rates or self._written - self._measured_at[other] >= AGAIN_TOKENS:
            self._drafts = other
        else:
            self._drafts = self._rates[True] >= GAIN * self._rates[False]
