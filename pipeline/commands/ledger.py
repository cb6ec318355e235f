"""The requests that `headrace demo` has sent: which engine answered each, when, and the totals of each priority."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from pipeline.core.statistics import Quantiles, quantiles
from pipeline.wire.answers import Answer, Chunk, Completion, ErrorAnswer
from pipeline.wire.subjects import Priority


@dataclass(slots=True)
class SentRequest:
    """One request. Times are seconds of the client's monotonic clock."""

    priority: Priority
    sent_at: float
    first_at: float | None = None
    last_at: float | None = None
    engine: str = ""
    spilled: bool = False
    queue_ms: float = 0.0
    error: str = ""
    last_messages: int = 0


@dataclass(frozen=True, slots=True)
class PriorityTotals:
    """The totals of the requests of one priority. Times are milliseconds."""

    priority: Priority
    sent: int
    answered: dict[str, int]
    spilled: int
    wait_ms: Quantiles
    ttft_ms: Quantiles
    errors: dict[str, int]


@dataclass(slots=True)
class Ledger:
    """The requests of one client, by id. Its only writer is `Crowd`, which sends them and reads the answers."""

    entries: dict[str, SentRequest] = field(default_factory=dict)

    def sent(self, request_id: str, priority: Priority, now: float) -> None:
        """Record that a request is sent."""
        self.entries[request_id] = SentRequest(priority, now)

    def refused(self, request_id: str, error: str, now: float) -> None:
        """Record that the queue rejected a request."""
        entry = self.entries[request_id]
        entry.error, entry.last_at = error, now

    def answered(self, request_id: str, answer: Answer, now: float) -> None:
        """Record a message on a reply subject. Messages of requests that are not in the ledger are ignored."""
        entry = self.entries.get(request_id)
        if entry is None:
            return
        if isinstance(answer, Chunk) and entry.first_at is None:
            entry.first_at = now
        if isinstance(answer, Completion | ErrorAnswer):
            entry.last_messages += 1
            entry.last_at = now
            entry.first_at = entry.first_at or now
        if isinstance(answer, Completion):
            account = answer.headrace
            entry.engine, entry.spilled, entry.queue_ms = account.engine, account.spilled, account.queue_ms
        if isinstance(answer, ErrorAnswer):
            entry.error = str(answer.error.code)

    def outstanding(self, priority: Priority | None = None) -> int:
        """Return the number of requests without a last message."""
        return sum(entry.last_at is None and priority in (None, entry.priority) for entry in self.entries.values())

    def totals(self, priority: Priority, *, since: float = float("-inf")) -> PriorityTotals:
        """Return the totals of the requests of a priority that were sent at since or later."""
        mine = [e for e in self.entries.values() if e.priority is priority and e.sent_at >= since]
        done = [e for e in mine if e.engine]
        return PriorityTotals(
            priority,
            sent=len(mine),
            answered=dict(Counter(e.engine for e in done)),
            spilled=sum(e.spilled for e in done),
            wait_ms=quantiles([e.queue_ms for e in done]),
            ttft_ms=quantiles([(e.first_at - e.sent_at) * 1e3 for e in done if e.first_at is not None]),
            errors=dict(Counter(e.error for e in mine if e.error)),
        )

    def is_whole(self) -> bool:
        """Return whether every request that the queue accepted has exactly one last message."""
        return all(e.last_messages == 1 or (e.error and e.last_messages == 0) for e in self.entries.values())
