"""Waiting for a condition. A timeout here ends a test that hangs; no test asserts how long something takes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from bench.running import flushed

__all__ = ["TIMEOUT_S", "eventually", "flushed", "taken"]

TIMEOUT_S = 60.0


async def eventually(
    fact: Callable[[], Any], *, what: str = "", timeout_s: float = TIMEOUT_S, every_s: float = 0.005
) -> Any:
    """The first true value of fact, which may be a plain function or a coroutine function.

    Raises:
        AssertionError: fact has not become true within `timeout_s`.
    """
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                value = fact()
                if isinstance(value, Awaitable):
                    value = await value
                if value:
                    return value
                await asyncio.sleep(every_s)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s} s: {what or fact}") from None


async def taken(puller: Any, consumer: str) -> Any:
    """The delivery of a stored request. A consumer learns of it a moment after its publisher."""
    return await eventually(lambda: puller.take(consumer), what=f"a request of {consumer}")
