"""The HTTP server: uvicorn with httptools, bounds on slow and oversized requests, and an orderly stop.

What is used of uvicorn's undocumented parts, all of it here:

- `HttpToolsProtocol`, subclassed by `HttpConnection`: the `asyncio.Protocol` methods `connection_made`,
  `connection_lost`, `data_received`, `eof_received`, `pause_writing` and `resume_writing`; httptools' callbacks
  `on_message_begin`, `on_headers_complete` and `on_message_complete`; `_start_asgi_task(cycle, app)`, through which
  every request goes; the attributes `loop`, `transport`, `client`, `cycle`, `url`, `headers`, and `parser`, which is
  set. Each method but `eof_received` calls the original.
- `RequestResponseCycle`: the attributes `response_complete`, `response_started`, `disconnected`, `message_event`,
  `more_body`, `scope`, and `keep_alive`, which is set.
- `flow_control.service_unavailable`: the application that uvicorn runs above `limit_concurrency`.
- `Server.capture_signals`, overridden to leave signals to the lifecycle; `shutdown`, overridden to stop accepting;
  `server_state`; `should_exit` and `force_exit`, which are set. `Config.http_protocol_class`, after `load`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.flow_control import service_unavailable
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from pipeline.aio import Background
from pipeline.config import Config
from pipeline.gateway.gathering import Gathering
from pipeline.gateway.identity import sender_of
from pipeline.gateway.parser import HttpParser
from pipeline.gateway.responses import error_response
from pipeline.gateway.statuses import HttpError
from pipeline.gateway.turns import Beginnings
from pipeline.machine import is_loopback
from pipeline.process.files import room_for
from pipeline.wire.errors import ErrorCode
from pipeline.wire.subjects import Priority

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 << 10
_KEEP_ALIVE_S = 30.0
# Connections that are accepted in one turn of the event loop.
_BATCH = 256
_NO_ROOM = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_NO_ROOM_PAUSE_S = 1.0
# When a client that has ended its side is asked whether it is there: the first times, and the longest pause. A response
# that begins before comes without such a question.
_FIRST_PROBE_S = 0.5
_SECOND_PROBE_S = 0.05
_MOST_PROBE_S = 30.0
# Every client must skip interim responses, and knows this one.
_STILL_THERE = b"HTTP/1.1 100 Continue\r\n\r\n"
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_TOO_MANY = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_TOO_LATE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class HttpConnection(HttpToolsProtocol):
    """A connection that a slow client can neither keep open nor fill.

    A request's head must arrive within the stall timeout and have at most `MAX_HEAD_BYTES`. A client that does not read
    its response for the stall timeout is disconnected. The handler limits the time of a body that it reads. If it does
    not read the body, the rest of it and the next head must arrive within the stall timeout.

    An address of another machine has at most half of the connections; `clients` counts them by address.
    """

    stall_timeout_s = 20.0
    most_connections = 2000
    beginnings: Beginnings
    clients: ClassVar[Counter[str]] = Counter()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._parser = HttpParser(self)
        self.parser = self._parser  # type: ignore[assignment]
        self._head_bytes = 0
        self._in_head = True
        self._late: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._served: RequestResponseCycle | None = None
        self._probe: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect a head."""
        super().connection_made(Gathering(transport, self.loop))
        self.clients[self._address] += 1
        if self.clients[self._address] > max(1, self.most_connections // 2) and not is_loopback(self._address):
            self._refuse(_TOO_MANY)
            return
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers, and tell the handler that is responding."""
        self._disarm()
        self.clients[self._address] -= 1
        if not self.clients[self._address]:
            del self.clients[self._address]
        # uvicorn tells the last request that arrived. With pipelining that is not the one being served.
        if self._served is not None and not self._served.response_complete:
            self._served.disconnected = True
            self._served.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count the bytes of the head, and refuse one that is too large."""
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(_TOO_LARGE)
        elif self._late is None and self._served is not None and self._served.response_complete:
            # The rest of an unread body, or empty lines. Any data ends uvicorn's keep-alive timeout, so without this
            # timer the connection would stay open.
            self._expect_head()

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more. Returns whether it may still read its response, so that the connection stays.

        A client that has closed its socket looks like one that has only ended its side. Data that the first one gets
        resets the connection, so an interim response tells them apart. HTTP/1.0 has none.
        """
        last, served = self.cycle, self._served
        if served is None or served.response_started or last.more_body or last.scope["http_version"] == "1.0":
            return False
        last.keep_alive = False
        if self._probe is None:
            # A closed connection answers the first one with a reset, which the second one finds.
            self._probe = self.loop.call_later(_FIRST_PROBE_S, self._ask, _SECOND_PROBE_S)
        return True

    def _ask(self, pause_s: float) -> None:
        if self._served is None or self._served.response_started or self.transport.is_closing():
            return
        self.transport.write(_STILL_THERE)
        self._probe = self.loop.call_later(pause_s, self._ask, min(_MOST_PROBE_S, max(1.0, 2 * pause_s)))

    def on_message_begin(self) -> None:
        """A head has begun."""
        super().on_message_begin()
        self._in_head = True
        if self._late is None:
            self._expect_head()

    def on_headers_complete(self) -> None:
        """The head is complete. If it offers another protocol, it comes again without the offer."""
        if self._parser.offers:
            return
        self._in_head, self._head_bytes = False, 0
        if self._late is not None:
            self._late.cancel()
            self._late = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is complete."""
        if not self._parser.offers:
            super().on_message_complete()

    def pause_writing(self) -> None:
        """The client does not read. Disconnect it after the stall timeout."""
        super().pause_writing()
        self._stalled = self.loop.call_later(self.stall_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._served = cycle
        served: Any = _Full(self.most_connections) if app is service_unavailable else app
        if cycle.scope["http_version"] == "1.0":
            served = _Unchunked(served)
        self.beginnings.add(_urgency(cycle.scope), partial(super()._start_asgi_task, cycle, served))

    @property
    def _address(self) -> str:
        return sender_of(self.client[0]) if self.client else ""

    def _expect_head(self) -> None:
        self._late = self.loop.call_later(self.stall_timeout_s, self._refuse, _TOO_LATE)

    def _refuse(self, answer: bytes) -> None:
        if not self.transport.is_closing():
            if self._served is None or self._served.response_complete:
                self.transport.write(answer)  # not into the middle of a response
            self.transport.close()

    def _disarm(self) -> None:
        for timer in (self._late, self._stalled, self._probe):
            if timer is not None:
                timer.cancel()
        self._late = self._stalled = self._probe = None


def _urgency(scope: Mapping[str, Any]) -> Priority:
    """How urgent a request is, by its head alone. One that stores nothing (a health check, a page) is soon done."""
    if scope["method"] != "POST":
        return Priority.HIGH
    said = next((value for name, value in scope["headers"] if name == b"x-priority"), b"").decode("latin-1").lower()
    return Priority(said) if said in Priority.__members__.values() else Priority.MEDIUM


class _Full:
    """The application that runs above the connection limit: status 503."""

    def __init__(self, limit: int) -> None:
        self._error = HttpError(503, ErrorCode.UNAVAILABLE, f"Connection limit ({limit}) reached. Retry later.")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = error_response(self._error, scope["path"])
        response.headers["connection"] = "close"
        await response(scope, receive, send)


class _Unchunked:
    """An application for a client that speaks HTTP/1.0, which has no chunks: a stream is sent whole, at its end."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start: Message = {}
        body = bytearray()

        async def gather(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            body.extend(message.get("body", b""))
            if not message.get("more_body", False):
                headers = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
                headers.append((b"content-length", str(len(body)).encode()))
                await send({**start, "headers": headers})
                await send({"type": "http.response.body", "body": bytes(body)})

        await self._app(scope, receive, gather)


class Acceptor:
    """Accepts the connections of a listening socket in batches.

    uvloop accepts one connection in each turn of the event loop. In a burst, each connection would wait for the work
    on all that were accepted before it, whatever its priority.

    Args:
        listening: the socket. The acceptor makes it non-blocking, and closes it at its end.
        protocol: makes the protocol of a connection.
    """

    def __init__(self, listening: socket.socket, protocol: Callable[[], asyncio.Protocol]) -> None:
        listening.setblocking(False)
        self._listening = listening
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()
        self._tasks = Background()
        self._later: asyncio.TimerHandle | None = None
        self._watch()

    def close(self) -> None:
        """Accept no more; a second call changes nothing."""
        if self._listening.fileno() >= 0:
            self._loop.remove_reader(self._listening.fileno())
            self._listening.close()
        if self._later is not None:
            self._later.cancel()

    def _watch(self) -> None:
        self._later = None
        self._loop.add_reader(self._listening.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(_BATCH):
            try:
                connection, _ = self._listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                log.warning("No connection is accepted for %g s: %s.", _NO_ROOM_PAUSE_S, error.strerror)
                self._loop.remove_reader(self._listening.fileno())
                self._later = self._loop.call_later(_NO_ROOM_PAUSE_S, self._watch)
                return
            connection.setblocking(False)
            self._tasks.start(self._serve(connection), what="an accepted connection")

    async def _serve(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._protocol, connection)
        except OSError:
            connection.close()  # its client has gone


class HttpServer(uvicorn.Server):
    """uvicorn without sockets of its own. Connections come from an `Acceptor`; set `should_exit` to end.

    `serve_on` runs it.
    """

    def __init__(self, app: ASGIApp, config: Config) -> None:
        most = room_for(config.http_connections)
        limits = {
            "stall_timeout_s": config.http_stall_timeout_s,
            "most_connections": most,
            "beginnings": Beginnings(),
            "clients": Counter[str](),
        }
        super().__init__(
            uvicorn.Config(
                app,
                http=type("HttpConnection", (HttpConnection,), limits),
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                date_header=False,
                timeout_keep_alive=int(_KEEP_ALIVE_S),
                limit_concurrency=most + 1,
                proxy_headers=False,
            )
        )
        self._acceptor: Acceptor | None = None
        logging.getLogger("uvicorn").setLevel(logging.WARNING)

    async def serve_on(self, listening: socket.socket) -> None:
        """Serve the connections of a listening socket until `should_exit` is set."""
        self.config.load()
        self._acceptor = Acceptor(listening, self._connection)
        await self.serve(sockets=[])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more connections, and wait for those that are open."""
        if self._acceptor is not None:
            self._acceptor.close()
        await super().shutdown(sockets)

    def _connection(self) -> asyncio.Protocol:
        kind: Any = self.config.http_protocol_class
        return kind(config=self.config, server_state=self.server_state, app_state={})  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the lifecycle."""
        yield


def url_of(listening: socket.socket) -> str:
    """The URL of a listening socket, for clients on this machine."""
    host, port = listening.getsockname()[:2]
    # Every address of this machine: the URL has one of them.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
