"""Where each waiting request stands: its priority, its place in the stream, how many are before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from pipeline.messages import RequestEvent
from pipeline.subjects import Priority

State = Literal["queued", "running"]


@dataclass(slots=True)
class Entry:
    """One request that is not finished, and where it was last stored."""

    stream: str
    priority: Priority
    sequence: int
    state: State = "queued"


@dataclass(slots=True)
class QueueIndex:
    """The unfinished requests by id. One writer: the monitor, from announcements and events.

    Both are sent once and unconfirmed, so an entry may be missing or left over; `forget_before` removes what cannot be
    there any more.
    """

    _entries: dict[str, Entry] = field(init=False, default_factory=dict)

    def __len__(self) -> int:
        return len(self._entries)

    def stored(self, request_id: str, stream: str, priority: Priority, sequence: int) -> None:
        """A request was stored; a move stores it anew."""
        self._entries[request_id] = Entry(stream, priority, sequence)

    def record(self, event: RequestEvent) -> None:
        """Something happened to a request."""
        entry = self._entries.get(event.id)
        if entry is None:
            return
        match event.kind:
            case "started":
                entry.state = "running"
            case "returned":
                entry.state = "queued"
            case "done" | "failed" | "cancelled" | "expired":
                del self._entries[event.id]

    def find(self, request_id: str) -> Entry | None:
        """The entry of a request that is not finished."""
        return self._entries.get(request_id)

    def position(self, request_id: str) -> int:
        """How many queued requests of its priority and stream stand before a request; 0 if it is not queued itself."""
        entry = self._entries.get(request_id)
        if entry is None or entry.state != "queued":
            return 0
        return sum(other.sequence < entry.sequence for other in self._queued(entry.stream, entry.priority))

    def depth(self, stream: str, priority: Priority) -> int:
        """How many requests of a priority are queued in a stream."""
        return sum(1 for _ in self._queued(stream, priority))

    def forget_before(self, stream: str, first_sequence: int) -> None:
        """Remove what stood before a stream's first message: it is finished, though nobody said so."""
        self._entries = {
            key: entry
            for key, entry in self._entries.items()
            if entry.stream != stream or entry.sequence >= first_sequence
        }

    def _queued(self, stream: str, priority: Priority) -> Iterator[Entry]:
        return (
            entry
            for entry in self._entries.values()
            if entry.state == "queued" and entry.stream == stream and entry.priority is priority
        )
