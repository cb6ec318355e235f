"""Cancels requests, wherever they are: queued, running, moving, or in the hands of a worker that has died.

The client is answered when the request's record is closed, so `cancelled` is a fact that a crash cannot undo.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import msgspec

from consumers.monitor.view import STREAMS, QueueView
from pipeline.aio import Background, wait_set
from pipeline.broker.connection import BusError
from pipeline.broker.jetstream import Bus
from pipeline.core.cancels import Cancels, OpenCancel
from pipeline.core.envelope import Envelope, read_envelope
from pipeline.core.index import Place
from pipeline.core.leadership import LEASE_S
from pipeline.delivery.withdraw import withdraw
from pipeline.telemetry import Tracing
from pipeline.wire.answers import Answer, ErrorAnswer, is_last
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import Cancelled
from pipeline.wire.subjects import CANCEL, RELAYED, Move, is_inbox, split_name

log = logging.getLogger(__name__)

# A worker that has received the cancel of a request ends it within this time. Afterwards the monitor ends the request:
# the worker has died, and another one would begin the request again.
_WORKER_ENDS_S = 1.0
_LOOK_EVERY_S = 0.05
# A request that is being written is tried again.
_TRIES = 20
# A client may send a cancel as soon as it has the PubAck. The announcement of the request follows within this time,
# or on a busy machine later: then it is waited for, but for no longer than the most.
_ANNOUNCED_AFTER_S = (0.02, 0.03, 0.05, 0.1)
_MOST_ANNOUNCED_AFTER_S = 5.0
# The largest error of this process's estimate of the broker's clock that matters here.
_CLOCK_ERROR_S = 0.05
_RETRY_AFTER_S = 1.0
# A monitor that stands by takes over within this time. It then carries out the cancels that the first one left.
_TAKEOVER_S = LEASE_S + 2.0
_LOOK_AGAIN_S = 10.0


class Soon(Protocol):
    """Runs a job soon, as `Endings.soon`."""

    def __call__(self, job: Callable[[], Awaitable[object]], *, urgent: bool = False) -> None:
        """Run a job soon; an urgent one before the others."""
        ...


@dataclass(slots=True)
class Cancelling:
    """Carries out cancels while this monitor leads. The one writer of the open cancels.

    A monitor that stands by follows them, so that none is lost with the monitor that received it.

    Args:
        bus: the connection.
        view: the unfinished requests.
        leads: whether this monitor acts.
        newest_on_record: the newest message of a request's record, as `QueueAnswers.newest_on_record`.
        soon: runs a job.
        tracing: for the spans of ending them.
    """

    bus: Bus
    view: QueueView
    leads: Callable[[], bool]
    newest_on_record: Callable[[str], Awaitable[Answer | None]]
    soon: Soon
    tracing: Tracing
    _cancels: Cancels = field(init=False, default_factory=Cancels)
    _waits: Background = field(init=False, default_factory=Background)
    _sooner: asyncio.Event = field(init=False, default_factory=asyncio.Event)

    async def run(self) -> None:
        """Look at followed cancels when they are due, until cancelled."""
        try:
            while True:
                self._sooner.clear()
                now = self.bus.clock.now()
                for name, cancel in self._cancels.due(now):
                    self._look(name, cancel)
                due = self._cancels.next_due()
                await wait_set(self._sooner, _LOOK_AGAIN_S if due is None else max(0.0, due - now))
        finally:
            self._waits.cancel()

    # ---- what is heard

    def cancel(self, name: str, reply: str) -> None:
        """Cancel a request, and publish the outcome to reply, if there is one."""
        place = self.view.find(name)
        if place is not None:
            # Whatever happens to the request from now on, the cancel knows.
            cancel = self._cancels.begin(name, place)
            job = self._answered if self.leads() else self._leave
            self.soon(partial(job, name, cancel, reply), urgent=True)
            return
        if filling := self.view.filling:
            self._cancels.expect(name, self.bus.clock.wall() + _CLOCK_ERROR_S)
        if self.leads():
            work = self._unknown(name, reply) if filling else self._find(name, reply)
            self._waits.start(work, what=f"the cancel of request {name}")

    def stored(self, envelope: Envelope, place: Place) -> None:
        """A request was announced. It can be a cancelled one that moves."""
        moved = _is_moved(envelope)
        cancel = self._cancels.announced(envelope.name, envelope.stored_at, place, moved=moved)
        if cancel is not None:
            self._resume(envelope.name, cancel)

    def read(self, envelope: Envelope, place: Place) -> None:
        """A request was read from the queue. A cancel can be waiting for it."""
        cancel = self._cancels.read(envelope.name, envelope.stored_at, place)
        if cancel is not None:
            self._resume(envelope.name, cancel)

    def filled(self) -> None:
        """The whole queue was read. Cancels that still wait for a request apply to none."""
        self._cancels.filled()

    # ---- what is done

    def _look(self, name: str, cancel: OpenCancel) -> None:
        if cancel.place is None or self.view.state(cancel.place) is None:
            self._cancels.done(name, cancel)
        else:
            self._resume(name, cancel)

    def _resume(self, name: str, cancel: OpenCancel) -> None:
        """Go on with a cancel that is followed, or whose request was found only now."""
        if self.leads() and cancel.place is not None:
            self._cancels.begin(name, cancel.place)
            self.soon(partial(self._answered, name, cancel, ""), urgent=True)
        else:
            self._follow(cancel, _TAKEOVER_S)

    async def _unknown(self, name: str, reply: str, state: str = "pending") -> None:
        """Reply to a cancel whose request is not known: how it ended, by its record, or else state.

        Its worker receives the cancel too. It may have ended the request before this process came to the cancel.
        """
        try:
            await self._reply(name, reply, await self._end_on_record(name) or state)
        except BusError as error:
            log.warning("The cancel of request %s was not answered: %s", name, error)

    async def _find(self, name: str, reply: str) -> None:
        """Cancel a request that is announced only now. A cancel does not apply to one that is stored after it."""
        heard_at = self.bus.clock.wall()
        try:
            async for _ in self._looks():
                place = self.view.find(name)
                envelope = None if place is None else await self._envelope_at(place, name)
                if place is not None and envelope is not None and envelope.stored_at <= heard_at + _CLOCK_ERROR_S:
                    await self._answered(name, self._cancels.begin(name, place), reply)
                    return
        except BusError as error:
            log.warning("Request %s was not cancelled: %s", name, error)
        await self._unknown(name, reply, "unknown")

    async def _looks(self) -> AsyncIterator[None]:
        """Give the moments to look for a request, until each that is stored now has been announced."""
        for pause_s in _ANNOUNCED_AFTER_S:
            await asyncio.sleep(pause_s)
            yield
        ends = {stream: (await self.bus.stream_state(stream)).last_seq for stream in STREAMS}
        give_up_at = self.bus.clock.now() + _MOST_ANNOUNCED_AFTER_S
        while True:
            yield
            if all(self.view.knows(*end) for end in ends.items()) or self.bus.clock.now() >= give_up_at:
                return
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _answered(self, name: str, cancel: OpenCancel, reply: str) -> None:
        """Cancel a request and reply to the client. A running request is left to its worker for a moment."""
        try:
            if await self._withdrawn(name, cancel, running=False):
                await self._reply(name, reply, "cancelled")
                return
            # A worker that has started it since the cancel came has ignored that one.
            await self.bus.publish(f"{CANCEL}.{name}", b"", headers={RELAYED: "monitor"})
        except BusError as error:
            log.warning("Request %s was not cancelled yet: %s", name, error)
        self._waits.start(self._until_ended(name, cancel, reply), what=f"the cancel of request {name}")

    async def _until_ended(self, name: str, cancel: OpenCancel, reply: str) -> None:
        """Wait until a running request has ended, and end it if its worker does not.

        The reply is `pending` if neither has happened: the monitor that leads then carries the cancel out later.
        """
        try:
            state = await self._left_to_worker(name, cancel) or await self._forced(name, cancel)
            if state is not None:
                self._cancels.done(name, cancel)
            await self._reply(name, reply, state or "pending")
        except BusError as error:
            log.warning("Request %s was not cancelled yet: %s", name, error)
        finally:
            # Without an effect if it is done.
            self._follow(cancel, _RETRY_AFTER_S)

    async def _left_to_worker(self, name: str, cancel: OpenCancel) -> str | None:
        give_up_at = self.bus.clock.now() + _WORKER_ENDS_S
        while True:
            state = await self._end_on_record(name, cancel)
            if state is not None or self.bus.clock.now() >= give_up_at:
                return state
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _forced(self, name: str, cancel: OpenCancel) -> str | None:
        for _ in range(_TRIES):
            if not self.leads():
                return None
            if await self._withdrawn(name, cancel, running=True):
                return "cancelled"
            if state := await self._end_on_record(name, cancel):
                return state
            if cancel.place is None or self.view.state(cancel.place) is None:
                return None
            await asyncio.sleep(_LOOK_EVERY_S)
        return None

    async def _end_on_record(self, name: str, cancel: OpenCancel | None = None) -> str | None:
        """How the request ended, by its record; None while it has not.

        With a cancel whose request is known, the end of an earlier request of the same id does not count.
        """
        newest = await self.newest_on_record(name)
        if newest is None or not is_last(newest):
            return None
        if cancel is not None and cancel.stored_at is not None and newest.created != int(cancel.stored_at):
            return None
        by_cancel = isinstance(newest, ErrorAnswer) and newest.error.code == ErrorCode.CANCELLED
        return "cancelled" if by_cancel else "finished"

    async def _withdrawn(self, name: str, cancel: OpenCancel, *, running: bool) -> bool:
        """Withdraw the request of a cancel, wherever it moves. Returns whether that ended it.

        Args:
            name: its name.
            cancel: the cancel.
            running: also if the request runs.
        """
        tried: set[Place] = set()
        while (place := cancel.place) is not None and place not in tried:
            tried.add(place)
            envelope = await self._envelope_at(place, name)
            if envelope is None:
                continue
            cancel.stored_at = envelope.stored_at
            state = self.view.state(place)
            if state != "queued" and not (running and state == "running"):
                continue
            error = _cancelled(name, before=state == "queued")
            if await withdraw(self.bus, place, error, tracing=self.tracing):
                self._cancels.done(name, cancel)
                return True
        return False

    async def _leave(self, name: str, cancel: OpenCancel, _reply: str) -> None:
        """Leave a cancel to the monitor that leads, and carry it out after a takeover if that one has not."""
        try:
            envelope = None if cancel.place is None else await self._envelope_at(cancel.place, name)
            if envelope is not None:
                cancel.stored_at = envelope.stored_at
        finally:
            self._follow(cancel, _TAKEOVER_S)

    async def _reply(self, name: str, reply: str, state: str) -> None:
        if is_inbox(reply):
            await self.bus.publish(reply, msgspec.json.encode(Cancelled(split_name(name)[1], state)))

    def _follow(self, cancel: OpenCancel, after_s: float) -> None:
        self._cancels.follow(cancel, self.bus.clock.now() + after_s)
        self._sooner.set()

    async def _envelope_at(self, place: Place, name: str) -> Envelope | None:
        """The request at a place; None if it is gone or has another name (the view compares hashes of names only)."""
        stored = await self.bus.stored(place.stream, place.sequence)
        if stored is None:
            return None
        envelope = read_envelope(stored, place.priority, moves=self.bus.moves)
        return envelope if envelope.name == name else None


def _is_moved(envelope: Envelope) -> bool:
    """Whether the request was stored elsewhere before. A replayed dead letter counts as a new request."""
    return envelope.move is not None and envelope.move is not Move.REPLAYED


def _cancelled(name: str, *, before: bool) -> HeadraceError:
    _, request_id = split_name(name)
    return HeadraceError(ErrorCode.CANCELLED, f"Request {request_id} was cancelled{' before it started' * before}.")
