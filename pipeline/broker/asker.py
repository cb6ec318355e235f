"""What every client of the queue shares: submit a request, follow its record from any point, cancel it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from types import TracebackType
from typing import NamedTuple, Self

import msgspec

from pipeline.aio import Background, wait_set
from pipeline.broker.connection import BusError, Message, Subscription, TooLarge, Unreachable
from pipeline.broker.jetstream import BATCH, STORE_PATIENCE_S, Ack, Bus, LaneFull
from pipeline.core.anew import cancelled_at, headers_anew
from pipeline.core.triage import Verdict
from pipeline.telemetry import Tracing
from pipeline.wire.answers import Answer, decode_answer, is_last
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import Cancelled, Position
from pipeline.wire.subjects import (
    CANCEL,
    MSG_ID,
    STORED_SEQUENCE,
    STREAM_REPLIES,
    position_subject,
    reply_subject,
    request_name,
    split_name,
    tenant_of,
)

log = logging.getLogger(__name__)

# After this long without a live message the stream is read: a message may have been lost unnoticed.
_LOOK_AFTER_S = 15.0
_LOOK_AGAIN_S = 0.05
_PAUSE_AWAY_S = 0.5
# Live messages that a reader has not taken yet, at most. It reads the others from the stream.
_MAX_HELD = 128
# Header of a republished message: the sequence of the message before it on the same subject (NATS ADR-28).
_SEQUENCE_BEFORE = "Nats-Last-Sequence"


class Outgoing(NamedTuple):
    """A request as it is published.

    Attributes:
        id: the request's, unique within the tenant of its lane.
        subject: its lane's.
        body: as it is stored.
        headers: as they are stored, without the id.
        given_id: the client chose the id, and may have used it before.
        verdict: the class that the subject gives the request and the reason, for its trace; None if it gives none.
    """

    id: str
    subject: str
    body: bytes
    headers: dict[str, str]
    given_id: bool = False
    verdict: Verdict | None = None

    @property
    def name(self) -> str:
        """The request's name, unique among all tenants."""
        return request_name(tenant_of(self.subject), self.id)


class RecordEntry(NamedTuple):
    """One message of a record: its sequence in the stream, its bytes, and the decoded message."""

    sequence: int
    data: bytes
    answer: Answer


