"""Follows what an operator has paused: read from the broker at the start, after a reconnect, and at each change."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from pipeline.broker.jetstream import Bus
from pipeline.broker.notes import NoteFollower
from pipeline.core.pauses import Pauses
from pipeline.wire.pauses import PausedState
from pipeline.wire.subjects import PAUSED, STREAM_STATE
from pipeline.wire.validation import UNREADABLE

log = logging.getLogger(__name__)

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
    """The pauses as one process knows them. One writer: its note.

    Attributes:
        now: what is paused.
        state: the same, with who paused it and why.
    """

    bus: Bus
    now: Pauses = field(init=False, default_factory=Pauses)
    state: PausedState = field(init=False, default_factory=PausedState)
    _note: NoteFollower = field(init=False)
    _told: list[Callable[[], None]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._note = NoteFollower(self.bus, PAUSED, self._take)

    async def start(self) -> None:
        """Read the pauses, and follow them from now on; as `NoteFollower.start`."""
        await self._note.start()

    def listen(self, callback: Callable[[], None]) -> None:
        """Call callback after each change."""
        self._told.append(callback)

    def _take(self, data: bytes) -> None:
        try:
            state = _decoder.decode(data) if data else PausedState()
        except UNREADABLE as error:
            log.warning("Ignoring a malformed list of pauses: %s", error)
            return
        if state != self.state:
            self.state, self.now = state, Pauses.of(state)
            for callback in self._told:
                callback()
