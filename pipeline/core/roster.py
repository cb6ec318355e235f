"""The other processes as this one hears them: the last status of each worker, the last load of each engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.core.room import Failures
from pipeline.core.saturation import STALE_S
from pipeline.wire.messages import EngineName, Load, StoreReport, WorkerStatus

# A worker that restarts keeps its models. Until it is back, a request for one of them waits instead of being refused.
REMEMBERED_S = 30.0


@dataclass(slots=True)
class Roster:
    """Keeps the last message of each worker and each engine's last load. One writer: `pipeline.broker.peers`.

    Freshness is judged by when a message was heard here. The sender's clock plays no part in it. `now` is monotonic
    seconds.
    """

    _statuses: dict[str, tuple[float, WorkerStatus]] = field(init=False, default_factory=dict)
    _loads: dict[EngineName, tuple[float, Load]] = field(init=False, default_factory=dict)
    _store: tuple[float, StoreReport] | None = field(init=False, default=None)
    _failures: Failures = field(init=False, default_factory=Failures)

    def heard(self, status: WorkerStatus, now: float) -> None:
        """A worker published its status. Workers not heard of for `REMEMBERED_S` are forgotten."""
        self._statuses[status.worker] = (now, status)
        oldest = now - REMEMBERED_S
        self._statuses = {name: kept for name, kept in self._statuses.items() if kept[0] >= oldest}

    def heard_load(self, load: Load, now: float) -> None:
        """The monitor published an engine's load."""
        self._loads[load.engine] = (now, load)

    def workers(self, engine: EngineName, now: float) -> list[WorkerStatus]:
        """The status of each worker of engine that was heard within `STALE_S` and has not left."""
        return [status for status in self._since(engine, now - STALE_S) if status.state != "gone"]

    def remembered(self, engine: EngineName, now: float) -> list[WorkerStatus]:
        """The last status of each worker of engine that was heard within `REMEMBERED_S`, of those that left as well."""
        return self._since(engine, now - REMEMBERED_S)

    def load(self, engine: EngineName, now: float) -> Load | None:
        """The engine's load; None if none was heard within `STALE_S`."""
        heard_at, load = self._loads.get(engine, (now, None))
        return load if now - heard_at <= STALE_S else None

    def heard_store(self, report: StoreReport, now: float) -> None:
        """The process that runs the broker reported on its store."""
        if self._store is not None and self._store[1].state == "failed" != report.state:
            self._failures.forget()
        self._store = (now, report)

    def heard_failure(self, subject: str, now: float) -> None:
        """A process announced that the broker did not store a message on subject."""
        self._failures.heard(subject, now)

    def store(self, now: float) -> StoreReport | None:
        """The broker's store; None if nothing is known to be wrong and no process reports on it."""
        heard_at, report = self._store or (float("-inf"), None)
        report = report if now - heard_at <= STALE_S else None
        if report is not None and report.refuses:
            return report
        return self._failures.report(now) or report

    def _since(self, engine: EngineName, oldest: float) -> list[WorkerStatus]:
        return [status for heard, status in self._statuses.values() if heard >= oldest and status.engine == engine]
