"""Joins the writes of one turn of the event loop into one."""

from __future__ import annotations

import asyncio
from typing import Any

_GATHERED_BYTES = 32 << 10


class Gathering(asyncio.Transport):
    """A transport that joins the writes of one turn of the event loop.

    uvicorn writes the head and the body of a response apart: two packets, and two wake-ups of the client.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._transport = transport
        self._loop = loop
        self._held = bytearray()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send at the end of this turn, or at once if much is held."""
        if not self._held:
            self._loop.call_soon(self._flush)
        self._held += data
        if len(self._held) > _GATHERED_BYTES:
            self._flush()

    def close(self) -> None:
        """Send the held data, and close."""
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        """Close at once, without the held data."""
        self._held.clear()
        self._transport.abort()

    def is_closing(self) -> bool:
        """As `asyncio.BaseTransport.is_closing`."""
        return self._transport.is_closing()

    def pause_reading(self) -> None:
        """As `asyncio.ReadTransport.pause_reading`."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """As `asyncio.ReadTransport.resume_reading`."""
        self._transport.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """As `asyncio.BaseTransport.get_extra_info`."""
        return self._transport.get_extra_info(name, default)

    def _flush(self) -> None:
        if self._held and not self._transport.is_closing():
            self._transport.write(bytes(self._held))
        self._held.clear()
