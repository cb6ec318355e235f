"""The services of an operator: pause and resume lanes and tenants, and change the priority of what is queued."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import msgspec

from consumers.monitor.moving import Moving
from pipeline.broker import topology
from pipeline.broker.connection import NoResponders
from pipeline.broker.jetstream import Bus, Fenced
from pipeline.broker.pauses import read_paused
from pipeline.config import Config
from pipeline.core.pauses import described, paused, resumed
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.pauses import CallRefused, MoveCall, PauseCall, PausedState
from pipeline.wire.subjects import PAUSED, QUEUE_MOVE, QUEUE_PAUSE, QUEUE_PAUSED, QUEUE_RESUME
from pipeline.wire.validation import NotValid, decode

log = logging.getLogger(__name__)

# A monitor that has just lost its lease may write in between.
_TRIES = 3
_Change = Callable[[PausedState, PauseCall, float], PausedState]


@dataclass(slots=True)
class Operating:
    """Carries out the calls of operators while this monitor leads. The one writer of the pauses.

    Args:
        bus: the connection.
        config: the settings, to restore the stream of the pauses.
        moving: changes priorities.
    """

    bus: Bus
    config: Config
    moving: Moving
    _stop: Callable[[], Awaitable[None]] | None = field(init=False, default=None)

    async def start(self) -> None:
        """Begin to reply; twice is harmless. The queue group is this monitor's own, as in `QueueAnswers`."""
        if self._stop is None:
            self._stop = await self.bus.serve(
                "headrace-operator",
                "Pauses and resumes lanes and tenants, and changes the priority of queued requests",
                {
                    QUEUE_PAUSE: self._pause,
                    QUEUE_RESUME: self._resume,
                    QUEUE_PAUSED: self._paused,
                    QUEUE_MOVE: self._move,
                },
                queue=self.bus.new_inbox(),
            )

    async def stop(self) -> None:
        """Stop replying; twice is harmless."""
        stop, self._stop = self._stop, None
        if stop is not None:
            await stop()

    async def _pause(self, _: str, body: bytes) -> bytes:
        return await self._changed(body, paused, "paused")

    async def _resume(self, _: str, body: bytes) -> bytes:
        return await self._changed(body, resumed, "resumed")

    async def _paused(self, _subject: str, _body: bytes) -> bytes:
        _, state = await read_paused(self.bus)
        return msgspec.json.encode(state)

    async def _changed(self, body: bytes, change: _Change, word: str) -> bytes:
        try:
            call = decode(body, PauseCall)
            state = await self._store(call, change)
        except HeadraceError as error:
            return _refusal(error)
        except NotValid as error:
            return _refusal(HeadraceError(ErrorCode.INVALID_REQUEST, error.sentence))
        what, who, why = described(call.priority, call.tenant), call.by or "an unnamed operator", call.reason
        log.warning("%s was %s by %r%s", what, word, who, f": {why!r}" if why else "")
        return msgspec.json.encode(state)

    async def _store(self, call: PauseCall, change: _Change) -> PausedState:
        """Change the stored state; raises HeadraceError, and BusError if the broker does not store it."""
        tries_left = _TRIES
        while True:
            tries_left -= 1
            sequence, before = await read_paused(self.bus)
            after = change(before, call, round(self.bus.clock.wall(), 3))
            if after == before:
                return after
            try:
                await self.bus.put(PAUSED, msgspec.json.encode(after), expected_last=sequence, patience_s=0.0)
            except (NoResponders, Fenced) as error:
                if not tries_left:
                    raise
                if isinstance(error, NoResponders):
                    # A process of an older version has reset the stream's subjects.
                    await topology.apply(self.bus.js, self.config)
            else:
                return after

    async def _move(self, _: str, body: bytes) -> bytes:
        try:
            call = decode(body, MoveCall)
            report = await self.moving.move(call)
        except HeadraceError as error:
            return _refusal(error)
        except NotValid as error:
            return _refusal(HeadraceError(ErrorCode.INVALID_REQUEST, error.sentence))
        return msgspec.json.encode(report)


def _refusal(error: HeadraceError) -> bytes:
    return msgspec.json.encode(CallRefused(error.code, error.message))
