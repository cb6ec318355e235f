"""An engine's slots as permits: one is reserved before a request is asked for, used while it runs, and released.

Temporal's slot suppliers are the model (temporalio/sdk-python, `worker/_tuning.py`): because a slot is reserved before
the pull, a request that arrives always has one, and a second one that arrives at the same time cannot take it too.

A request that another worker had begun does not wait for a slot. It gets an overflow permit, beyond the slots. Nor does
one that is more urgent than one that runs, on an engine that suspends requests: it gets a preempting permit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pipeline.engine import MOST_PER_SLOT

PermitState = Literal["reserved", "used", "released"]


@dataclass(slots=True, eq=False)
class Permit:
    """The right to run one request on the engine."""

    state: PermitState = "reserved"


@dataclass(slots=True)
class Permits:
    """Counts the permits of one engine. One writer: the worker that runs it.

    Used permits fill the slots first, whichever kind they are; what exceeds the slots is overflow. So an overflowing
    request moves into a slot as soon as one is free, and no new request gets that slot.

    Attributes:
        total: the engine's slots.
    """

    total: int = field(init=False, default=0)
    _is_ready: bool = field(init=False, default=False)
    _suspends: bool = field(init=False, default=False)
    _engine_used: int = field(init=False, default=0)
    _reserved: int = field(init=False, default=0)
    _running: int = field(init=False, default=0)
    _is_closed: bool = field(init=False, default=False)

    def observe(self, *, ready: bool, total: int, used: int, suspends: bool = False) -> None:
        """Take in the engine's status.

        Args:
            ready: whether it takes requests.
            total: its slots.
            used: those that it counts as used. It may withhold free ones: all, while it loads or looks for the request
                that crashes it.
            suspends: whether it suspends a request in favour of a more urgent one.
        """
        self._is_ready, self.total, self._engine_used = ready, total, used
        self._suspends = suspends

    def close(self) -> None:
        """Grant no more permits: the worker drains."""
        self._is_closed = True

    # ---- granting

    def reserve(self) -> Permit | None:
        """A permit for a request that is to be pulled; None if no slot is free."""
        return self._granted() if self.free > 0 else None

    def overflow(self, *, unpulled: bool = False) -> Permit | None:
        """A permit for a request that another worker had begun; None if there is no `overflow_room` for it."""
        return self._granted() if self.overflow_room(unpulled=unpulled) > 0 else None

    def preempt(self, as_urgent: int) -> Permit | None:
        """A permit for a request that takes the place of a less urgent one; None if `preempt_room` is 0."""
        return self._granted() if self.preempt_room(as_urgent) > 0 else None

    def use(self, permit: Permit) -> None:
        """A request has arrived and runs under permit, which was reserved."""
        if permit.state == "reserved":
            permit.state = "used"
            self._reserved -= 1
            self._running += 1

    def release(self, permit: Permit) -> None:
        """The request has left the engine, or none arrived. Twice is harmless."""
        if permit.state == "reserved":
            self._reserved -= 1
        elif permit.state == "used":
            self._running -= 1
        permit.state = "released"

    def _granted(self) -> Permit:
        self._reserved += 1
        return Permit()

    # ---- counts

    @property
    def free(self) -> int:
        """Slots for which a permit can be reserved; 0 or less if none."""
        return 0 if self._is_closed or not self._is_ready else self._unfilled - self._reserved

    @property
    def holds(self) -> bool:
        """Whether the engine still has a slot for each reserved permit: else the pulls are withdrawn."""
        return self._is_ready and not self._is_closed and self._unfilled >= self._reserved

    def overflow_room(self, *, unpulled: bool = False) -> int:
        """How many overflow permits can be granted: none while a slot is unfilled, or while the engine withholds any.

        A reserved slot counts as unfilled. Its pull finds the request as well, since it is the first of its lane.

        Args:
            unpulled: no pull finds the request: its lane is paused, or another engine's. Then unfilled slots do not
                matter.
        """
        if not (self._is_full or (unpulled and self._takes_more)):
            return 0
        return MOST_PER_SLOT * self.total - self._running - self._reserved

    def preempt_room(self, as_urgent: int, *, mine: int = 0) -> int:
        """How many preempting permits can be granted: none while a slot is unfilled, or while the engine withholds any.

        Args:
            as_urgent: the running requests that are as urgent as the one that comes, or more.
            mine: reserved permits that do not count, because the caller has them.
        """
        if not (self._is_full and self._suspends):
            return 0
        room = min(self.total - as_urgent, MOST_PER_SLOT * self.total - self._running)
        return room - (self._reserved - mine)

    @property
    def used(self) -> int:
        """Slots that cannot be had: running requests, or what the engine withholds. At most `total`."""
        return min(self.total, max(self._running, self._engine_used))

    @property
    def over(self) -> int:
        """Requests that run beyond the slots."""
        return max(0, self._running - self.total)

    @property
    def _is_full(self) -> bool:
        """Whether the engine runs a request in each slot, and takes more."""
        return self._takes_more and self._unfilled <= 0

    @property
    def _takes_more(self) -> bool:
        """Whether the engine withholds no slot."""
        return self._is_ready and not self._is_closed and self._engine_used <= self._running

    @property
    def _unfilled(self) -> int:
        return self.total - max(self._running, self._engine_used)
