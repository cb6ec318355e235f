"""Whether an internal model may be asked now: it is loaded first, and a question that it is slow to answer is the last.

A server that is disconnected while it loads a model stops loading it, so neither a load nor a question is broken off.
"""

from __future__ import annotations

import math
from enum import StrEnum

# Ollama unloads a model five minutes after its last answer.
KEPT_S = 240.0
# Between two loads, where the first one failed.
RETRY_S = 10.0


class WarmStep(StrEnum):
    """What to do with a question: ask it, load the model and then ask it, or do without an answer."""

    ASK = "ask"
    LOAD = "load"
    SKIP = "skip"


class Warmth:
    """What is known of one model. One writer: the shell that asks it. Times are monotonic, in seconds.

    Args:
        at_once: how many questions may wait for their answers at a time.
    """

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._open = 0
        self._late = 0
        self._loading = False
        self._warm_until = -math.inf
        self._load_at = -math.inf

    def next(self, now: float) -> WarmStep:
        """What to do with a question now; `ASK` and `LOAD` count as begun, until `ended`."""
        if self._loading or self._late or self._open >= self._at_once:
            return WarmStep.SKIP
        if now < self._warm_until:
            self._open += 1
            return WarmStep.ASK
        if self._open or now < self._load_at:
            return WarmStep.SKIP
        self._open, self._loading = 1, True
        return WarmStep.LOAD

    def loaded(self, now: float, *, well: bool) -> None:
        """The load that began has ended."""
        self._loading = False
        self._warm_until, self._load_at = (now + KEPT_S, now) if well else (-math.inf, now + RETRY_S)

    def late(self) -> None:
        """A question is not answered in time. It goes on, and no other is begun before its end."""
        self._late += 1

    def ended(self, now: float, *, answered: bool, late: bool) -> None:
        """A question has ended. One without an answer shows that the model may not be loaded any more."""
        self._open -= 1
        self._late -= late
        if answered:
            self._warm_until = now + KEPT_S
        elif now < self._warm_until:
            self._warm_until, self._load_at = -math.inf, now + RETRY_S
