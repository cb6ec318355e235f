"""Keeping the requests in hand: each delivery's lease is renewed while the work on it goes on.

Leases are short, so that another worker soon gets the requests of a dead one. A worker that stood still for a whole
lease (stopped, swapped out, suspended) has lost every request it held.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.broker.clock import Clock
from pipeline.broker.connection import Delivery, Unreachable
from pipeline.core.standstill import DOUBT_S, Standstill
from pipeline.delivery.returns import OwedReturns

# Renewals per lease: one may be late or lost.
_RENEWALS = 3


@dataclass(slots=True, eq=False)
class Lease:
    """One delivery, ours until `expires_at` (monotonic; an event loop's own time may be that of the start of its turn,
    and a process may be stopped in the middle of one).
    """

    delivery: Delivery
    expires_at: float
    clock: Clock
    on_lost: Callable[[], None] = lambda: None

    def holds(self) -> bool:
        """Whether the request is still ours, as far as this process can know."""
        return self.clock.now() < self.expires_at


@dataclass(slots=True)
class LeaseKeeper:
    """Renews all leases of one process.

    Args:
        lease_s: how long the broker waits for a renewal, seconds.
        on_renewed: called after each round of renewals; what it publishes reaches others after them.
        clock: measures the time that passes.

    Attributes:
        owed: the returns of this process that the broker has not stored.
    """

    lease_s: float
    on_renewed: Callable[[], None] = lambda: None
    clock: Clock = field(default_factory=Clock)
    owed: OwedReturns = field(init=False, default_factory=OwedReturns)
    _leases: list[Lease] = field(init=False, default_factory=list)
    _standstill: Standstill = field(init=False)

    def __post_init__(self) -> None:
        self._standstill = Standstill(self.lease_s, self.clock.now())

    def hold(self, delivery: Delivery) -> Lease:
        """Keep a delivery until `release`. The lease's `on_lost` is called once if it runs out before."""
        lease = Lease(delivery, self.clock.now() + self.lease_s, self.clock)
        self._leases.append(lease)
        return lease

    def release(self, lease: Lease) -> None:
        """Renew no more. Twice is harmless."""
        if lease in self._leases:
            self._leases.remove(lease)

    def stood_still(self) -> bool:
        """Whether a delivery that arrives now may be an old one; see `Standstill`."""
        return self._standstill.stood_still(self.clock.now())

    async def until_certain(self) -> None:
        """Wait while deliveries are in doubt: what is asked for only now would be dropped as well."""
        while self.stood_still():  # noqa: ASYNC110 - only time ends it
            await asyncio.sleep(DOUBT_S / 10)

    async def run(self) -> None:
        """Renew three times per lease until cancelled."""
        self._standstill.turned_at = self.clock.now()
        while True:
            await asyncio.sleep(self.lease_s / _RENEWALS)
            await self.renew()

    async def renew(self) -> None:
        """Renew each lease that still holds, and let go of the others."""
        self._standstill.turned(self.clock.now())
        for lease in list(self._leases):
            # It may have been released while another one was renewed.
            if lease in self._leases:
                await self._renew(lease)
        self.on_renewed()

    async def _renew(self, lease: Lease) -> None:
        if not lease.holds():
            self.release(lease)
            lease.on_lost()
            return
        renewed_at = self.clock.now()
        try:
            await lease.delivery.in_progress()
        except Unreachable:
            return
        lease.expires_at = renewed_at + self.lease_s
