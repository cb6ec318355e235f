"""Where a request in hand is stored, and what keeping it, acknowledging it and returning it means there.

A worker or the router has it from a consumer, under a lease; the monitor takes hold of it where it stands in its queue.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from pipeline.broker.connection import Delivery, Headers
from pipeline.broker.jetstream import Bus, Stored
from pipeline.delivery.lease import LeaseKeeper
from pipeline.delivery.returns import note_return, times_returned


class Grip(Protocol):
    """Where a request is stored, and what acknowledging and returning it means there."""

    subject: str
    sequence: int
    stored_at: float
    headers: Headers
    data: bytes

    def holds(self) -> bool:
        """Whether the request is still this process's."""

    def when_lost(self, callback: Callable[[], None]) -> None:
        """Have callback called once when it is not any more."""

    def release(self) -> None:
        """Keep it no longer. Twice is harmless."""

    async def remove(self) -> None:
        """Acknowledge it: it leaves its queue."""

    async def nak(self, delay_s: float) -> None:
        """Return it, to be delivered again after a delay."""

    async def note_return(self) -> None:
        """Note at the broker that this delivery was returned, and is no attempt."""

    def owe_return(self) -> None:
        """Have that noted later, when the broker can be reached."""

    async def times_returned(self) -> int:
        """How many of its deliveries were returned."""


class Leased:
    """A request that a durable consumer delivered, under a lease."""

    def __init__(self, bus: Bus, delivery: Delivery, leases: LeaseKeeper) -> None:
        self._bus = bus
        self._delivery = delivery
        self._leases = leases
        self._lease = leases.hold(delivery)
        self.subject, self.data = delivery.message.subject, delivery.message.data
        self.sequence, self.stored_at, self.headers = delivery.sequence, delivery.stored_at, delivery.headers

    def holds(self) -> bool:
        """Whether the lease does."""
        return self._lease.holds()

    def when_lost(self, callback: Callable[[], None]) -> None:
        """When the lease runs out."""
        self._lease.on_lost = callback

    def release(self) -> None:
        """Renew the lease no more."""
        self._leases.release(self._lease)

    async def remove(self) -> None:
        """Acknowledge the delivery."""
        await self._delivery.ack()

    async def nak(self, delay_s: float) -> None:
        """Return the delivery."""
        await self._delivery.nak(delay_s)

    async def note_return(self) -> None:
        """Note the return of this delivery."""
        await note_return(self._bus, self._delivery)

    def owe_return(self) -> None:
        """Leave the note to the keeper of the leases."""
        self._leases.owed.owe(self._bus, self._delivery)

    async def times_returned(self) -> int:
        """Those that are noted, and those that are owed a note."""
        # Counted first: a return that is noted meanwhile counts twice rather than not at all.
        owed = self._leases.owed.count(self._delivery)
        return owed + await times_returned(self._bus, self._delivery)


class Queued:
    """A request that stands in a queue and was delivered to no one: it needs no lease and no return."""

    def __init__(self, bus: Bus, stream: str, stored: Stored) -> None:
        self._bus = bus
        self._stream = stream
        self.subject, self.data = stored.subject, stored.data
        self.sequence, self.stored_at, self.headers = stored.sequence, stored.stored_at, stored.headers

    def holds(self) -> bool:
        """Always: no one else was given it."""
        return True

    def when_lost(self, callback: Callable[[], None]) -> None:
        """Never."""

    def release(self) -> None:
        """There is no lease."""

    async def remove(self) -> None:
        """Delete the message."""
        await self._bus.delete(self._stream, self.sequence)

    async def nak(self, delay_s: float) -> None:
        """It was not delivered."""

    async def note_return(self) -> None:
        """It is not returned."""

    def owe_return(self) -> None:
        """It is not returned."""

    async def times_returned(self) -> int:
        """None of them."""
        return 0
