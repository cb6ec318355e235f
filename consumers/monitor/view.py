"""The monitor's view of the queue: the unfinished requests, their places and their positions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.broker.bulk import read_heads, to_head
from pipeline.broker.connection import BusError, Message
from pipeline.broker.jetstream import Bus, Stored, to_stored
from pipeline.core.envelope import Envelope, read_envelope
from pipeline.core.filling import Filling
from pipeline.core.index import Place, QueueIndex, State
from pipeline.wire.messages import RequestEvent
from pipeline.wire.subjects import (
    STORED_SUBJECT,
    STREAM_OLLAMA,
    STREAM_REQUESTS,
    Priority,
    Task,
    lane_of_subject,
    ollama_consumer,
    ollama_subject,
)

log = logging.getLogger(__name__)

STREAMS = (STREAM_REQUESTS, STREAM_OLLAMA)
_RETRY_AFTER_S = 1.0
_FORGET_EVERY_S = 60.0
# Requests that are entered before the event loop gets a turn; about 3 ms.
_STRETCH = 200

_OLLAMA_LANES = {ollama_subject(priority): priority for priority in Priority}


class LaneOfStream(NamedTuple):
    """The lane of a stored request.

    Attributes:
        stream: that stores it.
        priority: of its requests.
        consumer: delivers them.
        settled: its requests cannot be spilled: only MLX takes them, or they wait for Ollama already.
    """

    stream: str
    priority: Priority
    consumer: str
    settled: bool


def lane_of_stored(subject: str) -> LaneOfStream | None:
    """The lane of a subject in either stream; None for another subject."""
    if (priority := _OLLAMA_LANES.get(subject)) is not None:
        return LaneOfStream(STREAM_OLLAMA, priority, ollama_consumer(priority), settled=True)
    lane = lane_of_subject(subject)
    if lane is None:
        return None
    return LaneOfStream(STREAM_REQUESTS, lane.priority, lane.consumer, settled=lane.task is Task.COMPLEX)


class Announcement(NamedTuple):
    """A request that was just stored.

    Attributes:
        envelope: its headers, read.
        place: where it is stored.
        may_spill: whether the other engine may take it.
    """

    envelope: Envelope
    place: Place
    may_spill: bool


@dataclass(slots=True)
class QueueView:
    """Follows the queue: reads it once, then receives announcements and events. The one writer of its index.

    Args:
        bus: the connection.
        default_timeout_s: for requests that name no timeout.
        on_stored: called with each request that is announced.
        on_read: called with each request that is read from the queue, and its place.
        on_filled: called when the whole queue was read.
        forget_every_s: the pause between two searches for places that the streams have passed.
        read: reads the headers of a stream, as `read_heads`.
    """

    bus: Bus
    default_timeout_s: float | None
    on_stored: Callable[[Announcement], None]
    on_read: Callable[[Envelope, Place], None]
    on_filled: Callable[[], None]
    forget_every_s: float = _FORGET_EVERY_S
    read: Callable[[Bus, str, int], Awaitable[list[bytes]]] = read_heads
    _index: QueueIndex = field(init=False, default_factory=QueueIndex)
    _filling: Filling = field(init=False, default_factory=lambda: Filling(STREAMS))
    _missed: asyncio.Event = field(init=False, default_factory=asyncio.Event)

    async def run(self) -> None:
        """Read the queue, and again what was missed, until cancelled."""
        self._missed.set()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_filled())
            group.create_task(self._forget_passed())

    def on_reconnect(self) -> None:
        """The connection was lost and is back. Announcements can have been missed."""
        self._filling.begin()
        self._missed.set()

    # ---- what is known

    @property
    def filling(self) -> bool:
        """Whether the queue can hold requests that are not known yet."""
        return self._filling.active

    @property
    def filled(self) -> float:
        """The part of the queue that was read, 0 to 1."""
        return self._filling.part

    def knows(self, stream: str, sequence: int) -> bool:
        """Whether every request that a stream holds up to sequence is known."""
        return self._filling.knows(stream, sequence)

    def find(self, name: str) -> Place | None:
        """The place of the unfinished request of that name; None if none is known."""
        return self._index.find(name)

    def state(self, place: Place) -> State | None:
        """Whether the request at place is queued or running; None if no unfinished one is known there."""
        return self._index.state(place)

    def queued_before(self, place: Place) -> int:
        """How many requests of its lane are queued before a request, as far as they have been read."""
        return self._index.position(place)

    def position(self, place: Place, depth: int) -> tuple[int, bool]:
        """How many queued requests of its lane are before place, and whether that is an estimate.

        Args:
            place: where the request is stored.
            depth: the broker's count of the lane. While the view is filling, the requests behind place are known, and
                those before it are the rest of that count.
        """
        if self._filling.knows_all_before(place):
            return self._index.position(place), False
        return max(self._index.position(place), depth - self._index.behind(place) - 1), True

    # ---- what endings do to it

    def remove(self, place: Place) -> None:
        """The request at place is about to be ended."""
        self._index.remove(place)

    def put_back(self, place: Place, deadline: float | None) -> None:
        """Enter the request at place again: it was removed and not ended. Deadline in UTC seconds."""
        self._index.put_back(place, deadline)

    def next_deadline(self) -> float | None:
        """The earliest deadline, UTC seconds; None if there is none."""
        return self._index.next_deadline()

    def expired(self, wall_now: float, most: int) -> list[Place]:
        """Remove and return up to `most` requests whose deadline has passed (UTC seconds)."""
        return self._index.expired(wall_now, most)

    # ---- listening

    def announced(self, message: Message) -> str | None:
        """Enter a request that was just stored, by its headers and those of the stream. Returns the stream."""
        # Not by `Nats-Stream`: it comes first, and is damaged if the publisher's headers had no proper end.
        subject = message.headers.get(STORED_SUBJECT, "")
        lane = lane_of_stored(subject)
        if lane is None:
            return None
        envelope, place = self._read(to_stored(message), lane)
        if self._filling.announced(place.stream, place.sequence):
            self.on_reconnect()
        self._index.stored(envelope.name, place, _deadline(envelope))
        self.on_stored(Announcement(envelope, place, not lane.settled))
        return place.stream

    def record(self, event: RequestEvent) -> None:
        """Something happened to a request."""
        if not self._index.record(event):
            self._filling.happened(event)

    def _read(self, stored: Stored, lane: LaneOfStream) -> tuple[Envelope, Place]:
        envelope = read_envelope(stored, lane.priority, moves=self.bus.moves, default_timeout_s=self.default_timeout_s)
        return envelope, Place(lane.stream, lane.priority, stored.sequence)

    # ---- filling

    async def _keep_filled(self) -> None:
        while True:
            await self._missed.wait()
            self._missed.clear()
            try:
                for stream in STREAMS:
                    await self._fill(stream)
            except BusError as error:
                log.info("The queue could not be read; trying again: %s", error)
                self._missed.set()
                await asyncio.sleep(_RETRY_AFTER_S)
                continue
            if not self._missed.is_set():
                self._filling.end()
                self.on_filled()

    async def _fill(self, stream: str) -> None:
        """Read what a stream holds beyond what is known, and which requests were delivered to a worker."""
        states = await self.bus.consumers(stream)
        begun = {state.name: state.delivered.stream_seq for state in states}
        state = await self.bus.stream_state(stream)
        start, replaced = self._filling.begin_stream(stream, state.first_seq, state.last_seq)
        if replaced:
            self._index.forget_stream(stream)
        while start <= state.last_seq and (heads := await self.read(self.bus, stream, start)):
            for first in range(0, len(heads), _STRETCH):
                start = 1 + self._enter(stream, heads[first : first + _STRETCH], begun)
                await asyncio.sleep(0)
        self._filling.end_stream(stream)

    def _enter(self, stream: str, heads: Iterable[bytes], begun: Mapping[str, int]) -> int:
        """Enter requests that were read. Returns the last sequence."""
        sequence = 0
        for stored in map(to_head, heads):
            sequence = stored.sequence
            lane = lane_of_stored(stored.subject)
            if lane is None:
                continue
            envelope, place = self._read(stored, lane)
            state = self._filling.state(envelope.name, begun=sequence <= begun.get(lane.consumer, 0))
            if state is not None and self._index.found(envelope.name, place, _deadline(envelope), state):
                self.on_read(envelope, place)
        self._filling.read(stream, sequence)
        return sequence

    async def _forget_passed(self) -> None:
        """Forget the requests before a stream's first message. They have ended, and the event was missed."""
        while True:
            await asyncio.sleep(self.forget_every_s)
            try:
                for stream in STREAMS:
                    self._index.forget_before(stream, (await self.bus.stream_state(stream)).first_seq)
            except BusError as error:
                log.debug("Passed requests were not forgotten: %s", error)


def _deadline(envelope: Envelope) -> float | None:
    """The deadline that counts. A request with a fault has none: a worker refuses it whenever it receives it."""
    return envelope.deadline if envelope.fault is None else None
