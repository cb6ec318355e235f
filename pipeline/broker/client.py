"""The NATS client, without the faults that would cost a connection or a request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from nats.aio.client import Client, Srv

from pipeline.wire.subjects import with_known_names

log = logging.getLogger(__name__)


class MendedClient(Client):
    """The client with six faults corrected and one short cut.

    It stops reading when it cannot parse a message's headers. Publishers write those, so one malformed request would
    disconnect each worker that it is delivered to.

    Its PING overtakes data that waits to be written, so the PONG confirms nothing. A subscription would count as
    cancelled before the broker knows, and a request delivered to it would be lost until its lease runs out.

    It stops reading at the PONG for a flush that was given up, and is connected again only when further PINGs were not
    answered.

    A cancel that comes as an attempt to connect ends is lost, so it would go on connecting after it was closed.

    It writes what is left at its end to a connection that may be lost, and fails before it has closed anything.

    It cancels the attempt to connect again, and with it the end of the lost connection, which both wait for. It then
    fails as if its own caller had been cancelled.

    It also passes the messages of the subscriptions in `takers` on unparsed, as (headers, body) in bytes. Parsing the
    headers of a long stream takes four fifths of the time that receiving it takes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.takers: dict[int, Callable[[bytes, bytes], None]] = {}
        self._ends = False

    async def close(self) -> None:
        """Close the connection, and write nothing to one that may be lost."""
        self._ends = True
        if not self.is_connected:
            self._pending, self._pending_data_size = [], 0
        try:
            await super().close()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise

    async def _connect_to_server(self, s: Srv) -> None:
        self._check_end()
        await super()._connect_to_server(s)
        self._check_end()

    def _check_end(self) -> None:
        if self._ends:
            if self._transport is not None:
                self._transport.close()  # type: ignore[no-untyped-call]
            raise asyncio.CancelledError

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        take = self.takers.get(sid)
        if take is None:
            await super()._process_msg(sid, subject, reply, data, headers)
        else:
            take(headers or b"", data)

    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        if self._transport is not None and self.is_connected and self._pending:
            self._transport.writelines(self._pending)
            self._pending, self._pending_data_size = [], 0
        await super()._send_ping(future)

    async def _process_pong(self) -> None:
        if self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        try:
            parsed = await super()._process_headers(headers)
        except (IndexError, UnicodeDecodeError) as error:
            log.info("Ignoring malformed headers of a message: %s", error)
            return None
        return None if parsed is None else with_known_names(parsed)
