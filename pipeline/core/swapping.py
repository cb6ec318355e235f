"""Which models of one worker are in memory: what is loaded next, and which model leaves for it.

A swap costs the time of a load, so it is made for all requests that wait for the model, and never for each of them. A
loaded model that is in use stays for `STAY_LOADS` times as long as a load takes, so loading takes at most a fifth of
the time. A HIGH request shortens that to one load's time. A model that has nothing to do leaves soon.

Models are loaded one at a time. The one that waits in front is not overtaken by a smaller one that would fit at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from pipeline.wire.subjects import Priority

STAY_LOADS: Final = 4.0
"""A model that is in use stays for this many times as long as the next load takes."""

HIGH_STAY_LOADS: Final = 1.0
"""The same where a HIGH request waits for the other model."""

LEAST_LOAD_S: Final = 0.5
"""What a load takes at least in these rules, and while it is not measured."""

QUIET_LOADS: Final = 0.25
"""A model without work can leave after this part of a load's time."""

LEAVE_S: Final = 60.0
HIGH_LEAVE_S: Final = 5.0
"""A leaving model's running requests have this long to end; the second where a HIGH request waits for its place. Then
they are suspended, and continue when the model is loaded again."""

PATIENCE_S: Final = 30.0
"""A request that has waited longer goes before more urgent ones of other models."""

LEAST_KV_BYTES: Final = 64 << 20
"""What a model gets for its KV caches at least."""

Stage = Literal["absent", "loading", "ready", "leaving"]
_RANK: Final = {priority: rank for rank, priority in enumerate(Priority)}


@dataclass(frozen=True, slots=True)
class ModelUse:
    """One model of a worker. Times are monotonic seconds.

    Attributes:
        name: its name.
        size_bytes: the memory that it takes, measured or expected.
        stage: `leaving`: it begins no more requests.
        since: when it entered its stage.
        used_at: when it last had work; while it has some, now.
        load_s: how long its last load took; 0 if it was not measured.
        running: its requests in the engine.
        busy_with: the priority of the most urgent of them.
        waiting: the most urgent priority of the requests that wait for it; None if none waits.
        oldest_at: since when the oldest of them waits.
        pinned: it stays in memory.
        preload: it is loaded without a request, if there is room.
        idle_s: it leaves when it has had no work for this long; None for never.
        high_at: when a HIGH request was last in the engine; None if none was since the model is loaded.
    """

    name: str
    size_bytes: int
    stage: Stage = "absent"
    since: float = 0.0
    used_at: float = 0.0
    load_s: float = 0.0
    running: int = 0
    busy_with: Priority | None = None
    waiting: Priority | None = None
    oldest_at: float = 0.0
    pinned: bool = False
    preload: bool = False
    idle_s: float | None = None
    high_at: float | None = None

    @property
    def is_idle(self) -> bool:
        """Whether it has no work, and none waits for it."""
        return not self.running and self.waiting is None


@dataclass(slots=True)
class Swap:
    """What a worker does now.

    Attributes:
        load: the model to load.
        leave: loaded models that begin no more requests.
        end: leaving models whose memory is freed now.
        wake_at: when to decide again if nothing changes.
    """

    load: str | None = None
    leave: list[str] = field(default_factory=list)
    end: list[str] = field(default_factory=list)
    wake_at: float | None = None

    def wake(self, at: float) -> None:
        """Decide again at this time."""
        self.wake_at = at if self.wake_at is None else min(self.wake_at, at)


def decide(models: Sequence[ModelUse], budget_bytes: int, now: float) -> Swap:
    """What to load and what leaves memory now."""
    swap = Swap()
    waiting = _in_order(models, now)
    urgent = bool(waiting) and waiting[0].waiting is Priority.HIGH
    for model in models:
        if model.stage == "leaving":
            ends_at = model.since + (HIGH_LEAVE_S if urgent else LEAVE_S)
            if not model.running or now >= ends_at:
                swap.end.append(model.name)
            else:
                swap.wake(ends_at)
        elif model.stage == "ready" and model.idle_s is not None and model.is_idle and not model.pinned:
            if now >= model.used_at + model.idle_s:
                swap.leave.append(model.name)
            else:
                swap.wake(model.used_at + model.idle_s)
    free = budget_bytes - sum(model.size_bytes for model in models if model.stage != "absent")
    coming = sum(model.size_bytes for model in models if model.stage == "leaving" or model.name in swap.leave)
    if any(model.stage == "loading" for model in models):
        return swap
    if not waiting:
        _shrink(swap, models, -free - coming)
    elif waiting[0].size_bytes <= free or not _loaded(models):
        swap.load = waiting[0].name
    elif waiting[0].waiting is not None and waiting[0].size_bytes > free + coming:
        _make_room(swap, models, waiting[0], waiting[0].size_bytes - free - coming, now)
    return swap


