"""What became of the requests that a client has sent: who answered each, when, and what it comes to per priority."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from pipeline.core.statistics import Quantiles, quantiles
from pipeline.wire.messages import Answer, Chunk, Completion, ErrorAnswer
from pipeline.wire.subjects import Priority


@dataclass(slots=True)
class Entry:
    """One request. Times are the client's own, in seconds of one monotonic clock."""

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
class Row:
    """What the requests of one priority come to. Times in milliseconds."""

    priority: Priority
    sent: int
    answered: dict[str, int]
    spilled: int
    wait_ms: Quantiles
    ttft_ms: Quantiles
    errors: dict[str, int]


@dataclass(slots=True)
class Ledger:
    """The requests of one client. One writer: whoever sends them and reads their answers."""

    entries: dict[str, Entry] = field(default_factory=dict)

    def sent(self, request_id: str, priority: Priority, now: float) -> None:
        """A request goes out."""
        self.entries[request_id] = Entry(priority, now)

    def refused(self, request_id: str, error: str, now: float) -> None:
        """The queue did not take it."""
        entry = self.entries[request_id]
        entry.error, entry.last_at = error, now

    def answered(self, request_id: str, answer: Answer, now: float) -> None:
        """A message has come on the reply subject of a request; those of strangers are ignored."""
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
        """Requests without a last message."""
        return sum(entry.last_at is None and priority in (None, entry.priority) for entry in self.entries.values())

    def row(self, priority: Priority, *, since: float = float("-inf")) -> Row:
        """What the requests of a priority come to that were sent after since."""
        mine = [e for e in self.entries.values() if e.priority is priority and e.sent_at >= since]
        done = [e for e in mine if e.engine]
        return Row(
            priority,
            sent=len(mine),
            answered=dict(Counter(e.engine for e in done)),
            spilled=sum(e.spilled for e in done),
            wait_ms=quantiles([e.queue_ms for e in done]),
            ttft_ms=quantiles([(e.first_at - e.sent_at) * 1e3 for e in done if e.first_at is not None]),
            errors=dict(Counter(e.error for e in mine if e.error)),
        )

    def is_whole(self) -> bool:
        """Whether every request that the queue took has exactly one last message."""
        return all(e.last_messages == 1 or (e.error and e.last_messages == 0) for e in self.entries.values())
