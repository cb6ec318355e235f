"""How many requests a model server runs at once, found by observation: servers do not say it.

A request beyond what the server runs waits inside it, out of reach. So the server gets one request at a time until it
has shown more. Now and then one more is tried: if its answer begins while the others are being written, the server
runs that many. If it begins only after another answer has ended, it has waited, and no other
one is tried for a while.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# After a request has waited inside the server, none beyond the known number is tried for this long.
_TRY_AGAIN_S = 600.0
# A request has waited if another answer ended before its own began, and reading its prompt should have ended long ago.
_WAITED_S = 0.5
_WAITED_TIMES = 3.0
# Answers are written side by side if each of them gets so many parts in between. A few parts may only be read late.
_SIDE_BY_SIDE_PARTS = 4


@dataclass(slots=True)
class RunsAtOnce:
    """The number of one server. One writer: its engine. Times are monotonic seconds.

    Args:
        most: the most requests that may be sent at once.
    """

    most: int
    _known: int = field(init=False, default=1)
    _try_at: float = field(init=False, default=0.0)
    _began: dict[str, float] = field(init=False, default_factory=dict)
    # The answers that are being written, and the parts of each since their number last changed.
    _writing: dict[str, int] = field(init=False, default_factory=dict)

    @property
    def known(self) -> int:
        """How many requests the server has been seen to run at once."""
        return min(self._known, self.most)

    def slots(self, now: float, *, measured: bool) -> int:
        """How many requests the server may have now: the known number, and one more on trial.

        Args:
            now: the time.
            measured: whether the speed of the server is known. Before that nothing is tried.
        """
        tries = measured and now >= self._try_at and self._writing and len(self._writing) >= self.known
        return min(self.known + bool(tries), self.most)

    def told(self, count: int) -> None:
        """The server has said how many it runs."""
        self._known = max(self._known, count)

    def begun(self, key: str, now: float) -> None:
        """A request was sent."""
        self._began[key] = now

    def part(self, key: str) -> None:
        """A part of an answer has come."""
        if key not in self._began:
            return
        if key not in self._writing:
            self._writing = dict.fromkeys([*self._writing, key], 0)
        self._writing[key] += 1
        beside = sum(parts >= _SIDE_BY_SIDE_PARTS for parts in self._writing.values())
        self._known = max(self._known, beside)

    def ended(self, key: str, now: float, usual_first_s: float) -> None:
        """A request has ended. `usual_first_s`: how long an answer usually takes to begin, 0 if that is not known."""
        was_writing = key in self._writing
        self._writing = dict.fromkeys([other for other in self._writing if other != key], 0)
        self._began.pop(key, None)
        waiting = [began_at for other, began_at in self._began.items() if other not in self._writing]
        limit_s = _WAITED_S + _WAITED_TIMES * usual_first_s
        if was_writing and any(now - began_at > limit_s for began_at in waiting):
            self._try_at = now + _TRY_AGAIN_S

    def restarted(self) -> None:
        """The server was away: it may run another number now."""
        self._known, self._try_at = 1, 0.0
