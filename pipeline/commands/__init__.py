"""The commands of `headrace`, one module each. A command is imported when it is called, so that `send` starts fast."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

from pipeline.broker.connection import BusError, NoResponders, Unreachable, without_password
from pipeline.broker.jetstream import Bus
from pipeline.process.terminal import visible, visible_json
from pipeline.up.reach import broker_trouble
from pipeline.wire.subjects import QUEUE_STATS, STREAM_REQUESTS

# A command waits this long for a broker that it has lost.
_AWAY_S = 10.0
_LOOK_EVERY_S = 0.2


def say(text: str = "", *, end: str = "\n") -> None:
    """Write to stdout, where the result of a command goes, and flush."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def say_json(text: str | bytes) -> None:
    """Write JSON to stdout, as `say`."""
    say(visible_json(text if isinstance(text, str) else text.decode()))


def tell(text: str) -> None:
    """Write to stderr, where errors and notes go, and flush. What is not printable is escaped."""
    sys.stderr.write(visible(text) + "\n")
    sys.stderr.flush()


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
        looking = asyncio.ensure_future(_missing(bus, url))
        tasks: list[asyncio.Future[Any]] = [working, watching, looking]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if looking.done() and not working.done() and not looking.result().pipeline:
                await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
            failure = working.exception() if working.done() else None
            if working.done() and not isinstance(failure, BusError):
                return working.result()
            if not watching.done():
                missing = await looking
                if missing.pipeline or (missing.said and isinstance(failure, NoResponders)):
                    raise Unreachable(missing.said)
            if working.done():
                return working.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        raise Unreachable(f"The broker at {without_password(url)} has been away for {_AWAY_S:.0f} s.")


class _Missing(NamedTuple):
    """What the broker says to be missing, in a sentence; and whether that is the whole pipeline."""

    said: str = ""
    pipeline: bool = False


async def _missing(bus: Bus, url: str) -> _Missing:
    """Look whether a monitor runs and the streams exist. The broker says at once if there are none."""
    try:
        await bus.request(QUEUE_STATS)
    except NoResponders:
        pass
    except BusError:
        return _Missing()
    else:
        return _Missing()
    if await bus.lacks(STREAM_REQUESTS):
        said = f"The broker at {without_password(url)} has no pipeline. `headrace up` starts one."
        return _Missing(said, pipeline=True)
    return _Missing(f"No monitor runs at {without_password(url)}, and this command needs one.")


async def _until_away(bus: Bus) -> None:
    """Return when the broker has been away for longer than it takes to restart."""
    seen_at = now = asyncio.get_running_loop().time()
    while now - seen_at < _AWAY_S:
        await asyncio.sleep(_LOOK_EVERY_S)
        now = asyncio.get_running_loop().time()
        seen_at = now if bus.is_connected else seen_at
