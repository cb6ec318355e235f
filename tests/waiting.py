"""Waiting for what a test expects, without sleeping through it: conditions are looked at often, and not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

TIMEOUT_S = 15.0


async def eventually(fact: Callable[[], Any], *, what: str = "", timeout_s: float = TIMEOUT_S) -> Any:
    """The first true value of fact, which may be a plain function or a coroutine function."""
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                value = fact()
                if isinstance(value, Awaitable):
                    value = await value
                if value:
                    return value
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s} s: {what or fact}") from None
