"""What a command holds at the broker, and gives up when it is interrupted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from pipeline.broker.asker import Asker
from pipeline.broker.connection import BusError


@contextlib.asynccontextmanager
async def cancelled_if_interrupted(client: Asker, name: str) -> AsyncIterator[None]:
    """Cancel a request of this command if the command is interrupted in the block."""
    try:
        yield
    except asyncio.CancelledError:
        with contextlib.suppress(BusError):
            await client.cancel(name)
        raise