class Asker:
    """Submits requests over one connection. Its methods may run concurrently.

    Args:
        bus: the connection.
        tracing: records the spans of publishing.
    """

    def __init__(self, bus: Bus, tracing: Tracing) -> None:
        self._bus = bus
        self._tracing = tracing
        self._records: set[RecordReader] = set()
        self._abandoned = Background()
        bus.on_reconnect(self._on_reconnect)

    @property
    def secret(self) -> bytes:
        """The pipeline's, with which a request is charged to a key; empty for a client that may not read it."""
        return self._bus.moves.key

    async def submit(
        self,
        request: Outgoing,
        *,
        patience_s: float = STORE_PATIENCE_S,
        on_abandoned: Callable[[], Awaitable[None]] | None = None,
    ) -> RecordReader:
        """Put a request on the queue. It is durable when this returns.

        A request of the same id that was cancelled begins anew, as a replayed dead letter does.

        Args:
            request: the request.
            patience_s: how long to retry while the broker does not store it, seconds.
            on_abandoned: called once the request is stored if this was cancelled before; by default, this cancels the
                request then.

        Returns:
            The record to read the answer from, already subscribed. The caller closes it.

        Raises:
            HeadraceError: `queue_full`, or `unavailable` if the broker did not store it within patience_s.
        """
        headers, after, anew = {**request.headers, MSG_ID: request.name}, 0, False
        if request.given_id and (before := await self._before(request.name)) is not None:
            after, created = before.sequence, cancelled_at(before.answer)
            if anew := created is not None and bool(self._bus.moves.key):
                headers |= headers_anew(request.name, after, created, self._bus.clock.wall(), self._bus.moves)
        record = RecordReader(self._bus, request.name, after=after, open_records=self._records)
        await record.open()
        try:
            ack = await self._put(request, headers, patience_s, on_abandoned or partial(self.cancel, request.name))
        except BaseException:
            await record.close()
            raise
        if ack.duplicate:
            # The request was submitted before: the record may already hold a part of its answer.
            record.reread(after if anew else 0)
        return record

    async def _put(
        self,
        request: Outgoing,
        headers: dict[str, str],
        patience_s: float,
        on_abandoned: Callable[[], Awaitable[None]],
    ) -> Ack:
        with self._tracing.publish(request.subject, headers, request_id=request.name, verdict=request.verdict):
            storing = asyncio.ensure_future(
                self._bus.put(request.subject, request.body, headers=headers, patience_s=patience_s)
            )
            try:
                return await asyncio.shield(storing)
            except asyncio.CancelledError:
                self._abandon(storing, request.name, on_abandoned)
                raise
            except LaneFull as error:
                raise HeadraceError(ErrorCode.QUEUE_FULL, f"{error}. Retry later.") from None
            except TooLarge as error:
                message = (
                    f"The request has {error.size} bytes with its headers. The broker accepts at most {error.most}."
                )
                raise HeadraceError(ErrorCode.REQUEST_TOO_LARGE, message) from None
            except BusError as error:
                message = (
                    f"The broker did not confirm request {request.name} in time, and may have stored it. "
                    "Send it again under the same id, so that it is answered once."
                )
                raise HeadraceError(ErrorCode.UNAVAILABLE, message) from error

    def _abandon(self, storing: asyncio.Future[Ack], name: str, on_abandoned: Callable[[], Awaitable[None]]) -> None:
        """Take a request back once it is stored: its submission was cancelled."""

        async def take_back() -> None:
            with contextlib.suppress(BusError):
                if not (await storing).duplicate:
                    await on_abandoned()

        self._abandoned.start(take_back(), what=f"cancelling the abandoned request {name}")

    async def _before(self, name: str) -> RecordEntry | None:
        """The last message of an older request under an id, None if there is none."""
        try:
            return await self.last(name)
        except Unreachable as error:
            raise HeadraceError(ErrorCode.UNAVAILABLE, f"The record of the request cannot be read: {error}") from error

    async def read(self, name: str, *, after: int = 0) -> RecordReader:
        """The record of any published request, after a sequence. The caller closes it."""
        record = RecordReader(self._bus, name, after=after, open_records=self._records)
        await record.open()
        record.look()
        return record

    async def last(self, name: str) -> RecordEntry | None:
        """The last message of a request's record so far, or None if it is empty.

        Raises:
            Unreachable: the broker does not answer.
        """
        return await _last(self._bus, reply_subject(name))

    async def cancel(self, name: str) -> None:
        """Ask for a request to be cancelled, without an answer.

        Raises:
            Unreachable: the connection is closed.
        """
        await self._bus.publish(f"{CANCEL}.{name}", b"")

    async def cancelled(self, name: str) -> Cancelled:
        """Ask for a request to be cancelled. Returns what became of it.

        Raises:
            Unreachable: the monitor does not answer.
        """
        answer = await self._bus.request(f"{CANCEL}.{name}")
        return msgspec.json.decode(answer.data, type=Cancelled)

    async def position(self, name: str) -> Position:
        """A request's state and its position in the queue.

        Raises:
            Unreachable: the monitor does not answer.
        """
        tenant, request_id = split_name(name)
        answer = await self._bus.request(position_subject(tenant), request_id.encode())
        return msgspec.json.decode(answer.data, type=Position)

    def _on_reconnect(self) -> None:
        for record in self._records:
            record.look()


