"""The NATS client's one adapter: connection, stored publishes with a fence, deliveries, the answers' record.

Only this module and `pipeline.topology` import the client; its exceptions end here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec
import nats
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as _Subscription
from nats.js import JetStreamContext
from nats.micro import add_service
from nats.micro.request import Request

from pipeline.messages import Answer, decode_answer
from pipeline.subjects import (
    EXPECTED_LAST_SUBJECT_SEQUENCE,
    STORED_SEQUENCE,
    STORED_SUBJECT,
    STORED_TIME,
    STREAM_REPLIES,
)

log = logging.getLogger(__name__)

# What `subscribe` gives and `drain` takes, for the annotations of our callers.
Subscription = _Subscription

# A publish that must be stored is tried again for this long with the same message id: a cluster without a leader is
# back within seconds.
STORE_PATIENCE_S = 12.0
_REQUEST_TIMEOUT_S = 2.0
_RECONNECT_WAIT_S = 0.1
# The client itself would go on for ever where nobody answers at the first try.
_CONNECT_PATIENCE_S = 5.0
_FULL = 10077
_WRONG_LAST_SEQUENCE = 10071
_UNAVAILABLE = 503
BATCH = 500
# Five hundred long requests at once would overrun the client's buffers.
_SCAN_BYTES = 8 << 20
_ACK_PREFIX = "$JS.ACK."
_END_OF_BATCH = ("204", "404")
_SERVICE_VERSION = "1.0.0"  # of the wire contract

Headers = Mapping[str, str]
Handler = Callable[["Message"], Awaitable[None]]
Service = Callable[[bytes], Awaitable[bytes]]


class BusError(Exception):
    """The broker could not do what was asked."""


class Unreachable(BusError):
    """No answer from the broker in time; what was asked may or may not have happened."""


class LaneFull(BusError):
    """The lane's bound refuses another request."""


class Fenced(BusError):
    """Somebody else has written to the subject since: the expected last sequence is not the last."""


@dataclass(slots=True)
class Message:
    """A message as it came, with no client type in it."""

    subject: str
    data: bytes
    headers: Headers
    reply: str

    @property
    def is_delivery(self) -> bool:
        """Whether a work queue handed this over; a request, too, may have no data and bring a header `Status`."""
        return self.reply.startswith(_ACK_PREFIX)

    @property
    def status(self) -> str | None:
        """The status code of a message that carries no data (404, 408, 409, 503), else None."""
        return self.headers.get("Status") if not self.data else None

    @property
    def description(self) -> str:
        """What the server says about the status."""
        return self.headers.get("Description", "")


@dataclass(slots=True)
class Delivery:
    """A request handed over by a work queue; it comes again unless it is acknowledged or kept in progress."""

    message: Message
    consumer: str
    sequence: int
    delivered: int
    stored_at: float
    pending: int
    _bus: Bus = field(repr=False)

    async def ack(self) -> None:
        """Say that the request is done with; written behind everything published before on this connection."""
        await self._bus.publish(self.message.reply, b"+ACK")

    async def nak(self, delay_s: float = 0.0) -> None:
        """Give the request back; it comes again at once, or after delay_s."""
        body = b"-NAK" if not delay_s else b'-NAK {"delay": %d}' % int(delay_s * 1e9)
        await self._bus.publish(self.message.reply, body)

    async def in_progress(self) -> None:
        """Renew the lease."""
        await self._bus.publish(self.message.reply, b"+WPI")


@dataclass(frozen=True, slots=True)
class Stored:
    """A message as it stands in a stream; `stored_at` in UTC seconds."""

    subject: str
    sequence: int
    stored_at: float
    headers: Headers
    data: bytes


class Ack(NamedTuple):
    """What a stream says of a stored publish; `duplicate` where the message id was there already, at that sequence."""

    sequence: int
    duplicate: bool


class Delivered(msgspec.Struct):
    """How far a consumer has come: the sequence of the latest message that it has handed over for the first time."""

    stream_seq: int = 0


class ConsumerState(msgspec.Struct):
    """A durable consumer: requests that wait for it, and that are delivered and not acknowledged."""

    name: str
    num_pending: int
    num_ack_pending: int
    delivered: Delivered


class StreamState(msgspec.Struct):
    """What a stream holds."""

    messages: int
    first_seq: int


class _ConsumerList(msgspec.Struct):
    consumers: list[ConsumerState] = msgspec.field(default_factory=list)


class _StreamInfo(msgspec.Struct):
    state: StreamState


