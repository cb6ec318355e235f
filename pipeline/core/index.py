"""Where each waiting request stands: its priority, its place in the stream, how many are before it, until when."""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from pipeline.wire.messages import RequestEvent
from pipeline.wire.subjects import Priority

State = Literal["queued", "running"]

# A worker ends what it runs at the deadline. What still runs so much later has lost its worker.
RUNNING_GRACE_S = 10.0
# Deadlines of finished requests are kept until they would be as many as this, or as those that count.
_LEAST_KEPT = 1000


@dataclass(slots=True)
class Entry:
    """One request that is not finished, and where it was last stored. `deadline` in UTC seconds."""

    stream: str
    priority: Priority
    sequence: int
    state: State = "queued"
    deadline: float | None = None


@dataclass(slots=True)
class QueueIndex:
    """The unfinished requests by id. One writer: the monitor, from announcements and events.

    Both are sent once and unconfirmed, so an entry may be missing or left over; `forget_before` removes what cannot be
    there any more.
    """

    _entries: dict[str, Entry] = field(init=False, default_factory=dict)
    _depths: Counter[tuple[str, Priority]] = field(init=False, default_factory=Counter)
    # (when, id, sequence); what does not fit its entry any more is passed over.
    _deadlines: list[tuple[float, str, int]] = field(init=False, default_factory=list)

    def __len__(self) -> int:
        return len(self._entries)

    def stored(
        self,
        request_id: str,
        stream: str,
        priority: Priority,
        sequence: int,
        deadline: float | None = None,
        state: State = "queued",
    ) -> int:
        """A request was stored; a move stores it anew. Returns how many of its priority are queued before it.

        What is known to stand there stays as it is: it may run already. Of what is not known, `state` says whether it
        does.
        """
        known = self._entries.get(request_id)
        if known is not None and (known.stream, known.sequence) == (stream, sequence):
            return self.position(request_id)
        self.remove(request_id)
        place = self.depth(stream, priority)
        entry = self._entries[request_id] = Entry(stream, priority, sequence, state, deadline)
        self._count(entry, 1)
        if deadline is not None:
            self._watch(deadline, request_id, sequence)
        return place

    def record(self, event: RequestEvent) -> None:
        """Something happened to a request."""
        entry = self._entries.get(event.id)
        if entry is None:
            return
        match event.kind:
            case "started":
                self._count(entry, -1)
                entry.state = "running"
            case "returned":
                self._count(entry, -1)
                entry.state = "queued"
                self._count(entry, 1)
            case "done" | "failed" | "cancelled" | "expired":
                self.remove(event.id)

    def remove(self, request_id: str) -> None:
        """Forget a request, if it is known."""
        entry = self._entries.pop(request_id, None)
        if entry is not None:
            self._count(entry, -1)

    def find(self, request_id: str) -> Entry | None:
        """The entry of a request that is not finished."""
        return self._entries.get(request_id)

    def position(self, request_id: str) -> int:
        """How many queued requests of its priority and stream stand before a request; 0 if it is not queued itself."""
        entry = self._entries.get(request_id)
        if entry is None or entry.state != "queued":
            return 0
        return sum(
            other.sequence < entry.sequence
            for other in self._entries.values()
            if other.state == "queued" and other.stream == entry.stream and other.priority is entry.priority
        )

    def depth(self, stream: str, priority: Priority) -> int:
        """How many requests of a priority are queued in a stream."""
        return self._depths[stream, priority]

    def forget_before(self, stream: str, first_sequence: int) -> None:
        """Remove what stood before a stream's first message: it is finished, though nobody said so."""
        gone = [key for key, e in self._entries.items() if e.stream == stream and e.sequence < first_sequence]
        for request_id in gone:
            self.remove(request_id)

    def next_deadline(self) -> float | None:
        """When `expired` has something to say, UTC seconds; None where nothing has a deadline."""
        while self._deadlines and not self._counts(self._deadlines[0]):
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def expired(self, wall_now: float) -> list[tuple[str, Entry]]:
        """Take out what has waited past its deadline, and what should have been ended by who runs it, but was not."""
        found = []
        while (due := self.next_deadline()) is not None and due <= wall_now:
            _, request_id, sequence = heapq.heappop(self._deadlines)
            entry = self._entries[request_id]
            if entry.state == "running" and due == entry.deadline:
                self._watch(wall_now + RUNNING_GRACE_S, request_id, sequence)
            else:
                self.remove(request_id)
                found.append((request_id, entry))
        return found

    def _watch(self, when: float, request_id: str, sequence: int) -> None:
        if len(self._deadlines) > max(_LEAST_KEPT, 2 * len(self._entries)):
            self._deadlines = list(filter(self._counts, self._deadlines))
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (when, request_id, sequence))

    def _counts(self, watched: tuple[float, str, int]) -> bool:
        _, request_id, sequence = watched
        entry = self._entries.get(request_id)
        return entry is not None and entry.sequence == sequence

    def _count(self, entry: Entry, change: int) -> None:
        if entry.state == "queued":
            self._depths[entry.stream, entry.priority] += change
