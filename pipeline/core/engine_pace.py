"""How fast an engine reads prompts and steps its batch, as measured: the basis of how much it does at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

_WEIGHT: Final = 0.3
"""The weight of the latest measurement in an average."""

_FULL_WEIGHT_TOKENS: Final = 16
"""A piece of fewer tokens counts for less: its duration is mostly that of any pass through the model."""

_DEPTH_STEP_TOKENS: Final = 256


def _level(depth: int) -> int:
    """The class of a depth: below 256 tokens, below 512, below 1,024, and so on."""
    return (depth // _DEPTH_STEP_TOKENS).bit_length()


@dataclass(slots=True)
class EnginePace:
    """Measured rates of one engine. One writer: its batch's planner. Times are seconds."""

    _reading: dict[int, float] = field(init=False, default_factory=dict)
    _steps: dict[int, float] = field(init=False, default_factory=dict)

    def was_read(self, tokens: int, depth: int, seconds: float) -> None:
        """A piece of so many prompt tokens, padding included, was read at this depth."""
        if tokens <= 0 or seconds <= 0:
            return
        level = _level(depth)
        mean, rate = self._reading.get(level), tokens / seconds
        weight = _WEIGHT * min(1.0, tokens / _FULL_WEIGHT_TOKENS)
        self._reading[level] = rate if mean is None else mean + weight * (rate - mean)

    def reading_rate(self, depth: int) -> float | None:
        """Prompt tokens per second at this depth; None if none was measured. Reading slows down with depth.

        A depth that was not measured has the rate of the nearest one that was, the shallower of two.
        """
        level = _level(depth)
        nearest = min(self._reading, key=lambda known: (abs(known - level), known), default=None)
        return None if nearest is None else self._reading[nearest]

    def has_stepped(self, width: int, seconds: float) -> None:
        """A step for so many sequences took this long."""
        if width <= 0 or seconds <= 0:
            return
        mean = self._steps.get(width)
        self._steps[width] = seconds if mean is None else mean + _WEIGHT * (seconds - mean)

    def step_s(self, width: int) -> float:
        """The expected duration of a step for so many sequences; 0 if none was measured."""
        if not self._steps or width <= 0:
            return 0.0
        below = max((known for known in self._steps if known <= width), default=None)
        above = min((known for known in self._steps if known >= width), default=None)
        if below is None:
            return self._steps[min(self._steps)]
        if above is None:
            return self._steps[below] * width / below
        if above == below:
            return self._steps[below]
        part = (width - below) / (above - below)
        return self._steps[below] + part * (self._steps[above] - self._steps[below])

    def width_within(self, seconds: float, most: int) -> int:
        """The most sequences, `most` at most and 1 at least, that one step is expected to serve within seconds."""
        return next((width for width in range(most, 1, -1) if self.step_s(width) <= seconds), 1)
