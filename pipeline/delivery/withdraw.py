"""Ending requests that stand in a queue and are in no one's hands."""

from __future__ import annotations

from typing import Protocol

from pipeline.broker.connection import Unreachable
from pipeline.broker.jetstream import Bus, Stored
from pipeline.core.ending import Abandoned, Failed, Loss, Outcome, Settled
from pipeline.core.envelope import Envelope, read_envelope
from pipeline.delivery.held import Held
from pipeline.telemetry import Tracing
from pipeline.wire.errors import HeadraceError
from pipeline.wire.subjects import Priority

_OFF = Tracing()


class QueuePlace(Protocol):
    """Where a request stands."""

    @property
    def stream(self) -> str:
        """The work queue."""
        ...

    @property
    def sequence(self) -> int:
        """The message's in that stream."""
        ...

    @property
    def priority(self) -> Priority:
        """The lane's."""
        ...


async def withdraw(
    bus: Bus, place: QueuePlace, error: HeadraceError, *, untouched: bool = False, tracing: Tracing = _OFF
) -> bool:
    """End the request that stands at a place with an error: that message, whatever else bears the same id.

    The record is closed first and the message deleted then. A worker that pulls the request in between finds it
    settled; a process that dies in between leaves a closed record to the next delivery.

    Args:
        bus: the connection.
        place: where the request stands.
        error: what its reader is told.
        untouched: leave the request alone if an attempt has begun its answer.
        tracing: records the end.

    Returns:
        Whether this call ended the request: not if it is gone, has ended, or is being written at this moment.

    Raises:
        Unreachable: the broker is away. The record may be closed already; call again.
    """
    stored = await bus.stored(place.stream, place.sequence)
    if stored is None:
        return False
    envelope = read_envelope(stored, place.priority, moves=bus.moves)
    ended = await _end(bus, place, stored, envelope, Failed(error), untouched=untouched)
    if ended == Abandoned(Loss.BROKER):
        raise Unreachable(f"request {envelope.name} was not ended: the broker did not answer")
    if not isinstance(ended, Failed):
        return False
    tracing.withdrawn(stored.subject, stored.headers, envelope, ended, stored_at_s=stored.stored_at)
    return True


async def _end(
    bus: Bus, place: QueuePlace, stored: Stored, envelope: Envelope, outcome: Failed, *, untouched: bool
) -> Outcome:
    """End the request with outcome, if it has not ended already. Returns how it ended."""

    def hold() -> Held:
        return Held.standing(bus, place.stream, stored, envelope)

    # Few requests that wait have a record, so it is read only if the first message turns out not to be ours.
    ended = await hold().end(outcome)
    if untouched or ended != Abandoned(Loss.OVERTAKEN):
        return ended
    held = hold()
    opened = await held.open()
    if isinstance(opened, Settled):
        return opened
    return await held.end(opened if isinstance(opened, Abandoned) else outcome)
