"""How fast a model server answers: measured from the figures that come with each of its answers.

Ollama reports for each answer how many tokens it read and wrote, and how long reading, writing and loading the model
took. Servers of OpenAI's API report the numbers of tokens alone: there, the times are those in which the parts of the
answer came. Each kind of figure is a pair of decayed sums, of tokens and of seconds, so that an answer of 2 tokens
weighs less than one of 200, and a new figure weighs more than old ones. Nothing is assumed: a rate is 0 until it is
measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

# After so many measured seconds an older measurement counts half.
_MEMORY_S = 20.0
# The share of the latest answer in the mean length of answers and prompts.
_NEW_SHARE = 0.2
# A shorter loading time is that of a model in memory.
_LOADED_WITHIN_S = 0.25
# A running answer shows a rate once it has so many parts, over this time.
_SHOWN_PARTS = 5
_SHOWN_S = 0.25


@dataclass(frozen=True, slots=True)
class Timing:
    """What a server reports about one finished answer. Times are seconds.

    `writing_s` is None where the server reports counts and no times.
    """

    tokens: int
    writing_s: float | None
    prompt_tokens: int = 0
    reading_s: float = 0.0
    loading_s: float = 0.0


@dataclass(slots=True)
class _Rate:
    """Amounts and seconds, decayed alike. The newest measurement is whole."""

    amount: float = 0.0
    seconds: float = 0.0

    def add(self, amount: float, seconds: float) -> None:
        if amount <= 0 or seconds <= 0:
            return
        kept = 0.5 ** (seconds / _MEMORY_S)
        self.amount, self.seconds = self.amount * kept + amount, self.seconds * kept + seconds

    @property
    def per_s(self) -> float:
        return self.amount / self.seconds if self.seconds else 0.0


@dataclass(slots=True)
class _Figures:
    """What is known of one model. Means are 0 until an answer was whole; `loading_s` is None until it was measured."""

    writing: _Rate = field(default_factory=_Rate)
    answer: _Rate = field(default_factory=_Rate)
    reading: _Rate = field(default_factory=_Rate)
    tokens: float = 0.0
    prompt_tokens: float = 0.0
    loading_s: float | None = None


@dataclass(slots=True)
class _Running:
    """An answer that has begun. `first_at` is when its first part came, None before."""

    model: str
    began_at: float
    limit: int
    first_at: float | None = None
    parts: int = 0
    width_before: float = 0.0

    def timed(self, timing: Timing, now: float, *, loads: bool) -> Timing:
        """The figures of an answer, with the times that were seen in place of times that the server does not report.

        `loads`: the model may have been loaded for the answer. How long its prompt was read is not known then.
        """
        if timing.writing_s is not None:
            return timing
        first_at = now if self.first_at is None else self.first_at
        # From the first part to the last, all tokens but those of one part are written.
        writing_s = (now - first_at) * self.parts / (self.parts - 1) if self.parts > 1 else 0.0
        return replace(timing, writing_s=writing_s, reading_s=0.0 if loads else first_at - self.began_at)


@dataclass(frozen=True, slots=True)
class ModelPace:
    """The figures of one model now; 0 means not measured yet.

    Attributes:
        tokens_per_s: how fast the server writes, all answers together.
        answer_tokens_per_s: how fast it writes one answer, beside those that ran with it.
        prompt_tokens_per_s: how fast it reads.
        tokens_per_request, prompt_tokens_per_request: of an average request.
        loading_s: how long the next answer waits until the model is loaded; 0 if it is.
    """

    tokens_per_s: float = 0.0
    answer_tokens_per_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    tokens_per_request: float = 0.0
    prompt_tokens_per_request: float = 0.0
    loading_s: float = 0.0


@dataclass(slots=True)
class ServerPace:
    """The measurements of one server. One writer: its engine, with `now` from one monotonic clock, in seconds."""

    _models: dict[str, _Figures] = field(init=False, default_factory=dict)
    _running: dict[str, _Running] = field(init=False, default_factory=dict)
    _loaded: frozenset[str] | None = field(init=False, default=None)
    # The integral of the number of answers that are being written, over time.
    _width: float = field(init=False, default=0.0)
    _counted_at: float = field(init=False, default=0.0)

    @property
    def in_flight(self) -> int:
        """The requests that have begun and not ended."""
        return len(self._running)

    def begun(self, key: str, model: str, now: float, *, limit: int) -> None:
        """A request of at most `limit` tokens was sent to the server."""
        self._count(now)
        self._running[key] = _Running(model, now, limit)

    def part(self, key: str, now: float) -> None:
        """A part of an answer has come. A part is one token, as far as the server has said."""
        running = self._running.get(key)
        if running is None:
            return
        if running.first_at is None:
            self._count(now)
            running.first_at, running.width_before = now, self._width
            if self._loaded is not None:
                self._loaded |= {running.model}
        running.parts += 1

    def ended(self, key: str, now: float, timing: Timing | None) -> None:
        """A request has ended: with the server's figures if its answer is whole, else with None."""
        self._count(now)
        running = self._running.pop(key, None)
        if running is None or timing is None:
            return
        figures = self._models.setdefault(running.model, _Figures())
        timing = running.timed(timing, now, loads=not figures.tokens)
        wrote_s = now - running.first_at if running.first_at is not None else 0.0
        width = max(1.0, (self._width - running.width_before) / wrote_s) if wrote_s > 0 else 1.0
        writing_s = timing.writing_s or 0.0
        figures.writing.add(timing.tokens * width, writing_s)
        figures.answer.add(timing.tokens, writing_s)
        figures.reading.add(timing.prompt_tokens, timing.reading_s)
        figures.tokens = _mean(figures.tokens, timing.tokens)
        figures.prompt_tokens = _mean(figures.prompt_tokens, timing.prompt_tokens)
        if timing.loading_s > _LOADED_WITHIN_S:
            figures.loading_s = timing.loading_s

    def loaded(self, models: frozenset[str] | None) -> None:
        """The models in the server's memory; None if it does not say, and then all count as loaded."""
        self._loaded = models

    def pace(self, model: str, now: float) -> ModelPace:
        """The figures of one model. Those of one that must be loaded first, in an unknown time, are not known."""
        figures = self._models.get(model) or _Figures()
        shown = self._shown(model, now)
        loading_s = 0.0 if shown else self._loading_s(model, figures, now)
        if loading_s is None:
            return ModelPace()
        alone = figures.answer.per_s or shown
        return ModelPace(
            tokens_per_s=figures.writing.per_s or alone * max(1, self._writers()),
            answer_tokens_per_s=alone,
            prompt_tokens_per_s=figures.reading.per_s,
            tokens_per_request=figures.tokens or self._mean_limit(model),
            prompt_tokens_per_request=figures.prompt_tokens,
            loading_s=loading_s,
        )

    def usual_first_s(self, model: str) -> float:
        """How long an average prompt is read, 0 if that is not measured."""
        figures = self._models.get(model)
        if figures is None or not figures.reading.per_s:
            return 0.0
        return figures.prompt_tokens / figures.reading.per_s

    def left(self, key: str) -> tuple[float, float]:
        """The (output, prompt) tokens that are probably left of a running request. One is left at least."""
        running = self._running.get(key)
        if running is None:
            return 0.0, 0.0
        figures = self._models.get(running.model) or _Figures()
        output = max(min(running.limit, figures.tokens or running.limit) - running.parts, 1.0)
        return output, figures.prompt_tokens if running.first_at is None else 0.0

    def rest_s(self, key: str, now: float) -> float:
        """How long a running request probably still takes; infinite if too little is known."""
        running = self._running.get(key)
        if running is None:
            return 0.0
        pace = self.pace(running.model, now)
        if not pace.answer_tokens_per_s:
            return math.inf
        output, prompt_tokens = self.left(key)
        reading_s = prompt_tokens / pace.prompt_tokens_per_s if pace.prompt_tokens_per_s else 0.0
        return pace.loading_s + reading_s + output / pace.answer_tokens_per_s

    def _loading_s(self, model: str, figures: _Figures, now: float) -> float | None:
        if self._loaded is None or model in self._loaded:
            return 0.0
        if figures.loading_s is None:
            return None
        began_at = min((running.began_at for running in self._running.values() if running.model == model), default=now)
        return max(0.0, figures.loading_s - (now - began_at))

    def _shown(self, model: str, now: float) -> float:
        """The rate at which running answers have been written so far, 0 as long as they are too short."""
        shown = [
            (running.parts - 1) / (now - running.first_at)
            for running in self._running.values()
            if running.model == model
            and running.first_at is not None
            and running.parts >= _SHOWN_PARTS
            and now - running.first_at >= _SHOWN_S
        ]
        return sum(shown) / len(shown) if shown else 0.0

    def _mean_limit(self, model: str) -> float:
        limits = [running.limit for running in self._running.values() if running.model == model]
        return sum(limits) / len(limits) if limits else 0.0

    def _writers(self) -> int:
        return sum(running.first_at is not None for running in self._running.values())

    def _count(self, now: float) -> None:
        self._width += self._writers() * max(0.0, now - self._counted_at)
        self._counted_at = now


def _mean(mean: float, value: float) -> float:
    return mean + _NEW_SHARE * (value - mean) if mean else float(value)
