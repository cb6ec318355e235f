"""Which request crashed the engine. After a crash, the requests that ran run again one at a time.

All requests in flight at a crash are suspects. Suspects go on trial one by one, the one that began last first, because
it is the likeliest cause. A suspect that gets further than it was at the crash, or that ends, is cleared, and waits. A
suspect under which the engine crashes again, alone, is guilty. When no suspect is left, the cleared requests go on
together. An innocent request therefore sees the first crash and no other.

A request that was alone at its first crash is a suspect too: the engine could have been killed from outside, and a
second try decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class Probation:
    """The suspects, and the one on trial. One writer: the requests in flight. Any number identifies a request.

    `on_trial` is the request that runs alone now, if any.
    """

    on_trial: int | None = None
    _marks: dict[int, int] = field(default_factory=dict)

    @property
    def active(self) -> bool:
        """Whether only the request on trial may run."""
        return bool(self._marks)

    def crashed(self, in_flight: Mapping[int, int]) -> int | None:
        """The engine crashed. Returns the guilty request, if this crash decides it.

        Args:
            in_flight: the requests that ran, in the order in which they began, with the number of tokens of each.
        """
        guilty, self.on_trial = self.on_trial, None
        if guilty is not None and guilty in in_flight:
            del self._marks[guilty]
            return guilty
        self._marks |= in_flight
        return None

    def call_next(self) -> int | None:
        """Put the next suspect on trial, and return it. None during a trial, or without suspects."""
        if self.on_trial is not None or not self._marks:
            return None
        self.on_trial = next(reversed(self._marks))
        return self.on_trial

    def progressed(self, request: int, tokens: int) -> bool:
        """The request has this many tokens. Returns whether that clears it and ends its trial."""
        if request != self.on_trial or tokens <= self._marks[request]:
            return False
        self.gone(request)
        return True

    def gone(self, request: int) -> None:
        """The request has ended or was given up, and is not a suspect any more."""
        self._marks.pop(request, None)
        if self.on_trial == request:
            self.on_trial = None
