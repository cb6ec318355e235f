"""The commands of `headrace`, one module each. A command is imported when it is called, so that `send` starts fast."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from pipeline.broker.connection import BusError, Unreachable, without_password
from pipeline.broker.jetstream import Bus
from pipeline.up.reach import broker_trouble

# A command waits this long for a broker that it has lost.
_AWAY_S = 10.0
_LOOK_EVERY_S = 0.2


def say(text: str = "", *, end: str = "\n") -> None:
    """Write to stdout, where the result of a command goes, and flush."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def tell(text: str) -> None:
    """Write to stderr, where errors and notes go, and flush."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def visible(text: str, *, keep: str = "\n\t") -> str:
    """Return text with control characters escaped: a publisher wrote it, and it must not control the terminal."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def sentence(text: str) -> str:
    """Return text with a capital letter and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def run_client(work: Callable[[Bus], Coroutine[Any, Any, int]], url: str, *, name: str) -> int:
    """Connect to the broker at url, run work, and return the exit code.

    If the broker does not answer, one line goes to stderr and the code is 1.
    """
    try:
        return asyncio.run(_connected(work, url, name))
    except BusError as error:
        tell(f"headrace: {sentence(str(error))} Run `headrace doctor` to find out why.")
        return 1


async def _connected(work: Callable[[Bus], Coroutine[Any, Any, int]], url: str, name: str) -> int:
    if trouble := await broker_trouble(url):
        raise Unreachable(trouble)
    async with Bus.connect(url, name=name) as bus:
        working, watching = asyncio.ensure_future(work(bus)), asyncio.ensure_future(_until_away(bus))
        try:
            await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
        finally:
            for task in (working, watching):
                task.cancel()
            await asyncio.wait((working, watching))
        raise Unreachable(f"The broker at {without_password(url)} has been away for {_AWAY_S:.0f} s.")


async def _until_away(bus: Bus) -> None:
    """Return when the broker has been away for longer than it takes to restart."""
    seen_at = now = asyncio.get_running_loop().time()
    while now - seen_at < _AWAY_S:
        await asyncio.sleep(_LOOK_EVERY_S)
        now = asyncio.get_running_loop().time()
        seen_at = now if bus.is_connected else seen_at
