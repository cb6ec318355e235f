"""Ends requests that wait: at their deadline, or at once if they would wait in vain.

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

from consumers.monitor.view import QueueView
from pipeline.aio import Background, wait_set
from pipeline.broker.connection import BusError
from pipeline.broker.jetstream import Bus
from pipeline.core.answer import expired
from pipeline.core.index import Place
from pipeline.delivery.withdraw import withdraw
from pipeline.telemetry import Tracing
from pipeline.wire.errors import HeadraceError

log = logging.getLogger(__name__)

# Requests that are ended concurrently. A burst must not crowd out everything else.
_AT_ONCE = 16
# Expired requests that are taken from the index at once. A million that expire together wait there.
_MOST_EXPIRED = 256
_RETRY_AFTER_S = 1.0
# The pause if no deadline is nearer.
_LOOK_AGAIN_S = 10.0

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
    """Ends waiting requests while this monitor leads, several at a time. The one writer of timers and jobs.

    Args:
        bus: the connection.
        view: the unfinished requests. A request is removed from it as soon as its end is decided.
        leads: whether this monitor acts.
        tracing: for the spans of ending them.
    """

    bus: Bus
    view: QueueView
    leads: Callable[[], bool]
    tracing: Tracing
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
        self.soon(partial(self._end, ending))

    # ---- timers

    def expect(self, deadline: float) -> None:
        """A request with this deadline (UTC seconds) was stored."""
        if deadline < self._wake_at:
            self._sooner.set()

    async def _watch(self) -> None:
        """One timer, for the earliest deadline."""
        while True:
            self._sooner.clear()
            await self._expire()
            await wait_set(self._sooner, self._pause_s())

    async def _expire(self) -> None:
        # If this monitor leads no more, the jobs put the requests back, and they would be found here again.
        while self.leads():
            wall_now = self.bus.clock.wall()
            places = self.view.expired(wall_now, _MOST_EXPIRED)
            for place in places:
                self.soon(partial(self._end, Ending(place, expired(queued=True), deadline=wall_now)))
            if len(places) < _MOST_EXPIRED:
                return
            await self._jobs.join()

    def _pause_s(self) -> float:
        wall_now = self.bus.clock.wall()
        pause_s = _LOOK_AGAIN_S
        if self.leads() and (deadline := self.view.next_deadline()) is not None:
            pause_s = min(pause_s, deadline - wall_now)
        self._wake_at = wall_now + pause_s
        return max(0.0, pause_s)

    # ---- jobs

    def soon(self, job: _Job, *, urgent: bool = False) -> None:
        """Run a job soon. Urgent jobs, for which a client waits, come first. A job raises `BusError` only."""
        self._jobs.put_nowait((0 if urgent else 1, next(self._numbers), job))

    async def _work(self) -> None:
        while True:
            _, _, job = await self._jobs.get()
            try:
                await job()
            except BusError as error:
                log.warning("A queued request was not ended: %s", error)
            except Exception:
                # The other requests are still ended.
                log.exception("A queued request was not ended.")
            finally:
                self._jobs.task_done()

    async def _end(self, ending: Ending) -> None:
        if not self.leads():
            self.view.put_back(ending.place, ending.deadline)
            return
        try:
            await withdraw(self.bus, ending.place, ending.error, tracing=self.tracing, untouched=ending.untouched)
        except BusError as error:
            place = ending.place
            log.warning(
                "The request at sequence %d of %s was not ended; retrying: %s", place.sequence, place.stream, error
            )
            self._retries.start(self._again(ending), what=f"ending the request at {place.stream} {place.sequence}")

    async def _again(self, ending: Ending) -> None:
        await asyncio.sleep(_RETRY_AFTER_S)
        self.soon(partial(self._end, ending))
