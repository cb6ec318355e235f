"""Cancels that are not carried out yet. Each applies to one request, and not to a later one of the same id.

Requests of the same id differ in the time at which the broker first stored them, which a move preserves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pipeline.core.index import Place


@dataclass(slots=True, eq=False)
class OpenCancel:
    """One cancel.

    Attributes:
        place: the last known place of its request; None while the request is expected.
        stored_at: when the request was first stored, UTC seconds; None while that is not known.
        look_at: when the request is due, monotonic seconds; None while it is expected, or its cancel is carried out.
        later: when requests of the same id were stored after the cancel, UTC seconds.
        until: a request that was stored later is not the one that is expected, UTC seconds.
    """

    place: Place | None = None
    stored_at: float | None = None
    look_at: float | None = None
    later: set[float] = field(default_factory=set)
    until: float = math.inf

    def means(self, stored_at: float) -> bool:
        """Whether the cancel applies to the request of its id that was first stored at that time, UTC seconds."""
        if self.stored_at is not None:
            return stored_at == self.stored_at
        return stored_at <= self.until and stored_at not in self.later


@dataclass(slots=True)
class Cancels:
    """Follows the requests that are to be cancelled until they have ended, also where they move meanwhile.

    One writer: the monitor's endings.
    """

    _open: dict[str, OpenCancel] = field(init=False, default_factory=dict)

    def begin(self, request_id: str, place: Place) -> OpenCancel:
        """The cancel of the request at place is carried out from now on, until `follow` or `done`."""
        cancel = self._open.get(request_id)
        if cancel is None or cancel.place != place:
            cancel = self._open[request_id] = OpenCancel(place)
        cancel.look_at = None
        return cancel

    def follow(self, cancel: OpenCancel, look_at: float) -> None:
        """Note that the request of a cancel runs or moves. Look at it again at look_at (monotonic seconds)."""
        cancel.look_at = look_at

    def done(self, request_id: str, cancel: OpenCancel) -> None:
        """The request of a cancel has ended."""
        if self._open.get(request_id) is cancel:
            del self._open[request_id]

    def expect(self, request_id: str, until: float) -> None:
        """A cancel arrived for an id that is not known yet, because the view is filling.

        It applies to a request that was stored until then (UTC seconds), also if its announcement comes later.
        """
        cancel = self._open.setdefault(request_id, OpenCancel(until=until))
        if cancel.place is None:
            cancel.until = max(cancel.until, until)

    def announced(self, request_id: str, stored_at: float, place: Place, *, moved: bool) -> OpenCancel | None:
        """A request was stored, for the first time or by a move. Returns the cancel to be carried out now, if any.

        A cancel that is being carried out is not returned: its `place` has changed.
        """
        cancel = self._open.get(request_id)
        if cancel is None:
            return None
        is_expected = cancel.place is None and cancel.means(stored_at)
        if not moved and not is_expected:
            cancel.later.add(stored_at)
            return None
        return self._found(cancel, stored_at, place)

    def read(self, request_id: str, stored_at: float, place: Place) -> OpenCancel | None:
        """A request was read from the queue. Returns the cancel to be carried out now, if any, as `announced`."""
        cancel = self._open.get(request_id)
        return None if cancel is None else self._found(cancel, stored_at, place)

    def _found(self, cancel: OpenCancel, stored_at: float, place: Place) -> OpenCancel | None:
        if not cancel.means(stored_at):
            return None
        in_progress = cancel.place is not None and cancel.look_at is None
        cancel.place, cancel.stored_at = place, stored_at
        return None if in_progress else cancel

    def filled(self) -> None:
        """The whole queue was read. Requests that are still expected are not in it."""
        self._open = {request_id: cancel for request_id, cancel in self._open.items() if cancel.place is not None}

    def next_due(self) -> float | None:
        """When the next followed request is due; None if none is followed."""
        return min((cancel.look_at for cancel in self._open.values() if cancel.look_at is not None), default=None)

    def due(self, now: float) -> list[tuple[str, OpenCancel]]:
        """The cancels whose request is due, with its id. Each is `done`, or followed on, before this is asked again."""
        return [(key, one) for key, one in self._open.items() if one.look_at is not None and one.look_at <= now]
