"""Ending requests that stand in a queue and are in no one's hands."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Protocol

from pipeline.broker.connection import BusError, Unreachable
from pipeline.broker.jetstream import Bus
from pipeline.core.answer import expired
from pipeline.core.ending import Abandoned, Failed, Loss, Settled
from pipeline.core.envelope import read_envelope
from pipeline.core.index import Entry, QueueIndex
from pipeline.delivery.held import Held
from pipeline.wire.errors import HeadraceError
from pipeline.wire.subjects import Priority

log = logging.getLogger(__name__)

# Requests that are ended side by side: a burst of them must neither crowd out all else nor take for ever.
_AT_ONCE = 16
_RETRY_AFTER_S = 1.0
# The clock of the loop may stand still while the clock on the wall does not.
_LOOK_AGAIN_S = 10.0

Job = Callable[[], Awaitable[None]]


@dataclass(slots=True)
class Withdrawals:
    """Ends waiting requests side by side, those of the index whose deadline passes among them.

    Args:
        bus: the connection.
        index: what waits; requests are taken out of it as soon as their end is settled on.
    """

    bus: Bus
    index: QueueIndex
    # (rank, number, job): what is urgent goes first, else what came first.
    _jobs: asyncio.PriorityQueue[tuple[int, int, Job]] = field(init=False, default_factory=asyncio.PriorityQueue)
    _numbers: count[int] = field(init=False, default_factory=count)
    _wake_at: float = field(init=False, default=0.0)
    _sooner: asyncio.Event = field(init=False, default_factory=asyncio.Event)

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._expire())
            for _ in range(_AT_ONCE):
                group.create_task(self._work())

    def soon(self, job: Job, *, urgent: bool = False) -> None:
        """Have a job done that ends a request, before all others where somebody waits for it.

        What it raises, but for `BusError`, ends `run`.
        """
        self._jobs.put_nowait((0 if urgent else 1, next(self._numbers), job))

    def end(self, request_id: str, error: HeadraceError, *, untouched: bool = False) -> None:
        """Have a request ended, as `withdraw`; tried again while the broker is away."""
        entry = self.index.find(request_id)
        if entry is not None:
            self.index.remove(request_id)
            self.soon(partial(self._end, request_id, entry, error, untouched=untouched))

    def expect(self, deadline: float) -> None:
        """The index has a new deadline, UTC seconds."""
        if deadline < self._wake_at:
            self._sooner.set()

    async def _expire(self) -> None:
        """One timer, for the earliest deadline of all."""
        while True:
            for request_id, entry in self.index.expired(self.bus.clock.wall()):
                self.soon(partial(self._end, request_id, entry, expired()))
            due = self.index.next_deadline()
            latest = self.bus.clock.wall() + _LOOK_AGAIN_S
            self._wake_at = latest if due is None else min(due, latest)
            try:
                async with asyncio.timeout(max(0.0, self._wake_at - self.bus.clock.wall())):
                    await self._sooner.wait()
            except TimeoutError:
                pass
            self._sooner.clear()

    async def _work(self) -> None:
        while True:
            _, _, job = await self._jobs.get()
            try:
                await job()
            except BusError as error:
                log.warning("a waiting request was not ended: %s", error)

    async def _end(self, request_id: str, entry: Entry, error: HeadraceError, *, untouched: bool = False) -> None:
        try:
            await withdraw(self.bus, entry, error, untouched=untouched)
        except BusError as reason:
            log.warning("%s: not ended yet: %s", request_id, reason)
            if self.index.find(request_id) is None:
                deadline = max(entry.deadline or 0.0, self.bus.clock.wall() + _RETRY_AFTER_S)
                self.index.stored(request_id, entry.stream, entry.priority, entry.sequence, deadline)
                self.expect(deadline)


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


async def withdraw(bus: Bus, place: QueuePlace, error: HeadraceError, *, untouched: bool = False) -> bool:
    """End the request that stands at a place with an error: that message, whatever else bears the same id.

    The record is closed first and the message deleted then. A worker that pulls the request in between finds it
    settled; a process that dies in between leaves a closed record to the next delivery.

    Args:
        bus: the connection.
        place: where the request stands.
        error: what its reader is told.
        untouched: leave the request alone if an attempt has begun its answer.

    Returns:
        Whether this call ended the request: not if it is gone, has ended, or is being written at this moment.

    Raises:
        Unreachable: the broker is away. The record may be closed already; call again.
    """
    stored = await bus.stored(place.stream, place.sequence)
    if stored is None:
        return False
    envelope = read_envelope(stored, place.priority)

    def hold() -> Held:
        return Held.standing(bus, place.stream, stored, envelope)

    # Few requests that wait have a record, so it is read only if the first message turns out not to be ours.
    ended = await hold().end(Failed(error))
    if ended == Abandoned(Loss.OVERTAKEN) and not untouched:
        held = hold()
        opened = await held.open()
        if isinstance(opened, Settled):
            return False
        ended = await held.end(opened if isinstance(opened, Abandoned) else Failed(error))
    if ended == Abandoned(Loss.BROKER):
        raise Unreachable(f"request {envelope.id} was not ended: the broker did not answer")
    return isinstance(ended, Failed)