class _ApiError(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _PubAck(msgspec.Struct):
    seq: int = 0
    duplicate: bool = False
    error: _ApiError | None = None


_consumer_list = msgspec.json.Decoder(_ConsumerList)
_stream_info = msgspec.json.Decoder(_StreamInfo)
_puback = msgspec.json.Decoder(_PubAck)


class _Client(Client):
    """The client, mended in two places.

    It stops reading for good where it cannot read a message's headers. They come as the publisher wrote them, and a
    request that cuts off whoever is handed it would cut off every worker.

    Its PING overtakes what waits to be written, so that the PONG says nothing of it: a subscription would be taken for
    withdrawn before the broker has heard of that, and what is still sent to it would be lost until its lease runs out.
    """

    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        if self._transport is not None and self.is_connected and self._pending:
            self._transport.writelines(self._pending)
            self._pending, self._pending_data_size = [], 0
        await super()._send_ping(future)

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        try:
            return await super()._process_headers(headers)
        except (IndexError, UnicodeDecodeError) as error:
            log.info("a message came with headers that cannot be read: %s", error)
            return None


@dataclass(slots=True)
class Bus:
    """One connection to the broker. Reconnects for ever by itself."""

    nc: Client
    js: JetStreamContext
    _reconnected: list[Callable[[], None]] = field(default_factory=list)

    @classmethod
    @asynccontextmanager
    async def connect(cls, url: str, *, name: str) -> AsyncIterator[Bus]:
        """A connection for the time of the block.

        Args:
            url: of one server, or several separated by commas. Where a user stands in it, the connection's inboxes are
                under `_INBOX.<user>`, which is what that user may read.
            name: shown by the server's monitoring.

        Raises:
            Unreachable: no server answers within seconds.
        """
        nc = _Client()
        bus = cls(nc, nc.jetstream(timeout=5.0))

        async def on_error(error: Exception) -> None:
            log.warning("broker: %s", _what(error))

        async def on_reconnect() -> None:
            log.info("broker: connected again")
            for callback in bus._reconnected:
                callback()

        async def on_disconnect() -> None:
            if not nc.is_closed and not nc.is_draining:
                log.warning("broker: connection lost, trying to reconnect")

        try:
            async with asyncio.timeout(_CONNECT_PATIENCE_S):
                await nc.connect(
                    url.split(","),
                    name=name,
                    inbox_prefix=_inbox_prefix(url),
                    error_cb=on_error,
                    reconnected_cb=on_reconnect,
                    disconnected_cb=on_disconnect,
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
            await bus._close()
            raise Unreachable(f"no NATS server answers at {_without_password(url)}: {_what(error)}") from error
        try:
            yield bus
        finally:
            await bus._close()

    async def _close(self) -> None:
        try:
            async with asyncio.timeout(2.0):
                if self.nc.is_connected:
                    await self.nc.flush(1)
                await self.nc.close()
        except (OSError, nats.errors.Error, TimeoutError):
            log.debug("broker: closed without a farewell")

    @property
    def is_connected(self) -> bool:
        """Whether the connection stands now."""
        return bool(self.nc.is_connected)

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        """Have callback called each time the connection is back: what was in flight on it is gone."""
        self._reconnected.append(callback)

    async def publish(self, subject: str, data: bytes, *, reply: str = "", headers: Headers | None = None) -> None:
        """Send a core message; whoever listens gets it, nobody says so.

        Raises:
            Unreachable: the connection is closed, or has buffered too much while it was away.
        """
        try:
            await self.nc.publish(subject, data, reply=reply, headers=dict(headers) if headers else None)
        except nats.errors.Error as error:
            raise Unreachable(f"cannot publish to {subject}: {error}") from error

    async def request(
        self, subject: str, data: bytes = b"", *, headers: Headers | None = None, timeout_s: float = _REQUEST_TIMEOUT_S
    ) -> Message:
        """Send a request and wait for one answer.

        Raises:
            Unreachable: nobody listens, or no answer came in time.
        """
        task = asyncio.current_task()
        cancelled_before = task.cancelling() if task is not None else 0
        try:
            answer = await self.nc.request(subject, data, timeout=timeout_s, headers=dict(headers) if headers else None)
        except (nats.errors.Error, TimeoutError) as error:
            raise Unreachable(f"no answer from {subject}: {_what(error)}") from error
        if task is not None and task.cancelling() > cancelled_before:
            # Before Python 3.12 the client's `wait_for` loses a cancellation that comes together with the answer.
            raise asyncio.CancelledError
        return to_message(answer)

    async def store(
        self,
        subject: str,
        data: bytes,
        *,
        headers: Headers | None = None,
        expected_last: int | None = None,
        patience_s: float = STORE_PATIENCE_S,
    ) -> int:
        """As `put`; returns the sequence alone."""
        return (
            await self.put(subject, data, headers=headers, expected_last=expected_last, patience_s=patience_s)
        ).sequence

    async def put(
        self,
        subject: str,
        data: bytes,
        *,
        headers: Headers | None = None,
        expected_last: int | None = None,
        patience_s: float = STORE_PATIENCE_S,
    ) -> Ack:
        """Publish to a stream and wait until it is stored; tries again while the broker is away.

        Safe to repeat only because the headers carry a message id, or expected_last is given.

        Args:
            subject: of the stream.
            data: the body.
            headers: `Nats-Msg-Id` among them where the subject is not fenced.
            expected_last: the sequence of the last message on the subject (0: none), else the publish is refused.
            patience_s: for how long to try.

        Returns:
            Where it stands in the stream.

        Raises:
            Fenced: expected_last is not the last.
            LaneFull: the lane's bound.
            Unreachable: the broker did not answer within patience_s, or no stream takes the subject.
            BusError: any other refusal.
        """
        sent = dict(headers or {})
        if expected_last is not None:
            sent[EXPECTED_LAST_SUBJECT_SEQUENCE] = str(expected_last)
        deadline = asyncio.get_running_loop().time() + patience_s
        pause_s = 0.05
        while True:
            try:
                ack = await self._store_once(subject, data, sent)
            except Unreachable:
                if asyncio.get_running_loop().time() + pause_s > deadline:
                    raise
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, 1.0)
                continue
            if ack.error is None:
                return Ack(ack.seq, ack.duplicate)
            if ack.error.err_code == _WRONG_LAST_SEQUENCE:
                raise Fenced(subject)
            if ack.error.err_code == _FULL:
                raise LaneFull(f"{subject} is full")
            raise BusError(f"{subject} was not stored: {ack.error.description}")

    async def _store_once(self, subject: str, data: bytes, headers: dict[str, str]) -> _PubAck:
        answer = await self.request(subject, data, headers=headers)
        if answer.status is not None:
            raise Unreachable(f"no stream takes {subject} (status {answer.status})")
        ack = _puback.decode(answer.data)
        if ack.error is not None and ack.error.code == _UNAVAILABLE and ack.error.err_code != _FULL:
            # A leader is being elected, say.
            raise Unreachable(f"{subject}: {ack.error.description}")
        return ack

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> Subscription:
        """Have handler called for each message, one after another; what it raises is logged."""

        async def on_message(message: Msg) -> None:
            await handler(to_message(message))

        return await self.nc.subscribe(subject, queue=queue, cb=on_message)

    async def unsubscribe(self, subscription: Subscription) -> None:
        """Remove interest at once; without a connection there is none."""
        with contextlib.suppress(nats.errors.Error):
            await subscription.unsubscribe()

    async def drain(self, subscription: Subscription) -> None:
        """Remove interest, and handle what the broker had sent before it knew."""
        try:
            await subscription.drain()  # type: ignore[no-untyped-call]
        except (nats.errors.Error, TimeoutError) as error:
            log.debug("broker: subscription not drained: %s", error)

    def new_inbox(self) -> str:
        """A subject nobody else uses."""
        return self.nc.new_inbox()

    def delivery(self, message: Message) -> Delivery:
        """The delivery in a message of a pull consumer."""
        tokens = message.reply.split(".")
        # `$JS.ACK.<stream>.<consumer>.<delivered>.<sseq>.<cseq>.<time>.<pending>`, or with domain and account first.
        consumer, delivered, sequence, _, time_ns, pending = tokens[3:9] if len(tokens) == 9 else tokens[5:11]
        return Delivery(message, consumer, int(sequence), int(delivered), int(time_ns) / 1e9, int(pending), self)

    async def serve(self, name: str, description: str, endpoints: Mapping[str, Service]) -> None:
        """Answer requests on the given subjects as a NATS service, seen by `nats micro ls`.

        Args:
            name: the service's name.
            description: for people.
            endpoints: what gives the body of the answer, by subject.
        """
        service = await add_service(self.nc, name=name, version=_SERVICE_VERSION, description=description)

        def answering(endpoint: Service) -> Callable[[Request], Awaitable[None]]:
            async def answer(request: Request) -> None:
                try:
                    body = await endpoint(request.data)
                except BusError as error:
                    await request.respond_error("503", str(error))
                except Exception as error:
                    log.exception("%s: no answer", request.subject)
                    await request.respond_error("500", type(error).__name__)
                else:
                    await request.respond(body)

            return answer

        for subject, endpoint in endpoints.items():
            await service.add_endpoint(
                name=subject.replace(".", "_"), subject=subject, handler=answering(endpoint), queue_group=name
            )

    # ---- what stands in streams

    async def consumers(self, stream: str) -> list[ConsumerState]:
        """The durable consumers of a stream, in one request.

        Raises:
            Unreachable: the broker does not answer.
        """
        answer = await self.request(f"$JS.API.CONSUMER.LIST.{stream}", b"{}")
        return _consumer_list.decode(answer.data).consumers

    async def stream_state(self, stream: str) -> StreamState:
        """How much a stream holds.

        Raises:
            Unreachable: the broker does not answer.
        """
        answer = await self.request(f"$JS.API.STREAM.INFO.{stream}")
        return _stream_info.decode(answer.data).state

    async def stored(self, stream: str, sequence: int) -> Stored | None:
        """One message of a stream, or None where it is not there any more.

        Raises:
            Unreachable: the stream does not answer.
        """
        answer = await self.request(f"$JS.API.DIRECT.GET.{stream}", msgspec.json.encode({"seq": sequence}))
        if STORED_SEQUENCE not in answer.headers:
            return None
        return to_stored(answer)

    async def delete(self, stream: str, sequence: int) -> bool:
        """Remove one message from a stream. Returns whether it was there."""
        body = msgspec.json.encode({"seq": sequence, "no_erase": True})
        answer = await self.request(f"$JS.API.STREAM.MSG.DELETE.{stream}", body)
        return _puback.decode(answer.data).error is None

    async def scan(self, stream: str, subject: str) -> AsyncIterator[Message]:
        """All messages of a stream on a subject, which may hold wildcards, oldest first.

        Each has `Nats-Stream`, `Nats-Subject` and `Nats-Sequence` among its headers.

        Raises:
            Unreachable: the stream does not answer.
        """
        start = 1
        while batch := await self.batch(stream, subject, start, max_bytes=_SCAN_BYTES):
            for message in batch:
                yield message
            start = int(batch[-1].headers[STORED_SEQUENCE]) + 1

    async def batch(self, stream: str, subject: str, start: int, *, max_bytes: int = 0) -> list[Message]:
        """Up to `BATCH` messages on subject from sequence start, in one request (NATS ADR-31, batched direct get).

        With max_bytes fewer of long ones, but at least one where there is any.

        Raises:
            Unreachable: the stream does not answer.
        """
        inbox = self.nc.new_inbox()
        found: list[Message] = []
        subscription = await self.nc.subscribe(inbox)
        try:
            body = msgspec.json.encode({"seq": start, "next_by_subj": subject, "batch": BATCH, "max_bytes": max_bytes})
            await self.nc.publish(f"$JS.API.DIRECT.GET.{stream}", body, reply=inbox)
            while True:
                message = to_message(await subscription.next_msg(_REQUEST_TIMEOUT_S))
                if STORED_SEQUENCE in message.headers:
                    found.append(message)
                elif message.status in _END_OF_BATCH:
                    return found
                else:
                    raise Unreachable(f"{stream} does not answer: status {message.status}")
        except (nats.errors.Error, TimeoutError) as error:
            raise Unreachable(f"{stream} does not answer: {_what(error)}") from error
        finally:
            await subscription.unsubscribe()

    # ---- the answers' record

    async def read_answers(self, subject: str) -> list[tuple[int, Answer]]:
        """All that `LLM_REPLIES` holds on a literal subject, as (sequence, message), oldest first.

        Raises:
            Unreachable: the stream does not answer.
        """
        return [
            (int(message.headers[STORED_SEQUENCE]), decode_answer(message.data))
            async for message in self.scan(STREAM_REPLIES, subject)
        ]

    async def last_message(self, stream: str, subject: str) -> tuple[int, bytes] | None:
        """The last message of a stream on a subject as (sequence, body), or None.

        Raises:
            Unreachable: the stream does not answer.
        """
        answer = await self.request(f"$JS.API.DIRECT.GET.{stream}.{subject}")
        if STORED_SEQUENCE not in answer.headers:
            return None
        return int(answer.headers[STORED_SEQUENCE]), answer.data

    async def purge(self, stream: str, subject: str, *, up_to: int) -> None:
        """Remove what a stream holds on a subject, up to a sequence."""
        body = msgspec.json.encode({"filter": subject, "seq": up_to + 1})
        await self.request(f"$JS.API.STREAM.PURGE.{stream}", body)


def to_message(message: Msg) -> Message:
    """The client's message as ours."""
    return Message(message.subject, message.data, message.headers or {}, message.reply)


def to_stored(message: Message) -> Stored:
    """What the broker's own headers say of a message that was read from a stream."""
    headers = message.headers
    stored_at = datetime.fromisoformat(headers[STORED_TIME]).timestamp()
    return Stored(headers[STORED_SUBJECT], int(headers[STORED_SEQUENCE]), stored_at, headers, message.data)


def _what(error: Exception) -> str:
    """Some of the client's errors have no text."""
    return str(error) or type(error).__name__


def _inbox_prefix(url: str) -> str:
    user = urlsplit(url.split(",", maxsplit=1)[0]).username
    return f"_INBOX.{user}" if user else "_INBOX"


def _without_password(url: str) -> str:
    return ",".join(part.rpartition("@")[2] for part in url.split(","))
