"""How many sequences an engine runs at once: as many as still raise its tokens per second.

A step for more sequences takes longer, and yields more tokens. Up to some width the tokens gain; beyond it only the
steps grow. The width is found by trying: a full batch is measured over some steps, then a wider one. The wider one
stays if it yields clearly more, and if its steps keep the inter-token target. Otherwise the former width comes back,
and the next trial is later each time. A narrower one is tried as well, and stays if it yields as much. What was
measured is forgotten when the same width becomes clearly slower or quicker, as with longer sequences.

While HIGH requests come, a step takes a third of the target at most: a HIGH prompt waits for the step that runs. The
width is never less than the first one. On a large model every step misses the target, and a narrow batch wastes most of
the step; and a burst that finds few places takes turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from pipeline.engine import FIRST_SLOTS

MOST_WIDTH: Final = 128
"""The width is not found beyond this one, unless the settings allow more."""


_TRIAL_STEPS: Final = 16
"""So many steps of a full batch are measured together. The median is not moved by a few that took longer."""

_FULL: Final = 7 / 8
"""A batch counts as full with this part of its width: a prompt that is being read has a place, and is in no step."""

_GAIN: Final = 1.05
"""A wider batch stays if it yields this many times the tokens."""

_NO_LOSS: Final = 0.98
"""A narrower batch stays if it yields this many times the tokens: each answer is written sooner in it."""

_BESIDE_HIGH: Final = 1 / 3
"""The part of the target that a step may take while HIGH requests come."""

_SLACK: Final = 1.1
"""Steps that take up to this many times what they should do not make a batch narrower."""

_DRIFT: Final = 1.3
"""A rate that differs by more than this from the one at the same width before has another cause than chance."""

_RETRY_S: Final = 30.0
_RETRY_MOST_S: Final = 900.0
"""A width that did not pay is tried again after this time, which doubles up to the second value."""


def first_width(cap: int) -> int:
    """The width with which an engine begins. cap is the most that the settings allow; 0 for no limit."""
    return min(FIRST_SLOTS, cap or FIRST_SLOTS)


def _levels(most: int) -> Iterator[int]:
    """The widths that are tried below the most: 8, 12, 16, 24, and so on."""
    width = FIRST_SLOTS
    while width < most:
        yield width
        width = width * 3 // 2 if width & (width - 1) == 0 else width * 4 // 3


@dataclass(slots=True)
class _Refused:
    """A width that did not pay, until when it is not tried again, and the pause after the next failure."""

    until: float
    pause_s: float


@dataclass(slots=True)
class WidthFinder:
    """The width of one engine's batch. One writer: its planner. Times are monotonic seconds.

    Args:
        target_s: the inter-token target.
        cap: the most sequences that the settings allow; 0 for no limit.

    Attributes:
        now: the width at present.
    """

    target_s: float
    cap: int = 0
    now: int = field(init=False)
    _levels: list[int] = field(init=False)
    _tried_from: int | None = field(init=False, default=None)
    _rates: dict[int, float] = field(init=False, default_factory=dict)
    _refused: dict[int, _Refused] = field(init=False, default_factory=dict)
    _sample: list[tuple[int, float]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        most, self.now = self.cap or MOST_WIDTH, first_width(self.cap)
        self._levels = sorted({*_levels(most), most})

    def has_stepped(self, width: int, seconds: float, *, high: bool, now: float) -> None:
        """A step for so many sequences took this long. `high`: whether HIGH requests come at present."""
        if not self.now * _FULL <= width <= self.now or seconds <= 0:
            return
        self._sample.append((width, seconds))
        if len(self._sample) >= _TRIAL_STEPS:
            rate = statistics.median(width / seconds for width, seconds in self._sample)
            step_s = statistics.median(seconds for _, seconds in self._sample)
            self._judge(rate, step_s, high=high, now=now)
            self._sample.clear()

    def _judge(self, rate: float, step_s: float, *, high: bool, now: float) -> None:
        """Choose the next width, after a full batch of this one has been measured."""
        self._note(rate)
        came_from, self._tried_from = self._tried_from, None
        below, above = self._beside()
        if came_from is not None and came_from > self.now and self._pays(came_from):
            self._refuse(came_from, now)
        if below is not None and self._too_slow(step_s, high=high):
            self._refuse(self.now, now)
            self.now = below
        elif came_from is not None and not self._pays(came_from):
            self._refuse(self.now, now)
            self.now = came_from
        elif above is not None and self._may_try(above, step_s, high=high, now=now):
            self._tried_from, self.now = self.now, above
        elif below is not None and self._is_due(below, now) and self._may_equal(below):
            self._tried_from, self.now = self.now, below

    def _note(self, rate: float) -> None:
        before = self._rates.get(self.now, rate)
        if max(rate / before, before / rate) > _DRIFT:
            self._rates.clear()
            self._refused.clear()
            self._tried_from = None
        self._rates[self.now] = (rate + self._rates.get(self.now, rate)) / 2

    def _pays(self, came_from: int) -> bool:
        before = self._rates.get(came_from)
        needed = _GAIN if came_from < self.now else _NO_LOSS
        return before is None or self._rates[self.now] >= needed * before

    def _may_equal(self, below: int) -> bool:
        """Whether a narrower batch yields as much, as far as is known."""
        return self._rates.get(below, self._rates[self.now]) >= _NO_LOSS * self._rates[self.now]

    def _too_slow(self, step_s: float, *, high: bool) -> bool:
        return step_s > _SLACK * self._bound_s(high=high)

    def _may_try(self, above: int, step_s: float, *, high: bool, now: float) -> bool:
        """Whether a wider batch is tried: its steps are expected to take at least as long as these."""
        return self._is_due(above, now) and step_s <= self._bound_s(high=high)

    def _bound_s(self, *, high: bool) -> float:
        return _BESIDE_HIGH * self.target_s if high else self.target_s

    def _beside(self) -> tuple[int | None, int | None]:
        """The next narrower and the next wider width."""
        at = self._levels.index(self.now)
        return self._levels[at - 1] if at else None, self._levels[at + 1] if at + 1 < len(self._levels) else None

    def _refuse(self, width: int, now: float) -> None:
        refused = self._refused.get(width)
        pause_s = refused.pause_s if refused else _RETRY_S
        self._refused[width] = _Refused(now + pause_s, min(2 * pause_s, _RETRY_MOST_S))

    def _is_due(self, width: int, now: float) -> bool:
        refused = self._refused.get(width)
        return refused is None or now >= refused.until
