"""Queue statistics: counts of what happened to requests, and quantiles of how long the recent ones waited."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Literal

from msgspec import Struct, field

from pipeline.wire.messages import (
    Dialect,
    EngineName,
    EventKind,
    Load,
    RequestEvent,
    Slots,
    StoreReport,
    WorkerState,
    WorkerStatus,
)
from pipeline.wire.pauses import Pause
from pipeline.wire.subjects import Priority

# Quantiles are of this many of the latest requests of a priority.
WINDOW = 2000
_ENDS: tuple[EventKind, ...] = ("done", "failed", "cancelled", "expired")
# The broker refuses a second request under the same id for two minutes.
_SAME_REQUEST_S = 110.0


class Quantiles(Struct, frozen=True):
    """Quantiles of the latest requests, in milliseconds; 0 if there were none."""

    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0


class LaneStatistics(Struct):
    """One priority's counts since the monitor started, and its waits."""

    queued: int = 0
    running: int = 0
    done: int = 0
    failed: int = 0
    spilled: int = 0
    cancelled: int = 0
    expired: int = 0
    wait_ms: Quantiles = Quantiles()
    ttft_ms: Quantiles = Quantiles()


Unknown = Literal["queued", "running", "positions"]


class ServerState(Struct):
    """A server behind a worker: `dialect` is its API, the rest is as in the worker's status."""

    worker: str
    dialect: Dialect
    server: str
    state: WorkerState
    models: list[str]
    slots: Slots
    tokens_per_s: float
    reason: str


class QueueStatistics(Struct):
    """The body of `llm.queue.stats`.

    Attributes:
        high, medium, low: the lanes.
        engines: the last load event of each engine; missing before the first.
        errors: how many requests ended with each error code since the monitor started.
        dead: dead letters.
        uptime_s: seconds since the monitor started.
        unknown: what a monitor that has just started does not know yet. `queued` and `running` are 0 until they are
            known; `positions` are those of single requests.
        filled: the part of the queue that the monitor has read, 0 to 1.
        store: whether the broker can store requests; None if no process reports on it and no write fails.
        servers: the servers behind the workers.
        paused: the lanes that an operator has paused, without who it was.
        paused_tenants: how many pauses of tenants there are. Every tenant reads the statistics, so they have no names.
        cannot_load: the models that no worker could load when it last tried, and why, by name.
    """

    high: LaneStatistics
    medium: LaneStatistics
    low: LaneStatistics
    engines: dict[EngineName, Load]
    errors: dict[str, int]
    dead: int
    uptime_s: float
    unknown: list[Unknown] = field(default_factory=list)
    filled: float = 1.0
    store: StoreReport | None = None
    servers: list[ServerState] = field(default_factory=list)
    paused: list[Pause] = field(default_factory=list)
    paused_tenants: int = 0
    cannot_load: dict[str, str] = field(default_factory=dict)


def servers_of(statuses: Iterable[WorkerStatus]) -> list[ServerState]:
    """The servers behind workers, by URL. An engine of a worker's own machine is no server."""
    states = [
        ServerState(
            each.worker,
            each.dialect,
            each.server,
            each.state,
            each.models,
            each.slots,
            round(each.tokens_per_s, 1),
            each.reason,
        )
        for each in statuses
        if each.dialect is not None
    ]
    return sorted(states, key=lambda state: (state.server, state.worker))


def quantiles(values: list[float]) -> Quantiles:
    """Quantiles of values by the nearest rank: the smallest value that has so many percent of all at or below it."""
    if not values:
        return Quantiles()
    ordered = sorted(values)

    def at(percent: int) -> float:
        rank = -(-percent * len(ordered) // 100)
        return round(ordered[rank - 1], 3)

    return Quantiles(at(50), at(95), at(99))


@dataclass(slots=True)
class _Lane:
    counts: dict[str, int] = dataclass_field(
        default_factory=lambda: dict.fromkeys(("done", "failed", "spilled", "cancelled", "expired"), 0)
    )
    wait_ms: deque[float] = dataclass_field(default_factory=lambda: deque(maxlen=WINDOW))
    ttft_ms: deque[float] = dataclass_field(default_factory=lambda: deque(maxlen=WINDOW))


@dataclass(slots=True)
class Statistics:
    """Counts events. One writer: the monitor."""

    started_at: float
    _lanes: dict[Priority, _Lane] = dataclass_field(init=False, default_factory=lambda: {p: _Lane() for p in Priority})
    _errors: dict[str, int] = dataclass_field(init=False, default_factory=dict)
    # When each request ended in which way, the earliest first.
    _ended: dict[tuple[str, EventKind], float] = dataclass_field(init=False, default_factory=dict)

    def record(self, event: RequestEvent, now: float) -> None:
        """Count one event, as of now (monotonic seconds).

        An end is counted once, even if two processes tell of it: a request that is being moved is in two queues, and
        each copy can expire.
        """
        if event.kind == "started":
            for kind in _ENDS:
                self._ended.pop((event.id, kind), None)
        elif event.kind in _ENDS and not self._is_first_end(event, now):
            return
        lane = self._lanes[event.priority]
        if event.kind in lane.counts:
            lane.counts[event.kind] += 1
        if event.code is not None:
            self._errors[event.code] = self._errors.get(event.code, 0) + 1
        if event.kind == "started" and event.wait_ms is not None:
            lane.wait_ms.append(event.wait_ms)
        if event.kind == "done" and event.ttft_ms is not None:
            lane.ttft_ms.append(event.ttft_ms)

    def _is_first_end(self, event: RequestEvent, now: float) -> bool:
        while self._ended and next(iter(self._ended.values())) < now - _SAME_REQUEST_S:
            del self._ended[next(iter(self._ended))]
        end = (event.id, event.kind)
        if end in self._ended:
            return False
        self._ended[end] = now
        return True

    def report(
        self,
        *,
        queued: Mapping[Priority, int],
        running: Mapping[Priority, int],
        loads: Mapping[EngineName, Load],
        dead: int,
        now: float,
        unknown: Sequence[Unknown] = (),
        filled: float = 1.0,
        store: StoreReport | None = None,
    ) -> QueueStatistics:
        """The statistics as of now (monotonic seconds, as `started_at`); the rest as in `QueueStatistics`."""

        def lane(priority: Priority) -> LaneStatistics:
            kept = self._lanes[priority]
            return LaneStatistics(
                queued=queued.get(priority, 0),
                running=running.get(priority, 0),
                wait_ms=quantiles(list(kept.wait_ms)),
                ttft_ms=quantiles(list(kept.ttft_ms)),
                **kept.counts,
            )

        return QueueStatistics(
            high=lane(Priority.HIGH),
            medium=lane(Priority.MEDIUM),
            low=lane(Priority.LOW),
            engines=dict(loads),
            errors=dict(self._errors),
            dead=dead,
            uptime_s=round(now - self.started_at, 1),
            unknown=list(unknown),
            # Rounded down: 1 is the whole queue.
            filled=int(filled * 1000) / 1000,
            store=store,
        )
