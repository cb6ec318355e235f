"""Adapter for the NATS client: connection, publish, request, subscribe, services.

None of the client's exceptions leaves `pipeline.broker`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import urlsplit

import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as _Subscription
from nats.js import JetStreamContext
from nats.micro import add_service
from nats.micro.request import Request

from pipeline.aio import Grouping, cancellation_kept
from pipeline.broker.client import MendedClient
from pipeline.broker.clock import Clock
from pipeline.core.moves import MoveIds
from pipeline.wire.errors import quoted
from pipeline.wire.subjects import is_inbox
from pipeline.wire.usage import UsageNote

log = logging.getLogger(__name__)

# Returned by `subscribe` and passed to `drain`; for annotations.
Subscription = _Subscription

REQUEST_TIMEOUT_S = 2.0
_RECONNECT_WAIT_S = 0.1
# The client itself has no limit for the first connection.
_CONNECT_PATIENCE_S = 5.0
_ACK_PREFIX = "$JS.ACK."
# In the server's error where it does not accept a user, a password or a token.
_AUTHORIZATION = "Authorization Violation"
_SERVICE_VERSION = "1.0.0"  # the version of the wire contract

Headers = Mapping[str, str]
Handler = Callable[["Message"], Awaitable[None]]
# Headers of a service's reply that is an error.
_SERVICE_ERROR = "Nats-Service-Error"
_SERVICE_ERROR_CODE = "Nats-Service-Error-Code"

# Returns the body of an answer, from the subject and the body of a request.
Service = Callable[[str, bytes], Awaitable[bytes]]


class BusError(Exception):
    """The broker refused an operation, or could not be reached."""


class Unreachable(BusError):
    """The broker did not answer in time. The operation may or may not have happened."""


class NoResponders(Unreachable):
    """No process subscribes to the subject of a request. The broker reports this at once."""


class TooLarge(BusError):
    """A message is larger than the broker accepts. It was not sent, and cannot be sent."""

    def __init__(self, subject: str, size: int, most: int) -> None:
        super().__init__(f"The message to {subject} has {size} bytes. The broker accepts at most {most}.")
        self.size = size
        self.most = most


class ServiceFailed(Unreachable):
    """A service replied that it could not answer, in the headers of NATS services (ADR-32)."""


@dataclass(slots=True)
class Message:
    """A received message, free of the client's types."""

    subject: str
    data: bytes
    headers: Headers
    reply: str

    @property
    def is_delivery(self) -> bool:
        """Whether a work queue delivered this. A request without data may have a header `Status` as well."""
        return self.reply.startswith(_ACK_PREFIX)

    @property
    def status(self) -> str | None:
        """The status code of a message without data (404, 408, 409, 503), else None."""
        return self.headers.get("Status") if not self.data else None

    @property
    def description(self) -> str:
        """The server's description of the status."""
        return self.headers.get("Description", "")


@dataclass(slots=True)
class Delivery:
    """A request that a work queue delivered. The queue delivers it again unless it is acknowledged or renewed in time.

    Attributes:
        message: the request.
        consumer: the durable consumer that delivered it.
        sequence: the message's, in its stream.
        delivered: how often it was delivered, from 1.
        stored_at: the broker's time of storing, UTC seconds, to the microsecond.
        pending: how many more requests wait for the consumer.
    """

    message: Message
    consumer: str
    sequence: int
    delivered: int
    stored_at: float
    pending: int
    _bus: Connection = field(repr=False)

    @property
    def subject(self) -> str:
        """The request's subject."""
        return self.message.subject

    @property
    def headers(self) -> Headers:
        """The request's headers, as stored."""
        return self.message.headers

    async def ack(self) -> None:
        """Remove the request. Written after everything that was published before on this connection."""
        await self._bus.publish(self.message.reply, b"+ACK")

    async def nak(self, delay_s: float = 0.0) -> None:
        """Return the request. The queue delivers it again at once, or after delay_s."""
        body = b"-NAK" if not delay_s else b'-NAK {"delay": %d}' % int(delay_s * 1e9)
        await self._bus.publish(self.message.reply, body)

    async def in_progress(self) -> None:
        """Renew the lease."""
        await self._bus.publish(self.message.reply, b"+WPI")


