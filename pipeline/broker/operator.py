"""Calls of an operator to the monitor that leads."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from pipeline.broker.jetstream import Bus
from pipeline.wire.errors import HeadraceError
from pipeline.wire.pauses import CallRefused, MoveCall, MoveReport, PauseCall, PausedState
from pipeline.wire.subjects import QUEUE_MOVE, QUEUE_PAUSE, QUEUE_PAUSED, QUEUE_RESUME

_T = TypeVar("_T")

# Ten thousand requests are moved within this time.
_MOVE_TIMEOUT_S = 120.0


class _Kind(msgspec.Struct):
    object: str = ""


async def pause(bus: Bus, call: PauseCall) -> PausedState:
    """Pause a lane or a tenant. Returns what is paused then.

    Raises:
        HeadraceError: the call was refused.
        Unreachable: no monitor answers.
    """
    return _read((await bus.request(QUEUE_PAUSE, msgspec.json.encode(call))).data, PausedState)


async def resume(bus: Bus, call: PauseCall) -> PausedState:
    """Resume a lane or a tenant; returns and raises as `pause`."""
    return _read((await bus.request(QUEUE_RESUME, msgspec.json.encode(call))).data, PausedState)


async def paused(bus: Bus) -> PausedState:
    """What is paused; raises Unreachable if no monitor answers."""
    return _read((await bus.request(QUEUE_PAUSED)).data, PausedState)


async def move(bus: Bus, call: MoveCall) -> MoveReport:
    """Change the priority of queued requests; raises as `pause`."""
    answer = await bus.request(QUEUE_MOVE, msgspec.json.encode(call), timeout_s=_MOVE_TIMEOUT_S)
    return _read(answer.data, MoveReport)


def _read(data: bytes, kind: type[_T]) -> _T:
    if msgspec.json.decode(data, type=_Kind).object == CallRefused().object:
        refusal = msgspec.json.decode(data, type=CallRefused)
        raise HeadraceError(refusal.code, refusal.message)
    return msgspec.json.decode(data, type=kind)
