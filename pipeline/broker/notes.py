"""Follows a note in `LLM_STATE`: read at the start, after a reconnect, and at each change."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.aio import Background
from pipeline.broker.connection import BusError, Message
from pipeline.broker.jetstream import Bus
from pipeline.wire.subjects import STREAM_STATE

log = logging.getLogger(__name__)

_AGAIN_S = 0.2
# A replica of the stream may be behind the message that announced a change.
_LOOKS = 5


@dataclass(slots=True)
class NoteFollower:
    """The last message on a subject of `LLM_STATE`.

    A message on the subject is a hint only: the stream may have refused it. What counts is what is stored.

    Args:
        bus: the connection.
        subject: the note's.
        take: called with the stored bytes, empty if there is no note. They may be the same as before.
    """

    bus: Bus
    subject: str
    take: Callable[[bytes], None]
    _sequence: int = field(init=False, default=0)
    _background: Background = field(init=False, default_factory=Background)

    async def start(self) -> None:
        """Read the note, and follow it from now on. Call once, when the streams exist.

        Raises:
            BusError: the broker does not answer.
        """
        await self.bus.subscribe(self.subject, self._on_change)
        self.bus.on_reconnect(self._read_soon)
        await self.read()

    async def _on_change(self, message: Message) -> None:
        self._read_soon(message.data)

    def _read_soon(self, announced: bytes = b"") -> None:
        self._background.start(self._read_until_known(announced), what=f"reading {self.subject}")

    async def _read_until_known(self, announced: bytes) -> None:
        looks = 0
        while looks < _LOOKS:
            try:
                if await self.read() == announced or not announced:
                    return
                looks += 1
            except BusError as error:
                log.info("%s could not be read; trying again: %s", self.subject, error)
            await asyncio.sleep(_AGAIN_S)

    async def read(self) -> bytes:
        """Read the stored note, of whose change this process may not have heard. Returns its bytes.

        Raises:
            Unreachable: the broker does not answer.
        """
        found = await self.bus.last_message(STREAM_STATE, self.subject)
        sequence, data = (0, b"") if found is None else found
        # Of two reads at once, the first one may end last.
        if sequence >= self._sequence:
            self._sequence = sequence
            self.take(data)
        return data
