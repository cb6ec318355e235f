"""The clock of a connection: monotonic time here, and the broker's wall clock."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from pipeline.core.clock import NOTABLE_S, ClockEstimate, OffsetWatch

log = logging.getLogger(__name__)


class Clock:
    """Reads time for everything on one connection. Nothing else in a role reads a clock.

    Before the first timestamp from the broker, `wall` is this machine's wall clock.

    Args:
        monotonic: gives monotonic seconds.
        machine_wall: gives this machine's wall clock, UTC seconds.
    """

    def __init__(
        self, monotonic: Callable[[], float] = time.monotonic, machine_wall: Callable[[], float] = time.time
    ) -> None:
        self._monotonic = monotonic
        self._machine_wall = machine_wall
        self._estimate = ClockEstimate(machine_wall() - monotonic())
        self._offset = OffsetWatch()

    def now(self) -> float:
        """Monotonic seconds, comparable within this process only."""
        return self._monotonic()

    def wall(self) -> float:
        """The broker's UTC, seconds. This machine's wall clock has no influence on it."""
        return self._estimate.wall(self._monotonic())

    def aligned(self) -> float:
        """UTC for comparison with other processes and with the broker's times of storing, seconds.

        This machine's wall clock, while it agrees with the broker's as far as that is known: on one machine times then
        keep their order to the microsecond. Else the broker's.
        """
        here, there = self._machine_wall(), self.wall()
        return here if abs(here - there) <= self._estimate.error_s(self._monotonic()) else there

    @property
    def offset_s(self) -> float:
        """This machine's wall clock minus the broker's, seconds."""
        return self._machine_wall() - self.wall()

    def stamped(self, sent_at: float, stamped_at: float) -> None:
        """Take in a timestamp of the broker's (UTC) from an answer heard now to a request sent at sent_at (`now`)."""
        self._estimate.sample(sent_at, self._monotonic(), stamped_at)

    def report(self) -> None:
        """Log the offset if it is large, or has changed, or is small again; once each."""
        offset_s = self.offset_s
        if self._offset.is_news(offset_s):
            if abs(offset_s) > NOTABLE_S:
                log.warning("This machine's clock is %s. headrace uses the broker's clock.", described(offset_s))
            else:
                log.info("This machine's clock agrees with the broker's again.")


def described(offset_s: float) -> str:
    """An offset in words: `60.0 s ahead of the broker's`."""
    return f"{abs(offset_s):.1f} s {'ahead of' if offset_s > 0 else 'behind'} the broker's"
