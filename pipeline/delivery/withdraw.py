"""Ending requests that wait in the queue: the record is closed first, then the request is removed at the broker.

Whoever pulls it in between finds it settled, or is fenced. Whoever dies in between leaves a closed record, which the
next delivery settles.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from pipeline.broker.connection import BusError
from pipeline.broker.jetstream import Bus
from pipeline.core.answer import Record, error_answer, expired
from pipeline.core.ending import ended_event
from pipeline.core.envelope import read_envelope
from pipeline.core.index import Entry, QueueIndex
from pipeline.delivery.record import LeaseLost, RecordWriter
from pipeline.wire.errors import HeadraceError
from pipeline.wire.messages import encode
from pipeline.wire.subjects import EVENT, reply_subject

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


async def withdraw(bus: Bus, entry: Entry, error: HeadraceError, *, untouched: bool = False) -> bool:
    """End a request with an error.

    Args:
        bus: the connection.
        entry: where it waits.
        error: what its reader is told.
        untouched: leave it alone where an attempt has written already.

    Returns:
        Whether it was ended; not where it is gone, has its last message, or somebody writes it at this moment.

    Raises:
        Unreachable: the broker is away; the record may be closed already, and the next delivery settles it.
    """
    found = await bus.stored(entry.stream, entry.sequence)
    if found is None:
        return False
    envelope = read_envelope(found, entry.priority)
    writer = RecordWriter(bus, envelope, lambda: True)
    answer = error_answer(envelope, error)
    try:
        try:
            await writer.write(answer)
        except LeaseLost:
            # An attempt that was given back, or has died, has begun the record.
            record = Record.read(await bus.read_answers(reply_subject(envelope.id)), envelope.created)
            if untouched or record.last is not None:
                return False
            writer.last_sequence = record.last_sequence
            await writer.write(answer)
    except LeaseLost:
        return False
    await bus.delete(entry.stream, entry.sequence)
    event = ended_event(envelope, error)
    await bus.publish(f"{EVENT}.{entry.priority}.{event.kind}", encode(event))
    return True
