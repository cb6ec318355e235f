"""Where each unfinished request stands in the queue, how many are queued before it, and when its deadline passes.

A request is identified by its place, the stream and sequence at which it is stored. Its id only leads to the place: an
id can be reused, a place cannot.

The index holds a million requests in about 100 MB, so nothing here is a Python object per request: a lane is a sorted
set of sequences, ids are 64-bit hashes, and a deadline is one integer. A second order inside a lane (by tenant, say)
is one more `Sequences` per tenant, with the same places.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import islice
from typing import Literal, NamedTuple

from pipeline.core.placetable import PlaceTable, table_key
from pipeline.core.sequences import Sequences
from pipeline.wire.messages import RequestEvent
from pipeline.wire.subjects import STREAM_OLLAMA, STREAM_REQUESTS, Priority

State = Literal["queued", "running"]

# A worker ends a running request at its deadline. If it still runs this much later, its worker has died.
RUNNING_GRACE_S = 10.0
# Deadlines of finished requests are removed when there are more of them than this and than of the others.
_LEAST_KEPT = 1000

_STREAMS = (STREAM_REQUESTS, STREAM_OLLAMA)
_PRIORITIES = tuple(Priority)
_STREAM_BITS = {stream: number for number, stream in enumerate(_STREAMS)}
_PRIORITY_BITS = {priority: number << 1 for number, priority in enumerate(_PRIORITIES)}
_PLACE_MASK = (1 << 64) - 1
# The bits of a packed place that tell its lane.
_LANE_MASK = 7


class Place(NamedTuple):
    """Where a request is stored. Stream and sequence identify it; `priority` tells its lane."""

    stream: str
    priority: Priority
    sequence: int

    def packed(self) -> int:
        """The place as a 64-bit integer, never 0."""
        return self.sequence << 3 | _PRIORITY_BITS[self.priority] | _STREAM_BITS[self.stream]

    @classmethod
    def unpacked(cls, packed: int) -> Place:
        """The inverse of `packed`."""
        return cls(_STREAMS[packed & 1], _PRIORITIES[packed >> 1 & 3], packed >> 3)


class QueueIndex:
    """The places of all unfinished requests. One writer: the monitor's queue view.

    It follows announcements and events, which are core messages and can be lost. So a place can be missing, or remain
    after its request has ended. `forget_before` removes the places that the stream has passed.
    """

    def __init__(self) -> None:
        # By the last three bits of a packed place; two of the eight are no lane.
        self._queued = [Sequences() for _ in range(8)]
        # Packed places.
        self._running: set[int] = set()
        self._places = PlaceTable(self._is_live)
        # Heap of deadline (microseconds, UTC), packed place, and whether the grace of a running request has begun.
        # Entries whose place is no longer live are skipped.
        self._deadlines: list[int] = []

    def __len__(self) -> int:
        return len(self._running) + sum(map(len, self._queued))

    # ---- what happened

    def stored(self, request_id: str, place: Place, deadline: float | None = None, state: State = "queued") -> None:
        """A request was stored at place; when a request moves, it leaves its former place.

        Args:
            request_id: the request's id.
            place: where it is stored.
            deadline: UTC seconds.
            state: whether it runs already. A place that is known keeps its state.
        """
        key, packed = table_key(request_id), place.packed()
        known = self._places.find(key)
        if known is not None and known != packed:
            self._leave(known)
        if not self._is_live(packed):
            self._enter(packed, deadline, state)
        if known != packed:
            self._places.put(key, packed)

    def found(self, request_id: str, place: Place, deadline: float | None = None, state: State = "queued") -> bool:
        """A request was read from the stream. Anything known under its id was announced, and is newer.

        Returns:
            Whether it was entered.
        """
        key, packed = table_key(request_id), place.packed()
        known = self._places.find(key)
        if self._is_live(packed) or (known is not None and self._is_live(known)):
            return False
        self._enter(packed, deadline, state)
        self._places.put(key, packed)
        return True

    def record(self, event: RequestEvent) -> bool:
        """Something happened to a request. Returns whether an unfinished request of that id is known."""
        key = table_key(event.id)
        packed = self._places.find(key)
        if packed is None or not self._is_live(packed):
            return False
        match event.kind:
            case "started":
                if self._queued[packed & _LANE_MASK].discard(packed >> 3):
                    self._running.add(packed)
            case "returned":
                if packed in self._running:
                    self._running.remove(packed)
                    self._queued[packed & _LANE_MASK].add(packed >> 3)
            case "done" | "failed" | "cancelled" | "expired":
                self._leave(packed)
                self._places.remove(key)
        return True

    def remove(self, place: Place) -> None:
        """The request at place has ended or is about to."""
        self._leave(place.packed())

    def put_back(self, place: Place, deadline: float | None) -> None:
        """Enter the request at place again: it was removed and not ended. Deadline in UTC seconds."""
        if not self._is_live(place.packed()):
            self._enter(place.packed(), deadline, "queued")

    def forget_before(self, stream: str, first_sequence: int) -> None:
        """Remove the places before a stream's first message. Their requests have ended."""
        bit = _STREAM_BITS[stream]
        for queued in self._queued[bit::2]:
            queued.discard_below(first_sequence)
        self._running = {p for p in self._running if p & 1 != bit or p >> 3 >= first_sequence}

    def forget_stream(self, stream: str) -> None:
        """Remove all places of a stream that was replaced by a new one."""
        self.forget_before(stream, 1 << 61)

    # ---- what is known

    def find(self, request_id: str) -> Place | None:
        """The place of the unfinished request of that id; None if none is known."""
        packed = self._places.find(table_key(request_id))
        return Place.unpacked(packed) if packed is not None and self._is_live(packed) else None

    def state(self, place: Place) -> State | None:
        """Whether the request at place is queued or running; None if no unfinished one is known there."""
        if place.packed() in self._running:
            return "running"
        return "queued" if place.sequence in self._lane(place) else None

    def position(self, place: Place) -> int:
        """How many queued requests of its lane are before place."""
        return self._lane(place).rank(place.sequence)

    def behind(self, place: Place) -> int:
        """How many queued requests of its lane are behind place."""
        queued = self._lane(place)
        return len(queued) - queued.rank(place.sequence + 1)

    def depth(self, stream: str, priority: Priority) -> int:
        """How many requests of a lane are queued."""
        return len(self._queued[_PRIORITY_BITS[priority] | _STREAM_BITS[stream]])

    # ---- deadlines

    def next_deadline(self) -> float | None:
        """The earliest deadline, UTC seconds; None if no request has one."""
        while self._deadlines and not self._is_live(self._deadlines[0] >> 1 & _PLACE_MASK):
            heapq.heappop(self._deadlines)
        return (self._deadlines[0] >> 65) / 1e6 if self._deadlines else None

    def expired(self, wall_now: float, most: int) -> list[Place]:
        """Remove and return the requests to be ended, earliest deadline first.

        These are the queued requests whose deadline has passed, and the running ones whose worker has not ended them
        within the grace.

        Args:
            wall_now: UTC seconds.
            most: the most requests to return.
        """
        return list(islice(self._expired(wall_now), most))

    def _expired(self, wall_now: float) -> Iterator[Place]:
        while (due := self.next_deadline()) is not None and due <= wall_now:
            entry = heapq.heappop(self._deadlines)
            packed = entry >> 1 & _PLACE_MASK
            if packed in self._running and not entry & 1:
                self._watch(wall_now + RUNNING_GRACE_S, packed, grace=1)
                continue
            place = Place.unpacked(packed)
            self.remove(place)
            yield place

    # ---- inside

    def _lane(self, place: Place) -> Sequences:
        return self._queued[_PRIORITY_BITS[place.priority] | _STREAM_BITS[place.stream]]

    def _leave(self, packed: int) -> None:
        self._running.discard(packed)
        self._queued[packed & _LANE_MASK].discard(packed >> 3)

    def _enter(self, packed: int, deadline: float | None, state: State) -> None:
        if state == "running":
            self._running.add(packed)
        else:
            self._queued[packed & _LANE_MASK].add(packed >> 3)
        if deadline is not None:
            self._watch(deadline, packed)

    def _is_live(self, packed: int) -> bool:
        return packed in self._running or packed >> 3 in self._queued[packed & _LANE_MASK]

    def _watch(self, when: float, packed: int, *, grace: int = 0) -> None:
        if len(self._deadlines) > max(_LEAST_KEPT, 2 * len(self)):
            self._deadlines = [entry for entry in self._deadlines if self._is_live(entry >> 1 & _PLACE_MASK)]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, max(0, round(when * 1e6)) << 65 | packed << 1 | grace)
