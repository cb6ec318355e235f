"""The commands that talk to a running pipeline; each is imported when it is called for, so that `send` starts fast."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from pipeline.broker.connection import BusError, Unreachable, without_password
from pipeline.broker.jetstream import Bus
from pipeline.up.reach import any_broker_answers


def say(text: str = "", *, end: str = "\n") -> None:
    """Print the command's result, at once."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def tell(text: str) -> None:
    """Tell the person something beside the result."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def run_client(work: Callable[[Bus], Coroutine[Any, Any, int]], url: str, *, name: str) -> int:
    """Run a command's coroutine, connected to the broker at url, to its exit code.

    A broker that does not answer is one clear line on stderr and code 1.
    """
    try:
        return asyncio.run(_connected(work, url, name))
    except BusError as error:
        tell(f"headrace: {error}. Is a pipeline running? `headrace up` starts one, `headrace doctor` looks around.")
        return 1


async def _connected(work: Callable[[Bus], Coroutine[Any, Any, int]], url: str, name: str) -> int:
    if not await any_broker_answers(url):
        raise Unreachable(f"no NATS server with JetStream answers at {without_password(url)}")
    async with Bus.connect(url, name=name) as bus:
        return await work(bus)