def most_at_once(sizes: Iterable[int], budget_bytes: int) -> int:
    """How many of the models can be in memory at once at most; at least 1."""
    count = 0
    for size in sorted(sizes):
        budget_bytes -= size
        if budget_bytes < 0:
            break
        count += 1
    return max(1, count)


def kv_bytes_each(memory_bytes: int | None, weights_bytes: int, at_once: int) -> int:
    """The KV caches of each of the models that are in memory at once: their part of half of what the weights leave.

    0 if the machine's memory is not known.
    """
    return max(LEAST_KV_BYTES, (memory_bytes - weights_bytes) // 2 // at_once) if memory_bytes else 0


def needed_bytes(model: ModelUse, models: Iterable[ModelUse]) -> int:
    """The least budget with which a model can be loaded: its own size, and that of the pinned ones."""
    return model.size_bytes + sum(other.size_bytes for other in models if other.pinned and other.name != model.name)


def _in_order(models: Sequence[ModelUse], now: float) -> list[ModelUse]:
    """The absent models that are wanted, the next one first."""

    def key(model: ModelUse) -> tuple[int, float]:
        if model.waiting is None:
            return len(_RANK), 0.0 if model.pinned else 1.0
        return -1 if _is_overdue(model, now) else _RANK[model.waiting], model.oldest_at

    wanted = (
        model
        for model in models
        if model.stage == "absent" and (model.waiting is not None or model.preload or model.pinned)
    )
    return sorted(wanted, key=key)


def _is_overdue(model: ModelUse, now: float) -> bool:
    return now - model.oldest_at >= PATIENCE_S


def _loaded(models: Sequence[ModelUse]) -> list[ModelUse]:
    return [model for model in models if model.stage != "absent"]


def _make_room(swap: Swap, models: Sequence[ModelUse], wanted: ModelUse, lacking: int, now: float) -> None:
    """Let models leave until so many bytes are free, the least recently used first.

    All leave for a model that alone is larger than the budget, and none if it does not fit beside a pinned one.
    """
    leaving = list[str]()
    free_at = now
    evictable = [model for model in models if model.stage == "ready" and not model.pinned]
    evictable = [model for model in evictable if model.name not in swap.leave]
    for model in sorted(evictable, key=lambda model: (not model.is_idle, _free_at(model, wanted, now), model.used_at)):
        if lacking <= 0:
            break
        free_at = max(free_at, _free_at(model, wanted, now))
        leaving.append(model.name)
        lacking -= model.size_bytes
    if lacking > 0 and any(model.pinned for model in _loaded(models)):
        return
    if free_at > now:
        swap.wake(free_at)
    else:
        swap.leave += leaving


def _free_at(model: ModelUse, wanted: ModelUse, now: float) -> float:
    """When a loaded model may leave in favour of the wanted one."""
    load_s = max(wanted.load_s, model.load_s, LEAST_LOAD_S)
    urgent = wanted.waiting is Priority.HIGH
    at = model.since + load_s * (HIGH_STAY_LOADS if urgent else STAY_LOADS)
    if not urgent and model.high_at is not None:
        # Another question of the same person is probably on its way.
        until = min(model.high_at + load_s * STAY_LOADS, wanted.oldest_at + PATIENCE_S)
        if until > now:
            return max(at, until)
    if model.is_idle:
        return min(at, model.used_at + load_s * QUIET_LOADS)
    ranks = [_RANK[priority] for priority in (model.busy_with, model.waiting) if priority is not None]
    if wanted.waiting is not None and ranks and min(ranks) < _RANK[wanted.waiting] and not _is_overdue(wanted, now):
        return max(at, wanted.oldest_at + PATIENCE_S)
    return at


def _shrink(swap: Swap, models: Sequence[ModelUse], excess: int) -> None:
    """Models that turned out larger than expected exceed the budget: idle ones leave, the least recently used first."""
    idle = [model for model in models if model.stage == "ready" and model.is_idle and not model.pinned]
    for model in sorted(idle, key=lambda model: model.used_at)[: max(0, len(_loaded(models)) - 1)]:
        if excess <= 0:
            return
        if model.name not in swap.leave:
            swap.leave.append(model.name)
            excess -= model.size_bytes
