"""The circuit breaker in front of an engine that may be away: when to call it, and when to leave it alone."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Circuit(StrEnum):
    """How the breaker stands."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Permit(NamedTuple):
    """The right to make one call. Hand it back with what came of it: `succeeded`, `failed` or `abandoned`."""

    period: int


class Breaker:
    """Closed, it allows every call. After `failures_to_trip` failures in a row it opens and allows none;
    when the hold is over, one call at a time may probe (half-open). A probe that succeeds closes it; one that
    fails doubles the hold, up to its cap.

    Each opening or closing starts a new period, and what came of a call counts in the period of its permit
    only: an answer that was long on its way says nothing about now. A probe that nobody reports counts as
    failed after `probe_timeout_s`.

    Args:
        failures_to_trip: failures in a row that open it.
        hold_s: how long the first opening lasts.
        hold_cap_s: the longest that one lasts.
        probe_timeout_s: how long a probe may take.
    """

    def __init__(
        self,
        *,
        failures_to_trip: int = 3,
        hold_s: float = 1.0,
        hold_cap_s: float = 30.0,
        probe_timeout_s: float = 5.0,
    ) -> None:
        if failures_to_trip < 1 or not 0 < hold_s <= hold_cap_s or probe_timeout_s <= 0:
            raise ValueError("a breaker needs at least one failure to trip, and 0 < hold_s <= hold_cap_s")
        self._failures_to_trip = failures_to_trip
        self._first_hold_s = hold_s
        self._hold_cap_s = hold_cap_s
        self._probe_timeout_s = probe_timeout_s
        self._circuit = Circuit.CLOSED
        self._failures = 0
        self._hold_s = 0.0
        self._wake = 0.0  # open: when a probe is due; half-open: when it counts as failed
        self._period = 0
        self._reason = ""

    @property
    def circuit(self) -> Circuit:
        """How it stands; an open one becomes half-open when a probe is let through."""
        return self._circuit

    @property
    def closed(self) -> bool:
        """Whether calls are allowed without restraint."""
        return self._circuit is Circuit.CLOSED

    @property
    def reason(self) -> str:
        """The failure that keeps it from being closed; empty when it is closed."""
        return self._reason

    def permit(self, now: float) -> Permit | None:
        """Ask for one call: a permit, or None where the engine is to be left alone."""
        if self._circuit is Circuit.CLOSED:
            return Permit(self._period)
        self._expire_probe(now)
        if self._circuit is Circuit.HALF_OPEN or now < self._wake:
            return None
        self._enter(Circuit.HALF_OPEN, wake=now + self._probe_timeout_s)
        return Permit(self._period)

    def succeeded(self, permit: Permit) -> None:
        """The call was answered."""
        if permit.period != self._period:
            return
        self._failures = 0
        if self._circuit is Circuit.HALF_OPEN:
            self._hold_s = 0.0
            self._reason = ""
            self._enter(Circuit.CLOSED)

    def failed(self, permit: Permit, now: float, reason: str) -> None:
        """The call met a failure that speaks against the engine, and not against the request."""
        if permit.period != self._period:
            return
        self._failures += 1
        if self._circuit is Circuit.HALF_OPEN or self._failures >= self._failures_to_trip:
            self._open(now, reason)

    def abandoned(self, permit: Permit, now: float) -> None:
        """The call was given up before it could tell anything: the next probe is due at once."""
        if permit.period == self._period and self._circuit is Circuit.HALF_OPEN:
            self._enter(Circuit.OPEN, wake=now)

    def next_wake(self, now: float) -> float | None:
        """When a probe is due (at once when not after now), or None while closed."""
        if self._circuit is Circuit.CLOSED:
            return None
        self._expire_probe(now)
        return self._wake

    def _expire_probe(self, now: float) -> None:
        if self._circuit is Circuit.HALF_OPEN and now >= self._wake:
            self._open(self._wake, "the probe was not answered in time")

    def _open(self, now: float, reason: str) -> None:
        self._hold_s = min(self._hold_cap_s, self._hold_s * 2 or self._first_hold_s)
        self._reason = reason
        self._failures = 0
        self._enter(Circuit.OPEN, wake=now + self._hold_s)

    def _enter(self, circuit: Circuit, *, wake: float = 0.0) -> None:
        self._circuit = circuit
        self._wake = wake
        self._period += 1
