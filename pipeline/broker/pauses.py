"""Follows what an operator has paused: read from the broker at the start, after a reconnect, and at each change."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from pipeline.aio import Background
from pipeline.broker.connection import BusError, Message
from pipeline.broker.jetstream import Bus
from pipeline.core.pauses import Pauses
from pipeline.wire.pauses import PausedState
from pipeline.wire.subjects import PAUSED, STREAM_STATE

log = logging.getLogger(__name__)

_AGAIN_S = 0.2
# A replica of the stream may be behind the message that announced a change.
_LOOKS = 5
_decoder = msgspec.json.Decoder(PausedState)


async def read_paused(bus: Bus) -> tuple[int, PausedState]:
    """The stored state and its sequence, 0 where there is none.

    Raises:
        Unreachable: the broker does not answer.
    """
    found = await bus.last_message(STREAM_STATE, PAUSED)
    return (0, PausedState()) if found is None else (found[0], _decoder.decode(found[1]))


@dataclass(slots=True)
class PauseBoard:
    """The pauses as one process knows them. One writer: its own reads.

    A message on the subject is a hint only: the stream may have refused it. What counts is what is stored.

    Attributes:
        now: what is paused.
        state: the same, with who paused it and why.
    """

    bus: Bus
    now: Pauses = field(init=False, default_factory=Pauses)
    state: PausedState = field(init=False, default_factory=PausedState)
    _sequence: int = field(init=False, default=0)
    _told: list[Callable[[], None]] = field(init=False, default_factory=list)
    _background: Background = field(init=False, default_factory=Background)

    async def start(self) -> None:
        """Read the pauses, and follow them from now on. Call once, when the streams exist.

        Raises:
            BusError: the broker does not answer.
        """
        await self.bus.subscribe(PAUSED, self._on_change)
        self.bus.on_reconnect(self._read_soon)
        await self._read()

    def listen(self, callback: Callable[[], None]) -> None:
        """Call callback after each change."""
        self._told.append(callback)

    async def _on_change(self, message: Message) -> None:
        self._read_soon(message.data)

    def _read_soon(self, announced: bytes = b"") -> None:
        self._background.start(self._read_until_known(announced), what="reading what is paused")

    async def _read_until_known(self, announced: bytes) -> None:
        looks = 0
        while looks < _LOOKS:
            try:
                if await self._read() == announced or not announced:
                    return
                looks += 1
            except BusError as error:
                log.info("What is paused could not be read; trying again: %s", error)
            await asyncio.sleep(_AGAIN_S)

    async def _read(self) -> bytes:
        """Read the stored state. Returns its bytes."""
        found = await self.bus.last_message(STREAM_STATE, PAUSED)
        sequence, data = (0, b"") if found is None else found
        # Of two reads at once, the first one may end last.
        if sequence >= self._sequence:
            self._sequence = sequence
            self._take(data)
        return data

    def _take(self, data: bytes) -> None:
        try:
            state = _decoder.decode(data) if data else PausedState()
        except msgspec.DecodeError as error:
            log.warning("Ignoring a malformed list of pauses: %s", error)
            return
        if state != self.state:
            self.state, self.now = state, Pauses.of(state)
            for callback in self._told:
                callback()
