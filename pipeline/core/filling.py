"""How far a view has read its streams, and what happened meanwhile to requests that it had not read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from pipeline.core.index import Place, State
from pipeline.wire.messages import EventKind, RequestEvent

_ENDS: tuple[EventKind, ...] = ("done", "failed", "cancelled", "expired")


@dataclass(slots=True)
class _Reach:
    """Of one stream: everything up to `complete` is known; `start` to `horizon` is being read."""

    complete: int = 0
    heard: int = 0
    start: int = 1
    horizon: int = 0


@dataclass(slots=True)
class Filling:
    """Tracks which parts of the streams are known. One writer: the view that reads them.

    A stream announces each message that it stores, in order. So after the first reading, the view only has to read what
    an announcement is missing for.
    """

    streams: Iterable[str]
    active: bool = field(init=False, default=True)
    _reaches: dict[str, _Reach] = field(init=False)
    _happened: dict[str, EventKind] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._reaches = {stream: _Reach() for stream in self.streams}

    def begin(self) -> None:
        """Announcements can have been missed."""
        self.active = True

    def begin_stream(self, stream: str, first: int, last: int) -> tuple[int, bool]:
        """Begin to read a stream that holds the sequences first to last.

        Returns:
            The sequence to read from, and whether the stream was replaced by a new one, of which nothing is known.
        """
        reach = self._reaches[stream]
        if replaced := last < reach.complete:
            reach.complete = reach.heard = 0
        reach.start, reach.horizon = max(reach.complete + 1, first), last
        return reach.start, replaced

    def read(self, stream: str, sequence: int) -> None:
        """Everything up to sequence was read."""
        self._reaches[stream].complete = sequence

    def end_stream(self, stream: str) -> None:
        """Everything that the stream held when reading began was read."""
        reach = self._reaches[stream]
        reach.complete = max(reach.complete, reach.horizon, reach.heard)

    def end(self) -> None:
        """All streams were read."""
        self.active = False
        self._happened.clear()

    def announced(self, stream: str, sequence: int) -> bool:
        """A message was announced. Returns whether an announcement before it is missing."""
        reach = self._reaches[stream]
        reach.heard = max(reach.heard, sequence)
        if self.active or sequence <= reach.complete:
            return False
        if sequence > reach.complete + 1:
            return True
        reach.complete = sequence
        return False

    def happened(self, event: RequestEvent) -> None:
        """Something happened to a request that is not known."""
        if self.active and event.kind in ("started", "returned", *_ENDS):
            self._happened[event.id] = event.kind

    def state(self, request_id: str, *, begun: bool) -> State | None:
        """The state of a request that was just read; None if it has ended since.

        Args:
            request_id: its id.
            begun: whether it was delivered to a worker before reading began.
        """
        kind = self._happened.get(request_id)
        if kind in _ENDS:
            return None
        return "running" if kind == "started" or (kind is None and begun) else "queued"

    def knows_all_before(self, place: Place) -> bool:
        """Whether every request before place in its stream is known."""
        return not self.active or place.sequence <= self._reaches[place.stream].complete

    def knows(self, stream: str, sequence: int) -> bool:
        """Whether everything that a stream holds up to sequence is known."""
        return not self.active and self._reaches[stream].complete >= sequence

    @property
    def part(self) -> float:
        """The part of the current reading that is done, 0 to 1."""
        if not self.active:
            return 1.0
        whole = sum(reach.horizon - reach.start + 1 for reach in self._reaches.values())
        read = sum(max(0, reach.complete - reach.start + 1) for reach in self._reaches.values())
        return min(1.0, read / whole) if whole > 0 else 0.0
