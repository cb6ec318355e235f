"""Whether the broker's store can take new requests: room on its disk, writes that failed, and when a restart helps.

A nats-server whose disk was full stores nothing more in the streams that it failed to write, even after there is room
again. Only a restart reopens them. So room alone does not end the state `failed`.

Pure: `now` is monotonic seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.core.backoff import doubled
from pipeline.wire.messages import StoreReport, StoreState

# New requests are refused while less than this is free, or less than this share of a small disk. The requests that were
# accepted need the room: for their answers, their moves and their acknowledgements.
RESERVE_BYTES = 256 << 20
_RESERVE_SHARE = 0.1
# Warn below this many reserves.
_LOW = 4.0
# A state is left only this far above its threshold.
_LEAVE = 1.25
# Failed writes count for this long, and only if they go on for `_LASTING_S`: a single one can be a slow broker.
_FAILURE_KEPT_S = 5.0
_LASTING_S = 1.5
# Pauses between restarts, if one did not help.
_FIRST_RESTART_S, _MOST_RESTART_S = 5.0, 60.0

_MIB = 1 << 20


class Disk(NamedTuple):
    """The room of a store, bytes: that of its filesystem, or what the server's `max_file_store` leaves of it.

    Attributes:
        free, total: bytes.
        limited: `max_file_store` leaves less than the filesystem has.
    """

    free: int
    total: int
    limited: bool = False

    @property
    def reserve(self) -> int:
        """The room that is kept for accepted requests, bytes."""
        return min(RESERVE_BYTES, int(self.total * _RESERVE_SHARE))

    @property
    def exhausted(self) -> bool:
        """Whether a server could not even start."""
        return self.free < min(_MIB, self.reserve // 2)

    def within(self, used: int, most: int) -> Disk:
        """The room of a server that has stored `used` bytes and stores at most `most`."""
        left = max(0, most - used)
        return self if left >= self.free else Disk(left, min(most, self.total), limited=True)

    @property
    def what(self) -> str:
        """What has the room, as the beginning of a sentence."""
        return "The broker's store, by max_file_store," if self.limited else "The disk of the broker's store"

    @property
    def advice(self) -> str:
        """How to make room."""
        return "Purge dead letters, or wait until requests are answered." if self.limited else "Make room."

    def __str__(self) -> str:
        return f"{size(self.free)} of {size(self.total)} free"


def size(count: int) -> str:
    """A number of bytes as text: `3.4 MiB`, `12 GiB`."""
    number, unit = (count / _MIB, "MiB") if count < 1024 * _MIB else (count / 1024 / _MIB, "GiB")
    return f"{number:.3g} {unit}" if number < 1000 else f"{number:.0f} {unit}"


@dataclass(slots=True)
class Failures:
    """Writes that the broker did not confirm, as the processes that sent them announce. One writer: its owner."""

    subject: str = field(init=False, default="")
    _first_at: float = field(init=False, default=float("-inf"))
    _last_at: float = field(init=False, default=float("-inf"))

    def heard(self, subject: str, now: float) -> None:
        """The broker did not confirm a message on subject."""
        if now - self._last_at > _FAILURE_KEPT_S:
            self._first_at = now
        self.subject, self._last_at = subject, now

    def forget(self) -> None:
        """The broker was restarted."""
        self._first_at = self._last_at = float("-inf")

    def lasting(self, now: float) -> bool:
        """Whether writes have failed for a while, and still do."""
        return now - self._last_at <= _FAILURE_KEPT_S and self._last_at - self._first_at >= _LASTING_S

    def report(self, now: float) -> StoreReport | None:
        """What failed writes alone say about the store; None if nothing."""
        if not self.lasting(now):
            return None
        return StoreReport(
            "failed",
            f"The broker does not store messages on {self.subject}. Check the disk of its store; if it was full, make "
            "room and restart nats-server.",
        )


@dataclass(slots=True)
class StoreHealth:
    """The state of one embedded broker's store. One writer: the process that owns the broker.

    Attributes:
        failures: what other processes announce.
    """

    failures: Failures = field(init=False, default_factory=Failures)
    _level: StoreState = field(init=False, default="ok")
    _was_full: bool = field(init=False, default=False)
    _error: str = field(init=False, default="")
    _restarts: int = field(init=False, default=0)
    _restart_at: float = field(init=False, default=float("-inf"))
    _restarted_at: float = field(init=False, default=float("-inf"))

    def write_failed(self, error: str) -> None:
        """The server itself says that it could not write, or that JetStream is off."""
        self._error = error

    def observe(self, disk: Disk, now: float) -> StoreReport:
        """The state of the store."""
        self._level = _level(disk, self._level)
        self._was_full = self._was_full or self._level == "full"
        where = f"{disk.what} has {disk}"
        match self._failed(now), self._level:
            case True, "full":
                reason = f"{where}, and the broker cannot write. Make room; it is restarted then."
                return StoreReport("failed", reason, disk.free, disk.total)
            case True, _:
                reason = f"The broker cannot write to its store ({self._said()}). It is being restarted."
                return StoreReport("failed", reason, disk.free, disk.total)
            case _, "full":
                reason = f"{where}, and {size(disk.reserve)} are kept for accepted requests. {disk.advice}"
                return StoreReport("full", reason, disk.free, disk.total)
            case _, "low":
                reason = f"{where}. Below {size(disk.reserve)}, new requests are refused."
                return StoreReport("low", reason, disk.free, disk.total)
            case _:
                return StoreReport("ok", "", disk.free, disk.total)

    def may_restart(self, now: float) -> bool:
        """Whether to restart the server now: it cannot write although there is room."""
        return self._failed(now) and self._level != "full" and now >= self._restart_at

    def restarted(self, now: float) -> None:
        """The server was asked to stop and start again. What it said before counts no more."""
        if now - self._restarted_at > 2 * _MOST_RESTART_S:
            self._restarts = 0
        self._restarts += 1
        self._restarted_at = now
        self._restart_at = now + doubled(_FIRST_RESTART_S, self._restarts, most_s=_MOST_RESTART_S)
        self._error, self._was_full = "", False
        self.failures.forget()

    def _failed(self, now: float) -> bool:
        # Timeouts alone can be a slow machine; after the disk was full they are the server's failure.
        return bool(self._error) or (self._was_full and self.failures.lasting(now))

    def _said(self) -> str:
        return self._error or f"messages on {self.failures.subject} are not confirmed"


def limit_bytes(disk: Disk, used: int) -> int:
    """How large the stream of requests may be, bytes, when it has `used`; -1 for no limit.

    The broker's own limit also refuses requests that are published without asking the gateway.
    """
    if disk.free >= _LOW * disk.reserve:
        return -1
    return max(1, used + disk.free - disk.reserve)


def moved_enough(old: int, new: int) -> bool:
    """Whether a stream's limit has moved so far that the stream is changed: each change is a write."""
    return old != new and (-1 in (old, new) or abs(new - old) > max(old, new) // 20)


def _level(disk: Disk, before: StoreState) -> StoreState:
    full_below = disk.reserve * (_LEAVE if before == "full" else 1)
    low_below = _LOW * disk.reserve * (_LEAVE if before in ("low", "full") else 1)
    if disk.free < full_below:
        return "full"
    return "low" if disk.free < low_below else "ok"
