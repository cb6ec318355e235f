"""The commands of `headrace`, one module each. A command is imported when it is called, so that `send` starts fast."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from pipeline.broker.connection import BusError, Unreachable
from pipeline.broker.jetstream import Bus
from pipeline.up.reach import broker_trouble


def say(text: str = "", *, end: str = "\n") -> None:
    """Write to stdout, where the result of a command goes, and flush."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def tell(text: str) -> None:
    """Write to stderr, where errors and notes go, and flush."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def visible(text: str) -> str:
    """Return text with control characters escaped: a publisher wrote it, and it must not control the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


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
        return await work(bus)
