"""Ends requests that wait: at their deadline, when they are cancelled, or at once if they would wait in vain.

An ending applies to the request at one place, a stream and a sequence. It never applies to an id, which can be reused.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import NamedTuple

import msgspec

from consumers.monitor.view import QueueView
from pipeline.aio import Background, wait_set
from pipeline.broker.connection import BusError
from pipeline.broker.jetstream import Bus
from pipeline.core.answer import expired
from pipeline.core.cancels import Cancels, OpenCancel
from pipeline.core.envelope import Envelope, read_envelope
from pipeline.core.index import Place
from pipeline.core.leadership import LEASE_S
from pipeline.delivery.withdraw import withdraw
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import Answer, Cancelled, ErrorAnswer, is_last
from pipeline.wire.subjects import CANCEL, RELAYED, Move

log = logging.getLogger(__name__)

# Requests that are ended concurrently. A burst must not crowd out everything else.
_AT_ONCE = 16
# Expired requests that are taken from the index at once. A million that expire together wait there.
_MOST_EXPIRED = 256
_RETRY_AFTER_S = 1.0
# The pause if no deadline is nearer.
_LOOK_AGAIN_S = 10.0
# A monitor that stands by takes over within this time. It then carries out the cancels that the first one left.
_TAKEOVER_S = LEASE_S + 2.0

_Job = Callable[[], Awaitable[object]]


class Ending(NamedTuple):
    """The end of the request at a place.

    Attributes:
        place: where it is stored.
        error: the last message of its record.
        untouched: leave the request alone if an attempt has begun its answer.
        deadline: the request's, UTC seconds; None if it is not known.
    """

    place: Place
    error: HeadraceError
    untouched: bool = False
    deadline: float | None = None


@dataclass(slots=True)
class Endings:
    """Ends waiting requests while this monitor leads, several at a time. The one writer of cancels, timers and jobs.

    Args:
        bus: the connection.
        view: the unfinished requests. A request is removed from it as soon as its end is decided.
        leads: whether this monitor acts. A monitor that stands by follows the cancels, so that none is lost with the
            monitor that received it.
        newest_on_record: the newest message of a request's record, as `QueueAnswers.newest_on_record`.
        lease_s: the time after which a worker that has died loses its requests.
    """

    bus: Bus
    view: QueueView
    leads: Callable[[], bool]
    newest_on_record: Callable[[str], Awaitable[Answer | None]]
    lease_s: float
    _cancels: Cancels = field(init=False, default_factory=Cancels)
    # (rank, number, job): urgent jobs first, then in the order in which they came.
    _jobs: asyncio.PriorityQueue[tuple[int, int, _Job]] = field(init=False, default_factory=asyncio.PriorityQueue)
    _numbers: count[int] = field(init=False, default_factory=count)
    _retries: Background = field(init=False, default_factory=Background)
    _wake_at: float = field(init=False, default=0.0)
    _sooner: asyncio.Event = field(init=False, default_factory=asyncio.Event)

    async def run(self) -> None:
        """Work until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._watch())
                for _ in range(_AT_ONCE):
                    group.create_task(self._work())
        finally:
            self._retries.cancel()

    def wake(self) -> None:
        """This monitor leads from now on. Deadlines can have passed."""
        self._sooner.set()

    def end(self, ending: Ending) -> None:
        """End the request at a place soon. Retries while the broker is away."""
        self.view.remove(ending.place)
        self._soon(partial(self._end, ending))

    # ---- timers

    def expect(self, deadline: float) -> None:
        """A request with this deadline (UTC seconds) was stored."""
        if deadline < self._wake_at:
            self._sooner.set()

    async def _watch(self) -> None:
        """One timer, for the earliest of deadlines and cancels."""
        while True:
            self._sooner.clear()
            if self.leads():
                await self._expire()
            for request_id, cancel in self._cancels.due(self.bus.clock.now()):
                self._look(request_id, cancel)
            await wait_set(self._sooner, self._pause_s())

    async def _expire(self) -> None:
        while True:
            wall_now = self.bus.clock.wall()
            places = self.view.expired(wall_now, _MOST_EXPIRED)
            for place in places:
                self._soon(partial(self._end, Ending(place, expired(queued=True), deadline=wall_now)))
            if len(places) < _MOST_EXPIRED:
                return
            await self._jobs.join()

    def _look(self, request_id: str, cancel: OpenCancel) -> None:
        """End the request of a cancel that is due, unless it has ended, or another monitor leads still."""
        place = cancel.place
        if place is None or self.view.state(place) is None:
            self._cancels.done(request_id, cancel)
        elif self.leads():
            self._cancels.done(request_id, cancel)
            self.end(Ending(place, _cancelled(request_id)))
        else:
            self._cancels.follow(cancel, self.bus.clock.now() + _TAKEOVER_S)

    def _pause_s(self) -> float:
        wall_now, now = self.bus.clock.wall(), self.bus.clock.now()
        pause_s = _LOOK_AGAIN_S
        if self.leads() and (deadline := self.view.next_deadline()) is not None:
            pause_s = min(pause_s, deadline - wall_now)
        if (due := self._cancels.next_due()) is not None:
            pause_s = min(pause_s, due - now)
        self._wake_at = wall_now + pause_s
        return max(0.0, pause_s)

    # ---- jobs

    def _soon(self, job: _Job, *, urgent: bool = False) -> None:
        """Run a job soon. Urgent jobs, for which a client waits, come first. A job raises `BusError` only."""
        self._jobs.put_nowait((0 if urgent else 1, next(self._numbers), job))

    async def _work(self) -> None:
        while True:
            _, _, job = await self._jobs.get()
            try:
                await job()
            except BusError as error:
                log.warning("A queued request was not ended: %s", error)
            finally:
                self._jobs.task_done()

    async def _end(self, ending: Ending) -> None:
        if not self.leads():
            self.view.put_back(ending.place, ending.deadline)
            return
        try:
            await withdraw(self.bus, ending.place, ending.error, untouched=ending.untouched)
        except BusError as error:
            place = ending.place
            log.warning(
                "The request at sequence %d of %s was not ended; retrying: %s", place.sequence, place.stream, error
            )
            self._retries.start(self._again(ending), what=f"ending the request at {place.stream} {place.sequence}")

    async def _again(self, ending: Ending) -> None:
        await asyncio.sleep(_RETRY_AFTER_S)
        self._soon(partial(self._end, ending))

    # ---- cancels

    def cancel(self, request_id: str, reply: str) -> None:
        """Cancel a request soon, and publish the outcome to reply, if there is one."""
        place = self.view.find(request_id)
        # Whatever happens to the request from now on, the cancel knows.
        cancel = None if place is None else self._cancels.begin(request_id, place)
        waits = place is not None and self.view.state(place) == "queued"
        if cancel is None and self.view.filling:
            self._cancels.expect(request_id)
        if self.leads():
            self._soon(partial(self._answer_cancel, request_id, reply, cancel, waits=waits), urgent=True)
        elif cancel is not None:
            self._soon(partial(self._leave, request_id, cancel), urgent=True)

    def stored(self, envelope: Envelope, place: Place) -> None:
        """A request was announced. It can be a cancelled one that moves."""
        moved = _is_moved(envelope)
        cancel = self._cancels.announced(envelope.id, envelope.stored_at, place, moved=moved)
        if cancel is not None:
            self._cancel_again(envelope.id, cancel, place)

    def read(self, envelope: Envelope, place: Place) -> None:
        """A request was read from the queue. A cancel can be waiting for it."""
        cancel = self._cancels.read(envelope.id, envelope.stored_at, place)
        if cancel is not None:
            self._cancel_again(envelope.id, cancel, place)

    def filled(self) -> None:
        """The whole queue was read. Cancels that still wait for a request apply to none."""
        self._cancels.filled()

    def _cancel_again(self, request_id: str, cancel: OpenCancel, place: Place) -> None:
        """Carry out a cancel whose request was found only now."""
        if not self.leads():
            self._follow(cancel, _TAKEOVER_S)
            return
        self._cancels.begin(request_id, place)
        waits = self.view.state(place) == "queued"
        self._soon(partial(self._carry_out, request_id, cancel, waits=waits), urgent=True)

    async def _answer_cancel(self, request_id: str, reply: str, cancel: OpenCancel | None, *, waits: bool) -> None:
        """Cancel a request and reply to the client.

        Args:
            request_id: its id.
            reply: the subject of the reply, or empty.
            cancel: the cancel; None if no unfinished request of that id was known when it came.
            waits: whether the request was queued then. A worker that has started it since ignored the cancel.
        """
        try:
            state = await self._cancel(request_id, cancel, waits=waits)
            if reply:
                await self.bus.publish(reply, msgspec.json.encode(Cancelled(request_id, state)))
        except BusError as error:
            log.warning("Request %s was not cancelled: %s", request_id, error)

    async def _cancel(self, request_id: str, cancel: OpenCancel | None, *, waits: bool) -> str:
        if cancel is not None and await self._carry_out(request_id, cancel, waits=waits):
            return "cancelled"
        newest = await self.newest_on_record(request_id)
        if cancel is None and newest is None:
            return "pending" if self.view.filling else "unknown"
        # The worker of a request that was running has received the cancel too, and may have ended it already.
        ended_by_it = (
            cancel is not None and isinstance(newest, ErrorAnswer) and newest.error.code == ErrorCode.CANCELLED
        )
        return "finished" if newest is not None and is_last(newest) and not ended_by_it else "cancelled"

    async def _carry_out(self, request_id: str, cancel: OpenCancel, *, waits: bool) -> bool:
        """End a queued request. A running one is cancelled by its worker, which receives the cancel too.

        Returns:
            Whether the request was ended here.
        """
        ended = False
        try:
            ended = await self._ended(request_id, cancel)
            if waits:
                await self.bus.publish(f"{CANCEL}.{request_id}", b"", headers={RELAYED: "monitor"})
        finally:
            if ended:
                self._cancels.done(request_id, cancel)
            else:
                # A worker that has died receives no cancel, and the worker that resumes the request missed it.
                self._follow(cancel, self.lease_s + 1.0)
        return ended

    async def _ended(self, request_id: str, cancel: OpenCancel) -> bool:
        """Withdraw the request of a cancel, wherever it moves, unless it runs. Returns whether that ended it."""
        tried: set[Place] = set()
        while (place := cancel.place) is not None and place not in tried:
            tried.add(place)
            envelope = await self._envelope_at(place, request_id)
            if envelope is None:
                continue
            cancel.stored_at = envelope.stored_at
            if self.view.state(place) == "queued" and await withdraw(self.bus, place, _cancelled(request_id)):
                return True
        return False

    async def _leave(self, request_id: str, cancel: OpenCancel) -> None:
        """Leave a cancel to the monitor that leads, and carry it out after a takeover if that one has not."""
        try:
            envelope = None if cancel.place is None else await self._envelope_at(cancel.place, request_id)
            if envelope is not None:
                cancel.stored_at = envelope.stored_at
        finally:
            self._follow(cancel, _TAKEOVER_S)

    def _follow(self, cancel: OpenCancel, after_s: float) -> None:
        self._cancels.follow(cancel, self.bus.clock.now() + after_s)
        self._sooner.set()

    async def _envelope_at(self, place: Place, request_id: str) -> Envelope | None:
        """The request at a place; None if it is gone or has another id (the view compares hashes of ids only)."""
        stored = await self.bus.stored(place.stream, place.sequence)
        if stored is None:
            return None
        envelope = read_envelope(stored, place.priority)
        return envelope if envelope.id == request_id else None


def _is_moved(envelope: Envelope) -> bool:
    """Whether the request was stored elsewhere before. A replayed dead letter counts as a new request."""
    return envelope.move is not None and envelope.move is not Move.REPLAYED


def _cancelled(request_id: str) -> HeadraceError:
    return HeadraceError(ErrorCode.CANCELLED, f"Request {request_id} was cancelled before it started.")
