"""The HTTP server: uvicorn with httptools, bounds on what a client may send before it is served, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.flow_control import service_unavailable
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from pipeline.config import Config
from pipeline.gateway.responses import error_response
from pipeline.gateway.statuses import HttpError
from pipeline.process.lifecycle import StartError
from pipeline.wire.errors import ErrorCode

log = logging.getLogger(__name__)

# The port that people and programs find the gateway at, where no other is given.
HTTP_PORT = 8411
MAX_HEAD_BYTES = 64 << 10
_KEEP_ALIVE_S = 30.0
_BACKLOG = 2048
_GATHERED_BYTES = 32 << 10
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_TOO_LATE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class Gathering(asyncio.Transport):
    """A transport by which what is written in one turn of the event loop leaves in one piece.

    uvicorn writes a response's head and its body apart, which would be two packets, and a client that wakes twice.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._transport = transport
        self._loop = loop
        self._held = bytearray()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send with the rest of this turn; at once where that has become much."""
        if not self._held:
            self._loop.call_soon(self._flush)
        self._held += data
        if len(self._held) > _GATHERED_BYTES:
            self._flush()

    def close(self) -> None:
        """Send what is held, and end."""
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        """End at once."""
        self._held.clear()
        self._transport.abort()

    def is_closing(self) -> bool:
        """Whether it ends, or has ended."""
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


class Connection(HttpToolsProtocol):
    """A connection that is not held open, nor filled, by a client that does not get on.

    Its request's head must come within the stall timeout and be no larger than `MAX_HEAD_BYTES`; a response that it
    does not read for so long ends the connection. How long the body may take is for whoever reads it; of one that
    nobody reads, what is left and the next head must come within the stall timeout.
    """

    stall_timeout_s = 20.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._in_head = True
        self._late: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._served: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A head is expected."""
        super().connection_made(Gathering(transport, self.loop))
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is expected any more; whoever answers is told."""
        self._disarm()
        # uvicorn tells the last request that has come, which is not the one being answered where they are pipelined.
        if self._served is not None and not self._served.response_complete:
            self._served.disconnected = True
            self._served.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what is a head, and refuse one that has no end."""
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(_TOO_LARGE)
        elif self._late is None and self._served is not None and self._served.response_complete:
            # The end of a body that nobody reads, or empty lines. The keep-alive timeout, which ends with any data, is
            # over; nothing else would end this connection.
            self._expect_head()

    def on_message_begin(self) -> None:
        """The next head begins."""
        super().on_message_begin()
        self._in_head = True
        if self._late is None:
            self._expect_head()

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._in_head, self._head_bytes = False, 0
        if self._late is not None:
            self._late.cancel()
            self._late = None
        super().on_headers_complete()

    def pause_writing(self) -> None:
        """The client does not read: it has so long to begin again."""
        super().pause_writing()
        self._stalled = self.loop.call_later(self.stall_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads on."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._served = cycle
        served: Any = _too_many if app is service_unavailable else app
        super()._start_asgi_task(cycle, served)

    def _expect_head(self) -> None:
        self._late = self.loop.call_later(self.stall_timeout_s, self._refuse, _TOO_LATE)

    def _refuse(self, answer: bytes) -> None:
        if not self.transport.is_closing():
            if self._served is None or self._served.response_complete:
                self.transport.write(answer)  # else it would stand in the middle of another request's response
            self.transport.close()

    def _disarm(self) -> None:
        for timer in (self._late, self._stalled):
            if timer is not None:
                timer.cancel()
        self._late = self._stalled = None


async def _too_many(scope: Scope, receive: Receive, send: Send) -> None:
    error = HttpError(503, ErrorCode.UNAVAILABLE, "this gateway has as many connections as it takes: try again later")
    response = error_response(error, scope["path"])
    response.headers["connection"] = "close"
    await response(scope, receive, send)


class HttpServer(uvicorn.Server):
    """uvicorn on a socket that is bound already. Set `should_exit` to have it stop accepting and end."""

    def __init__(self, app: ASGIApp, config: Config) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=type("Connection", (Connection,), {"stall_timeout_s": config.http_stall_timeout_s}),
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                date_header=False,
                timeout_keep_alive=int(_KEEP_ALIVE_S),
                limit_concurrency=config.http_connections + 1,
                proxy_headers=False,
            )
        )
        logging.getLogger("uvicorn").setLevel(logging.WARNING)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the lifecycle's."""
        yield


def bind(config: Config) -> socket.socket:
    """The listening socket.

    Raises:
        StartError: the port is taken, or the host is none of this machine's.
    """
    host, port = config.http_host, config.http_port
    ports = [port] if port or config.state_dir else [HTTP_PORT, 0]
    for last, each in [(each == ports[-1], each) for each in ports]:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return socket.create_server((host, each), family=family, backlog=_BACKLOG)
        except OSError as error:
            if last:
                raise StartError(
                    f"cannot serve HTTP at {host}:{each}: {error.strerror}; give another --http-host or --http-port"
                ) from None
    raise AssertionError


def url_of(listening: socket.socket) -> str:
    """Where a listening socket is reached on this machine."""
    host, port = listening.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104 - all of this machine's addresses: one of them
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
