"""The circuit breaker in front of an engine that may be unreachable."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Circuit(StrEnum):
    """The states of a breaker."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class BreakerPermit(NamedTuple):
    """Permission for one call. Report the outcome of the call with `succeeded`, `failed` or `abandoned`."""

    period: int


class Breaker:
    """Decides whether to call an engine. One writer: the engine's client. `now` is in monotonic seconds.

    A closed breaker allows every call. After `failures_to_trip` failures in a row it opens, and allows none. When the
    hold is over it is half-open, and allows one call at a time as a probe. A probe that succeeds closes the breaker. A
    probe that fails doubles the hold, up to the cap.

    Each change of state starts a new period. The outcome of a call counts only in the period of its permit, because a
    slow answer tells nothing about the present. A probe without a reported outcome counts as failed after
    `probe_timeout_s`.

    Args:
        failures_to_trip: the number of failures in a row that opens the breaker.
        hold_s: the first hold, seconds.
        hold_cap_s: the longest hold, seconds.
        probe_timeout_s: how long a probe may take, seconds.
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
            raise ValueError("A breaker needs failures_to_trip >= 1, 0 < hold_s <= hold_cap_s and probe_timeout_s > 0.")
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
        """The state. An open breaker becomes half-open when it allows a probe."""
        return self._circuit

    @property
    def closed(self) -> bool:
        """Whether every call is allowed."""
        return self._circuit is Circuit.CLOSED

    @property
    def reason(self) -> str:
        """The failure that opened the breaker; empty while it is closed."""
        return self._reason

    def permit(self, now: float) -> BreakerPermit | None:
        """A permit for one call, or None if the engine must not be called now."""
        if self._circuit is Circuit.CLOSED:
            return BreakerPermit(self._period)
        self._expire_probe(now)
        if self._circuit is Circuit.HALF_OPEN or now < self._wake:
            return None
        self._enter(Circuit.HALF_OPEN, wake=now + self._probe_timeout_s)
        return BreakerPermit(self._period)

    def succeeded(self, permit: BreakerPermit) -> None:
        """The engine answered the call."""
        if permit.period != self._period:
            return
        self._failures = 0
        if self._circuit is Circuit.HALF_OPEN:
            self._hold_s = 0.0
            self._reason = ""
            self._enter(Circuit.CLOSED)

    def failed(self, permit: BreakerPermit, now: float, reason: str) -> None:
        """The call failed because of the engine, not because of the request."""
        if permit.period != self._period:
            return
        self._failures += 1
        if self._circuit is Circuit.HALF_OPEN or self._failures >= self._failures_to_trip:
            self._open(now, reason)

    def abandoned(self, permit: BreakerPermit, now: float) -> None:
        """The call was given up before it had an outcome. The next probe is due at once."""
        if permit.period == self._period and self._circuit is Circuit.HALF_OPEN:
            self._enter(Circuit.OPEN, wake=now)

    def next_wake(self, now: float) -> float | None:
        """The time at which a probe is due, possibly in the past, or None while closed."""
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
