"""Cancels that are not carried out yet. Each applies to one request, and not to a later one of the same id.

Requests of the same id differ in the time at which the broker first stored them, which a move preserves.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.core.index import Place


@dataclass(slots=True)
class _OpenCancel:
    """Attributes as in `Cancels.follow`. The cancel does not apply to the requests stored at `later`, after it."""

    place: Place | None = None
    stored_at: float | None = None
    look_at: float | None = None
    later: set[float] = field(default_factory=set)

    def means(self, stored_at: float) -> bool:
        return stored_at == self.stored_at if self.stored_at is not None else stored_at not in self.later


@dataclass(slots=True)
class Cancels:
    """Follows cancelled requests that a worker or a move holds, and cancels whose request was not read yet.

    One writer: the monitor's endings. `now` and `look_at` are monotonic seconds, `stored_at` is UTC seconds.
    """

    _open: dict[str, _OpenCancel] = field(init=False, default_factory=dict)

    def follow(self, request_id: str, place: Place, stored_at: float | None, look_at: float) -> None:
        """A cancelled request is running or moving. It is due at look_at, unless it has ended by then.

        Args:
            request_id: its id.
            place: its last known place.
            stored_at: when it was first stored; None if it left its place before that was read.
            look_at: when it is due.
        """
        self._open[request_id] = _OpenCancel(place, stored_at, look_at)

    def expect(self, request_id: str) -> None:
        """A cancel arrived for an id that is not known yet, because the view is filling."""
        self._open.setdefault(request_id, _OpenCancel())

    def announced(self, request_id: str, stored_at: float, place: Place, *, moved: bool) -> bool:
        """A request was stored, for the first time or by a move. Returns whether a cancel applies to it."""
        cancel = self._open.get(request_id)
        if cancel is None:
            return False
        if not moved:
            cancel.later.add(stored_at)
            return False
        if not cancel.means(stored_at):
            return False
        cancel.place, cancel.stored_at = place, stored_at
        return True

    def read(self, request_id: str, stored_at: float) -> bool:
        """A request was read from the queue. Returns whether a cancel expected it, and removes that cancel."""
        cancel = self._open.get(request_id)
        if cancel is None or cancel.look_at is not None or not cancel.means(stored_at):
            return False
        del self._open[request_id]
        return True

    def filled(self) -> None:
        """The whole queue was read. Requests that are still expected are not in it."""
        self._open = {request_id: cancel for request_id, cancel in self._open.items() if cancel.look_at is not None}

    def next_due(self) -> float | None:
        """When the next followed request is due; None if none is followed."""
        return min((cancel.look_at for cancel in self._open.values() if cancel.look_at is not None), default=None)

    def due(self, now: float) -> list[tuple[str, Place]]:
        """Remove and return the followed requests that are due, each with its last known place."""
        due = {
            key: cancel for key, cancel in self._open.items() if cancel.look_at is not None and cancel.look_at <= now
        }
        for request_id in due:
            del self._open[request_id]
        return [(request_id, cancel.place) for request_id, cancel in due.items() if cancel.place is not None]
