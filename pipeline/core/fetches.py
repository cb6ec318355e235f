"""The models that a worker fetches, the callers of each fetch, and when a fetch ends because no caller is left."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.wire.answers import ErrorBody
from pipeline.wire.fetches import FetchCall, FetchReport, FetchStep

# A fetch that no caller has asked about for so long is given up: longer than a broker takes to restart.
LEASE_S = 15.0
# For so long a caller can still ask how its fetch ended.
KEPT_S = 60.0


@dataclass(slots=True, eq=False)
class Fetch:
    """One fetch. One writer: `pipeline.worker.fetching`. Times are monotonic seconds.

    Attributes:
        model: what is fetched.
        asked_at: when each caller last asked.
        ended_at: when it ended; None while it runs.
    """

    model: str
    asked_at: dict[str, float] = field(default_factory=dict)
    ended_at: float | None = None
    _revision: int = 0
    _steps: dict[tuple[str, str], tuple[int, FetchStep]] = field(default_factory=dict)
    _served: str = ""
    _error: ErrorBody | None = None

    def note(self, step: FetchStep) -> None:
        """The fetch is at this step."""
        key = step.status, step.digest
        _, before = self._steps.get(key, (0, None))
        if step == before:
            return
        self._revision += 1
        self._steps.pop(key, None)
        self._steps[key] = self._revision, step

    def end(self, now: float, *, served: str = "", error: ErrorBody | None = None) -> None:
        """The fetch has ended. The first end counts."""
        if self.ended_at is None:
            self._revision += 1
            self.ended_at, self._served, self._error = now, served, error

    def report(self, after: int) -> FetchReport:
        """What is new since a revision."""
        steps = [step for revision, step in self._steps.values() if revision > after]
        return FetchReport(self._revision, steps, self.ended_at is not None, self._served, self._error)

    def is_abandoned(self, now: float) -> bool:
        """Whether it runs for no caller."""
        return self.ended_at is None and all(now - asked_at > LEASE_S for asked_at in self.asked_at.values())


class Fetches:
    """All fetches of a worker. The calls for one model share one fetch."""

    def __init__(self) -> None:
        self._fetches: list[Fetch] = []

    def ask(self, call: FetchCall, model: str, now: float) -> tuple[Fetch, bool]:
        """The fetch of a call, and whether it begins now. A caller that has asked before gets the same one again."""
        self._fetches = [each for each in self._fetches if each.ended_at is None or now - each.ended_at < KEPT_S]
        same = [each for each in self._fetches if each.model == model]
        found = next((each for each in same if call.call in each.asked_at), None)
        found = found or next((each for each in same if each.ended_at is None), None)
        begins = found is None
        if found is None:
            found = Fetch(model)
            self._fetches.append(found)
        found.asked_at[call.call] = now
        return found, begins

    def leave(self, call: FetchCall) -> None:
        """A caller is gone."""
        for each in self._fetches:
            each.asked_at.pop(call.call, None)
