"""Turns: in a burst, the most urgent requests are begun and stored first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from pipeline.core.urgency import UrgentFirst
from pipeline.wire.subjects import Priority

# How many requests are being stored at once. One sync to disk of the broker serves about as many.
AT_ONCE = 32
# How many requests begin in one turn of the event loop.
PER_TURN = 8


class Turns:
    """Bounds how many requests are being stored, and lets the most urgent ones go first.

    One user: the gateway's event loop.
    """

    def __init__(self, at_once: int = AT_ONCE) -> None:
        self._free = at_once
        self._waiting: UrgentFirst[asyncio.Future[None]] = UrgentFirst()

    @asynccontextmanager
    async def turn(self, priority: Priority) -> AsyncIterator[None]:
        """Wait for a turn, and hold it for the duration of the block."""
        await self._take(priority)
        try:
            yield
        finally:
            self._return()

    async def _take(self, priority: Priority) -> None:
        if self._free:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(priority, turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._return()
            raise

    def _return(self) -> None:
        """Give the turn to the next one that still waits."""
        while self._waiting:
            turn = self._waiting.pop()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


class Beginnings:
    """Begins requests in the order of their urgency, `PER_TURN` in each turn of the event loop.

    One user: the connections of the HTTP server.
    """

    def __init__(self) -> None:
        self._waiting: UrgentFirst[Callable[[], None]] = UrgentFirst()
        self._left = PER_TURN
        self._scheduled = False

    def add(self, priority: Priority, begin: Callable[[], None]) -> None:
        """Call `begin` now if there is room in this turn of the event loop, else in a later one."""
        if self._left and not self._waiting:
            self._left -= 1
            begin()
        else:
            self._waiting.add(priority, begin)
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._left, self._scheduled = PER_TURN, False
        while self._waiting and self._left:
            self._left -= 1
            self._waiting.pop()()
        if self._waiting:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._next_turn)
