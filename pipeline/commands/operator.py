"""`headrace pause`, `resume`, `paused` and `move`: an operator's calls to the monitor."""

from __future__ import annotations

import getpass
import socket
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import msgspec

from pipeline.broker import operator
from pipeline.broker.jetstream import Bus
from pipeline.commands import run_client, say, say_json, tell
from pipeline.commands.stats import pause_line
from pipeline.process.terminal import visible
from pipeline.wire.errors import HeadraceError
from pipeline.wire.pauses import MoveCall, Pause, PauseCall, PausedState
from pipeline.wire.subjects import Priority

_Call = Callable[[Bus, PauseCall], Coroutine[Any, Any, PausedState]]
_LEFT = {
    "running": "already run",
    "there": "have this priority",
    "gone": "have ended",
    "full": "found no room in the lane",
    "too_large": "are too large to be moved",
    "invalid": "have invalid headers",
}


def pause(url: str, *, lane: str | None, tenant: str | None, reason: str) -> int:
    """Pause a lane or a tenant, and print what is paused. Return the exit code."""
    return _pauses(url, operator.pause, lane, tenant, reason)


def resume(url: str, *, lane: str | None, tenant: str | None, reason: str) -> int:
    """Resume a lane or a tenant, and print what is still paused. Return the exit code."""
    return _pauses(url, operator.resume, lane, tenant, reason)


def paused(url: str, *, as_json: bool, log: bool) -> int:
    """Print what is paused, or the log of pauses. Return the exit code."""
    return run_client(partial(_paused, as_json=as_json, log=log), url, name="headrace paused")


def move(url: str, call: MoveCall) -> int:
    """Change the priority of queued requests. Return 1 if none was moved, else 0."""
    call.by = _who()
    return run_client(partial(_refusable, work=partial(_move, call=call)), url, name="headrace move")


def _pauses(url: str, change: _Call, lane: str | None, tenant: str | None, reason: str) -> int:
    call = PauseCall(None if lane is None else Priority(lane), tenant, _who(), reason)

    async def work(bus: Bus) -> int:
        _show(await change(bus, call))
        return 0

    return run_client(partial(_refusable, work=work), url, name="headrace pause")


async def _refusable(bus: Bus, work: Callable[[Bus], Coroutine[Any, Any, int]]) -> int:
    try:
        return await work(bus)
    except HeadraceError as error:
        tell(f"headrace: {error.message}")
        return 1


async def _paused(bus: Bus, *, as_json: bool, log: bool) -> int:
    state = await operator.paused(bus)
    if as_json:
        say_json(msgspec.json.encode(state))
    elif log:
        for entry in state.log:
            of = Pause(entry.priority, entry.tenant, entry.by, entry.at, entry.reason)
            say(visible(pause_line(of, ended=entry.action == "resume"), keep=""))
    else:
        _show(state)
    return 0


def _show(state: PausedState) -> None:
    for pause in state.pauses:
        say(visible(pause_line(pause), keep=""))
    if not state.pauses:
        say("Nothing is paused.")


async def _move(bus: Bus, *, call: MoveCall) -> int:
    report = await operator.move(bus, call)
    say(f"{report.moved} request{'' if report.moved == 1 else 's'} moved to {report.priority}")
    for word, count in report.left.items():
        tell(f"{count} not moved: {_LEFT.get(word, word)}")
    return 0 if report.moved else 1


def _who() -> str:
    """The user of this machine, for the log."""
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (KeyError, OSError):
        return socket.gethostname()