@dataclass(slots=True)
class Connection:
    """One connection to the broker. Reconnects by itself, without a limit.

    Attributes:
        clock: the broker's time; see `pipeline.broker.jetstream.Bus.keep_clock`.
        moves: makes and reads the ids of moved requests; see `pipeline.broker.secret`.
        accounts: the accounts of use that wait to be stored, with what names them; see `pipeline.broker.usage`.
        unaccounted_until: until when accounts of use are sent without waiting; see `pipeline.broker.usage`.
        foreign: how many messages were skipped because they are no part of an answer.
    """

    nc: MendedClient
    js: JetStreamContext
    clock: Clock = field(default_factory=Clock)
    moves: MoveIds = field(default_factory=MoveIds)
    foreign: int = 0
    accounts: Grouping[tuple[str, UsageNote]] = field(default_factory=Grouping)
    unaccounted_until: float = float("-inf")
    _reconnected: list[Callable[[], None]] = field(default_factory=list)

    @classmethod
    @asynccontextmanager
    async def connect(cls, url: str, *, name: str) -> AsyncIterator[Self]:
        """A connection for the duration of the block.

        Args:
            url: of one server, or several separated by commas. If it contains a user, the connection's inboxes are
                under `_INBOX.<user>`, the only inboxes which that user can read.
            name: shown in the server's monitoring.

        Raises:
            Unreachable: no server answers within five seconds, or the only server refuses this user.
        """
        nc = MendedClient()
        bus = cls(nc, nc.jetstream(timeout=5.0))
        reports = _Reports(bus, is_only="," not in url)
        try:
            await bus._connect(url, name, reports)
            reports.connecting = False
            yield bus
        finally:
            await bus._close()

    async def _connect(self, url: str, name: str, reports: _Reports) -> None:
        try:
            async with asyncio.timeout(_CONNECT_PATIENCE_S):
                await self.nc.connect(
                    url.split(","),
                    name=name,
                    inbox_prefix=_inbox_prefix(url),
                    error_cb=reports.on_error,
                    reconnected_cb=reports.on_reconnect,
                    disconnected_cb=reports.on_disconnect,
                    max_reconnect_attempts=-1,
                    # Declared int, used as seconds of any kind.
                    reconnect_time_wait=_RECONNECT_WAIT_S,  # type: ignore[arg-type]
                    connect_timeout=2,
                    ping_interval=5,
                    max_outstanding_pings=2,
                    pending_size=32 << 20,
                    allow_reconnect=True,
                )
        except (OSError, nats.errors.Error, TimeoutError) as error:
            where = without_password(url)
            if (refusal := reports.refusal) is not None:
                raise Unreachable(f"The NATS server at {where} refuses the connection: {what(refusal)}") from error
            raise Unreachable(f"No NATS server at {where}: {what(error)}") from error

    async def _close(self) -> None:
        if self.nc.is_connected:
            try:
                await self.nc.flush(1)
            except (OSError, nats.errors.Error, TimeoutError):
                log.debug("Closing the connection without a last flush.")
        try:
            async with asyncio.timeout(1.0):
                await self.nc.close()
        except (OSError, nats.errors.Error, TimeoutError):
            log.debug("The connection was not closed in order.")

    @property
    def is_connected(self) -> bool:
        """Whether the connection is open now."""
        return bool(self.nc.is_connected)

    @property
    def max_payload(self) -> int:
        """The largest message that the broker accepts, bytes."""
        return self.nc.max_payload

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Call callback after each reconnect. Everything that was in flight on the connection is lost."""
        self._reconnected.append(callback)

    async def publish(self, subject: str, data: bytes, *, reply: str = "", headers: Headers | None = None) -> None:
        """Send a core message to all present subscribers, without confirmation.

        Raises:
            Unreachable: the connection is closed, or its buffer filled up while the broker was away.
            TooLarge: the broker accepts no message of this size.
        """
        self._check_size(subject, data, headers)
        try:
            with cancellation_kept():
                await self.nc.publish(subject, data, reply=reply, headers=dict(headers) if headers else None)
        except nats.errors.Error as error:
            raise Unreachable(f"Cannot publish to {subject}: {error}") from error

    async def request(
        self, subject: str, data: bytes = b"", *, headers: Headers | None = None, timeout_s: float = REQUEST_TIMEOUT_S
    ) -> Message:
        """Send a request and wait for one answer.

        Raises:
            Unreachable: the subject has no subscriber, no answer came in time, or a service replied that it failed.
            TooLarge: the broker accepts no message of this size.
        """
        self._check_size(subject, data, headers)
        sent = dict(headers) if headers else None
        try:
            with cancellation_kept():
                answer = await self.nc.request(subject, data, timeout=timeout_s, headers=sent)
        except nats.errors.NoRespondersError as error:
            raise NoResponders(f"No answer from {subject}: {what(error)}") from error
        except (nats.errors.Error, TimeoutError) as error:
            raise Unreachable(f"No answer from {subject}: {what(error)}") from error
        message = to_message(answer)
        if _SERVICE_ERROR_CODE in message.headers:
            raise ServiceFailed(
                f"The service {subject} failed: {message.headers.get(_SERVICE_ERROR, 'no reason given')}"
            )
        return message

    def _check_size(self, subject: str, data: bytes, headers: Headers | None) -> None:
        """The client compares the body alone. The broker counts the headers as well, and closes the connection."""
        size = len(data) + (_headers_size(headers) if headers else 0)
        if size > self.max_payload:
            raise TooLarge(subject, size, self.max_payload)

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> Subscription:
        """Call handler for each message, one after another. Its exceptions are logged."""

        async def on_message(message: Msg) -> None:
            await handler(to_message(message))

        with cancellation_kept():
            return await self.nc.subscribe(subject, queue=queue, cb=on_message)

    async def unsubscribe(self, subscription: Subscription) -> None:
        """Remove the interest at once. Without a connection there is nothing to remove."""
        with cancellation_kept(), contextlib.suppress(nats.errors.Error):
            await subscription.unsubscribe()

    async def drain(self, subscription: Subscription) -> None:
        """Remove the interest, and handle each message that the broker sent before it confirmed."""
        try:
            with cancellation_kept():
                await subscription.drain()  # type: ignore[no-untyped-call]
        except (nats.errors.Error, TimeoutError) as error:
            log.debug("A subscription was not drained: %s", error)

    def new_inbox(self) -> str:
        """A unique subject."""
        return self.nc.new_inbox()

    def delivery(self, message: Message) -> Delivery:
        """The delivery in a message of a pull consumer."""
        tokens = message.reply.split(".")
        # `$JS.ACK.<stream>.<consumer>.<delivered>.<sseq>.<cseq>.<time>.<pending>`; newer: domain and account first.
        consumer, delivered, sequence, _, time_ns, pending = tokens[3:9] if len(tokens) == 9 else tokens[5:11]
        # Whole microseconds, as `to_stored` reads them: this time tells requests of the same id apart.
        stored_at = int(time_ns) // 1000 / 1e6
        return Delivery(message, consumer, int(sequence), int(delivered), stored_at, int(pending), self)

    async def serve(
        self, name: str, description: str, endpoints: Mapping[str, Service], *, queue: str = ""
    ) -> Callable[[], Awaitable[None]]:
        """Answer requests on the given subjects as a NATS service, which `nats micro ls` lists.

        Args:
            name: the service's name.
            description: shown by `nats micro info`.
            endpoints: by subject, which can have wildcards, the function that answers.
            queue: the queue group, of which one member receives each request. By default the service's name.

        Returns:
            A function that ends the service.
        """
        with cancellation_kept():
            service = await add_service(self.nc, name=name, version=_SERVICE_VERSION, description=description)
        with cancellation_kept():
            for subject, endpoint in endpoints.items():
                await service.add_endpoint(
                    name=subject.replace(".", "_").replace("*", "any"),
                    subject=subject,
                    handler=_answering(endpoint),
                    queue_group=queue or name,
                )

        async def stop() -> None:
            try:
                with cancellation_kept():
                    await service.stop()
            except (nats.errors.Error, TimeoutError) as error:
                log.debug("Service %s was not stopped in order: %s", name, error)

        return stop


def _answering(endpoint: Service) -> Callable[[Request], Awaitable[None]]:
    """The handler of a service's requests, from the function that answers them."""

    async def answer(request: Request) -> None:
        reply = request._msg.reply  # noqa: SLF001 - the client has no other access to it
        if not is_inbox(reply):
            log.info("Ignoring a request on %s: %s is not an inbox", request.subject, quoted(reply))
            return
        try:
            body = await endpoint(request.subject, request.data)
        except BusError as error:
            await request.respond_error("503", str(error))
        except Exception as error:
            log.exception("The service %s failed.", request.subject)
            await request.respond_error("500", type(error).__name__)
        else:
            await request.respond(body)

    return answer


