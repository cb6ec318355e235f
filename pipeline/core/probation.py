"""Who brought the engine down: after a crash its requests run again alone, one at a time, until the culprit is known.

Everything in flight at a crash is a suspect. Suspects go on trial, the most recently begun first, for what joined last
is the likeliest cause. One that gets past where it stood at the crash, or ends, is cleared and waits; one under which
the engine crashes again, alone, is guilty. When none is left, the cleared ones go on together. So whoever is innocent
suffers the one crash in company and no other.

A request alone at its first crash is a suspect like any other: the engine may have been killed from outside, and one
more try tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class Probation:
    """Suspects and the one on trial. One writer: the engine's supervisor. Requests are known by any number of theirs.

    `on_trial` is the request that runs alone now, if any.
    """

    on_trial: int | None = None
    _marks: dict[int, int] = field(default_factory=dict)

    @property
    def active(self) -> bool:
        """Whether nothing but the one on trial may run."""
        return bool(self._marks)

    def crashed(self, in_flight: Mapping[int, int]) -> int | None:
        """The engine went down. Returns the guilty request, if this crash tells.

        Args:
            in_flight: what ran, in the order in which it had begun, with the tokens that each had produced.
        """
        guilty, self.on_trial = self.on_trial, None
        if guilty is not None and guilty in in_flight:
            del self._marks[guilty]
            return guilty
        self._marks |= in_flight
        return None

    def call_next(self) -> int | None:
        """The next suspect to run alone, which is then on trial. None while there is a trial, or no suspect."""
        if self.on_trial is not None or not self._marks:
            return None
        self.on_trial = next(reversed(self._marks))
        return self.on_trial

    def progressed(self, request: int, tokens: int) -> bool:
        """The request has produced tokens in all. Returns whether that clears it: its trial is over."""
        if request != self.on_trial or tokens <= self._marks[request]:
            return False
        self.gone(request)
        return True

    def gone(self, request: int) -> None:
        """The request has ended or was given up: it is no suspect any more."""
        self._marks.pop(request, None)
        if self.on_trial == request:
            self.on_trial = None
