"""How fast an engine reads prompts and steps its batch, as measured: the basis of how much it does at once.

Other programs slow a measurement down, and none speeds one up. So an average follows a quicker measurement sooner than
a slower one. Else one busy moment, such as the start of the other processes, would lead to small pieces of prompts, and
small pieces, which take about as long as larger ones, to a low rate from then on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

_QUICKER_WEIGHT: Final = 0.5
_SLOWER_WEIGHT: Final = 0.1
"""The weight of the latest measurement in an average, where it is quicker and where it is slower."""

_FULL_WEIGHT_TOKENS: Final = 32
"""A slow piece of fewer tokens counts for less: its duration is mostly that of any pass through the model."""

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
        if mean is None:
            self._reading[level] = rate
        elif rate > mean:
            self._reading[level] = mean + _QUICKER_WEIGHT * (rate - mean)
        else:
            self._reading[level] = mean + _SLOWER_WEIGHT * min(1.0, tokens / _FULL_WEIGHT_TOKENS) * (rate - mean)

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
        mean = self._steps.get(width, seconds)
        weight = _QUICKER_WEIGHT if seconds < mean else _SLOWER_WEIGHT
        self._steps[width] = mean + weight * (seconds - mean)

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

    def least_step_s(self, width: int) -> float:
        """What a step for so many sequences takes at least: as long as one for fewer; 0 if none such was measured."""
        return max((seconds for known, seconds in self._steps.items() if known <= width), default=0.0)

    def width_within(self, seconds: float, most: int) -> int:
        """The most sequences, `most` at most and 1 at least, that one step is expected to serve within seconds."""
        return next((width for width in range(most, 1, -1) if self.step_s(width) <= seconds), 1)
