"""Whether two engines are quicker together than the first one alone: measured, because they may share a machine.

On one CPU they share cores and memory, on a Mac the GPU. Each engine's rate is kept apart for the time in which the
other is idle and in which it is busy. Only times count in which the first engine has more work than slots: a spill is
considered then. The first engine is measured alone before anything is spilled, for two seconds of the first overload.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pipeline.core.waits import Capacity

# Together they must be quicker by this factor, or a spill is no gain.
_LEAST_GAIN = 1.05
# Rates follow a change of the other engine's state within this time.
_SETTLES_S = 1.0
# A rate is believed after so much time.
_BELIEVED_S = 1.0
# An engine that could not be measured alone in so much time of overload is not waited for.
_MOST_WAIT_S = 4.0
# Between two observations no more than this counts.
_LONGEST_STEP_S = 1.0
# After so many measured seconds an older measurement counts half.
_MEMORY_S = 30.0
# After a verdict against spilling, one more request is tried: other programs may have slowed both.
_TRY_AGAIN_S = 300.0
# HIGH waits for MLX longer if MLX writes more slowly than this part of its rate alone.
_SLOWED = 0.95


@dataclass(frozen=True, slots=True)
class SpillVerdict:
    """Why nothing is spilled now, empty if spilling may be a gain; and whether what was spilled is taken back."""

    keeps: str = ""
    takes_back: bool = False


@dataclass(slots=True)
class _Mean:
    """A mean over time, in which older times count less. The newest is whole."""

    total: float = 0.0
    seconds: float = 0.0

    def add(self, value: float, seconds: float) -> None:
        kept = 0.5 ** (seconds / _MEMORY_S)
        self.total, self.seconds = self.total * kept + value * seconds, self.seconds * kept + seconds

    @property
    def value(self) -> float | None:
        return self.total / self.seconds if self.seconds >= _BELIEVED_S else None


@dataclass(slots=True)
class SharedMachine:
    """The measurements. One writer: the monitor's loop. Times are monotonic seconds."""

    _alone: _Mean = field(init=False, default_factory=_Mean)
    _beside: _Mean = field(init=False, default_factory=_Mean)
    _other: _Mean = field(init=False, default_factory=_Mean)
    _busy: bool = field(init=False, default=False)
    _since: float = field(init=False, default=-math.inf)
    _loaded_s: float = field(init=False, default=0.0)
    _measures: bool = field(init=False, default=False)
    _seen_at: float | None = field(init=False, default=None)
    _judged_at: float | None = field(init=False, default=None)
    _models: object = field(init=False, default=None)

    def observe(self, first: Capacity, second: Capacity, now: float, *, loaded: bool, models: object = None) -> None:
        """Take in both engines' workers. The rates of other models are forgotten.

        Args:
            first: the first engine's workers.
            second: the second engine's.
            now: the time.
            loaded: whether the first engine has more work than slots.
            models: what both engines run, compared by equality.
        """
        if models != self._models:
            self._models = models
            self._alone, self._beside, self._other, self._judged_at = _Mean(), _Mean(), _Mean(), None
            self._loaded_s = 0.0
        busy = second.slots_used > 0
        passed_s = 0.0 if self._seen_at is None else max(0.0, now - self._seen_at)
        self._seen_at = now
        if busy is not self._busy:
            self._busy, self._since = busy, now
        self._measures = loaded and first.tokens_per_s > 0
        if not self._measures:
            return
        passed_s = min(passed_s, _LONGEST_STEP_S)
        self._loaded_s += passed_s
        if now - self._since < _SETTLES_S:
            return
        if not busy:
            self._alone.add(first.tokens_per_s, passed_s)
        elif second.tokens_per_s > 0:
            self._beside.add(first.tokens_per_s, passed_s)
            self._other.add(second.tokens_per_s, passed_s)

    @property
    def gain(self) -> float | None:
        """How much quicker both are together than the first alone; None until all three rates are believed."""
        alone, beside, other = self._alone.value, self._beside.value, self._other.value
        if not alone or beside is None or other is None:
            return None
        return (beside + other) / alone

    def judge(self, now: float, *, high: int) -> SpillVerdict:
        """Whether the first engine keeps its work although it is saturated. A spill that may be a gain is tried.

        Args:
            now: the time.
            high: the HIGH requests that wait for the first engine or run there. A slower engine answers them later.
        """
        if no_gain := self._no_gain(now):
            return SpillVerdict(no_gain, takes_back=True)
        alone, beside = self._alone.value, self._beside.value
        if self._measures and alone is None and not self._busy and self._loaded_s < _MOST_WAIT_S:
            return SpillVerdict("mlx is measured alone before a request spills")
        if high and alone is not None and beside is not None and beside < alone * _SLOWED:
            return SpillVerdict(
                f"ollama slows mlx to {beside:.0f} tokens/s from {alone:.0f}, and HIGH requests are there"
            )
        return SpillVerdict()

    def _no_gain(self, now: float) -> str:
        gain = self.gain
        if gain is None or gain >= _LEAST_GAIN:
            self._judged_at = None
            return ""
        if self._judged_at is None:
            self._judged_at = now
        if now - self._judged_at >= _TRY_AGAIN_S:
            self._beside, self._other, self._judged_at = _Mean(), _Mean(), None
            return ""
        alone, beside, other = self._alone.value or 0.0, self._beside.value or 0.0, self._other.value or 0.0
        return (
            f"ollama shares this machine: both together are no quicker "
            f"({beside:.0f} + {other:.0f} tokens/s, mlx alone {alone:.0f})"
        )
