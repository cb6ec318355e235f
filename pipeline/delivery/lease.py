"""Keeping the requests in hand: each delivery's lease is renewed while its work goes on.

Leases are short, so that a dead worker's requests soon go to another. A worker that stood still for a whole lease
(stopped, swapped out, suspended) must take every request it holds for lost.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.broker.connection import Delivery, Unreachable

# Renewals per lease: one may be late or lost.
_RENEWALS = 3
# After a standstill, what had come meanwhile is read within this time.
_DOUBT_S = 0.5


@dataclass(slots=True, eq=False)
class Lease:
    """One delivery, ours until `expires_at` (`time.monotonic`: an event loop may give the time at which its turn began,
    and a process may be stopped in the middle of one).
    """

    delivery: Delivery
    expires_at: float
    on_lost: Callable[[], None]

    def holds(self) -> bool:
        """Whether the request is still ours, as far as this process can know."""
        return time.monotonic() < self.expires_at


@dataclass(slots=True)
class LeaseKeeper:
    """Renews all leases of one worker.

    Args:
        lease_s: how long the broker waits for a renewal, seconds.
        on_renewed: called after each round of renewals; what is published then reaches others after them.
    """

    lease_s: float
    on_renewed: Callable[[], None] = lambda: None
    _leases: list[Lease] = field(init=False, default_factory=list)
    _turned_at: float = field(init=False, default_factory=time.monotonic)
    _doubtful_until: float = field(init=False, default=0.0)

    def hold(self, delivery: Delivery, on_lost: Callable[[], None]) -> Lease:
        """Keep a delivery until `release`; on_lost is called once if its lease runs out before."""
        lease = Lease(delivery, time.monotonic() + self.lease_s, on_lost)
        self._leases.append(lease)
        return lease

    def release(self, lease: Lease) -> None:
        """Renew no more. Twice is harmless."""
        if lease in self._leases:
            self._leases.remove(lease)

    def stood_still(self) -> bool:
        """Whether this process has just stood still for a lease: what it is handed now may have been sent long ago.

        Nobody says when a delivery was sent. One that comes this soon after a standstill is dropped without a word: if
        it was meant for us after all, it comes again.
        """
        now = time.monotonic()
        return now < self._doubtful_until or now - self._turned_at > self.lease_s

    async def until_certain(self) -> None:
        """Wait while deliveries are in doubt: what is asked for only now would be dropped as well."""
        while self.stood_still():  # noqa: ASYNC110 - nothing but time ends it
            await asyncio.sleep(_DOUBT_S / 10)

    async def run(self) -> None:
        """Renew until cancelled."""
        self._turned_at = time.monotonic()
        while True:
            await asyncio.sleep(self.lease_s / _RENEWALS)
            now = time.monotonic()
            if now - self._turned_at > self.lease_s:
                self._doubtful_until = now + _DOUBT_S
            self._turned_at = now
            for lease in list(self._leases):
                await self._renew(lease)
            self.on_renewed()

    async def _renew(self, lease: Lease) -> None:
        if not lease.holds():
            self.release(lease)
            lease.on_lost()
            return
        renewed_at = time.monotonic()
        try:
            await lease.delivery.in_progress()
        except Unreachable:
            return
        lease.expires_at = renewed_at + self.lease_s