class RecordReader:
    """The messages of one request's record, each once and in order, as they come.

    A live message is used if it directly follows the last one read. If one is missing (a lost connection, a slow
    reader), the record is read from the stream. The messages of an earlier request under the id are left out if those
    of a later one follow. One reader at a time.
    """

    def __init__(self, bus: Bus, name: str, *, after: int, open_records: set[RecordReader]) -> None:
        self.name = name
        self._open_records = open_records
        self._bus = bus
        self._subject = reply_subject(name)
        self._last_sequence = after
        # The sequence and the request (`created`) of the record's last message, as the first look found it.
        self._newest: tuple[int, int] | None = None
        self._live: deque[Message] = deque()
        self._fetched: deque[RecordEntry] = deque()
        self._look = False
        self._fetching: asyncio.Task[None] | None = None
        self._missed = False
        self._look_at = 0.0
        self._arrived = asyncio.Event()
        self._subscription: Subscription | None = None

    async def __aenter__(self) -> Self:
        """The record itself; `open` has been called before."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Subscribe. The answer to a request that is published on this connection afterwards cannot be missed."""
        self._subscription = await self._bus.subscribe(self._subject, self._on_message)
        self._open_records.add(self)

    async def close(self) -> None:
        """Unsubscribe. Twice is harmless."""
        self._open_records.discard(self)
        self._stop_fetching()
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await self._bus.unsubscribe(subscription)

    def look(self) -> None:
        """Read the stream before any more live messages."""
        self._look = True
        self._arrived.set()

    def reread(self, after: int = 0) -> None:
        """Start again at the beginning of the record, or after a sequence."""
        self._stop_fetching()
        self._last_sequence = after
        self.look()

    async def next(self) -> RecordEntry:
        """The next message. Cancelling is safe: no message is lost, and a look at the stream goes on."""
        while True:
            if self._fetched:
                return self._taken(self._fetched.popleft())
            if self._look or self._fetching is not None:
                await self._until_fetched()
            elif self._live:
                if (entry := self._from_live(self._live[0])) is not None:
                    return self._taken(entry)
            else:
                await self._wait()

    def _taken(self, entry: RecordEntry) -> RecordEntry:
        self._last_sequence = entry.sequence
        return entry

    def _from_live(self, message: Message) -> RecordEntry | None:
        """The live message, if it is the next one of the record."""
        sequence = _number(message, STORED_SEQUENCE)
        if sequence > self._last_sequence and _number(message, _SEQUENCE_BEFORE) > self._last_sequence:
            self._look = self._missed = True
            return None
        self._live.popleft()
        return self._entry(sequence, message.data) if sequence > self._last_sequence else None

    def _entry(self, sequence: int, data: bytes) -> RecordEntry | None:
        """A message of the record; what is no part of this request's answer counts as read."""
        answer = self._bus.answer_in(self._subject, data)
        if answer is None or self._is_older(sequence, answer):
            if not self._fetched:
                self._last_sequence = sequence
            return None
        return RecordEntry(sequence, data, answer)

    def _is_older(self, sequence: int, answer: Answer) -> bool:
        """Whether a message belongs to an earlier request under the id, whose messages are about to be purged."""
        return self._newest is not None and sequence < self._newest[0] and answer.created != self._newest[1]

    async def _until_fetched(self) -> None:
        """Read the stream. This may take longer than a caller waits at once, so it goes on when the caller leaves."""
        if self._fetching is None:
            self._fetching = asyncio.get_running_loop().create_task(self._fetch())
        fetching = self._fetching
        try:
            await asyncio.shield(fetching)
        finally:
            if fetching.done() and self._fetching is fetching:
                self._fetching = None

    def _stop_fetching(self) -> None:
        fetching, self._fetching = self._fetching, None
        if fetching is not None:
            fetching.cancel()

    async def _fetch(self) -> None:
        self._look = False
        try:
            if self._newest is None and (newest := await _last(self._bus, self._subject)) is not None:
                self._newest = newest.sequence, newest.answer.created
            batch = await self._bus.batch(STREAM_REPLIES, self._subject, self._last_sequence + 1)
        except BaseException as error:
            self._look = True
            if not isinstance(error, Unreachable):
                raise
            log.debug("%s: the record cannot be read now: %s", self.name, error)
            await asyncio.sleep(_PAUSE_AWAY_S)
            return
        self._look |= len(batch) >= BATCH
        for message in batch:
            if (entry := self._entry(_number(message, STORED_SEQUENCE), message.data)) is not None:
                self._fetched.append(entry)
        if self._missed and not batch:
            # The replica that answered may be a moment behind the one that sent the live message.
            self._look = True
            await asyncio.sleep(_LOOK_AGAIN_S)
        self._missed = self._missed and not batch

    async def _wait(self) -> None:
        self._arrived.clear()
        now = self._bus.clock.now()
        # A wait that is cancelled and begun again goes on: callers wait for less time than this at once.
        self._look_at = self._look_at or now + _LOOK_AFTER_S
        if not await wait_set(self._arrived, self._look_at - now):
            self._look = True
        self._look_at = 0.0

    async def _on_message(self, message: Message) -> None:
        if len(self._live) < _MAX_HELD:
            self._live.append(message)
        else:
            self._look = True
        self._arrived.set()


async def _last(bus: Bus, subject: str) -> RecordEntry | None:
    found = await bus.last_answer(subject)
    if found is None or found[1] is None:
        return None
    return RecordEntry(found[0], found[1], decode_answer(found[1]))


def _number(message: Message, header: str) -> int:
    """A sequence in a header; 0 if it has none. Only the stream writes valid ones."""
    text = message.headers.get(header, "")
    return int(text) if text.isascii() and text.isdecimal() else 0


async def whole(record: RecordReader) -> RecordEntry:
    """The last message of a record."""
    while not is_last((entry := await record.next()).answer):
        pass
    return entry