def to_message(message: Msg) -> Message:
    """Convert a message of the client's."""
    return Message(message.subject, message.data, message.headers or {}, message.reply)


@dataclass(slots=True)
class _Reports:
    """What the client reports of a connection, and what follows from it.

    Attributes:
        bus: the connection.
        is_only: whether there is no other server to try.
        connecting: whether the first connection has not come about yet.
        refusal: why a server last refused it.
    """

    bus: Connection
    is_only: bool
    connecting: bool = True
    refusal: Exception | None = None
    _logged: str = ""

    async def on_error(self, error: Exception) -> None:
        """Log the error, once in a row; or note why the first connection was refused.

        Raises:
            Exception: this error, if each further attempt would be refused. The client tries until something is raised.
        """
        if not self.connecting:
            # Each attempt to reconnect fails with the same error.
            level = logging.DEBUG if self._logged == what(error) else logging.WARNING
            self._logged = what(error)
            log.log(level, "Broker error: %s", self._logged)
        elif not isinstance(error, OSError | TimeoutError):
            self.refusal = error
            if self.is_only and _AUTHORIZATION in what(error):
                raise error

    async def on_reconnect(self) -> None:
        """Call those who asked for it."""
        self._logged = ""
        log.info("Reconnected to the broker.")
        for callback in self.bus._reconnected:  # noqa: SLF001 - of this module
            callback()

    async def on_disconnect(self) -> None:
        """Log it, unless it was closed here."""
        if not self.bus.nc.is_closed and not self.bus.nc.is_draining:
            log.warning("Lost the connection to the broker. Reconnecting.")


def what(error: Exception) -> str:
    """The error's text, or its type: some of the client's errors have no text."""
    return str(error) or type(error).__name__


def _headers_size(headers: Headers) -> int:
    """The size of headers as the client writes them: a first line, `name: value` lines, and an empty one."""
    lines = sum(len(name.encode()) + len(value.encode()) + len(": \r\n") for name, value in headers.items())
    return len("NATS/1.0\r\n") + lines + len("\r\n")


def _inbox_prefix(url: str) -> str:
    user = urlsplit(url.split(",", maxsplit=1)[0]).username
    return f"_INBOX.{user}" if user else "_INBOX"


def without_password(url: str) -> str:
    """A broker's URL, or several, without credentials: for the screen and the log."""
    return ",".join(part.rpartition("@")[2] for part in url.split(","))
