"""What every asker shares: put a request on the queue, follow its record from where one left off, cancel it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from types import TracebackType
from typing import NamedTuple, Self

import msgspec

from pipeline.broker.connection import BusError, Message, Subscription, Unreachable
from pipeline.broker.jetstream import BATCH, STORE_PATIENCE_S, Ack, Bus, LaneFull
from pipeline.telemetry import Tracing
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import Answer, Cancelled, Position, decode_answer, is_last
from pipeline.wire.subjects import (
    CANCEL,
    MSG_ID,
    QUEUE_POSITION,
    STORED_SEQUENCE,
    STREAM_REPLIES,
    reply_subject,
)

log = logging.getLogger(__name__)

# After so long without a word the record itself is looked at: a live message may have been lost without a sign.
_LOOK_AFTER_S = 15.0
_LOOK_AGAIN_S = 0.05
_PAUSE_AWAY_S = 0.5
# What a reader has not taken yet is kept up to here. Beyond it the record keeps it, and the reader reads it there.
_MAX_HELD = 128
# In what is republished: the sequence of the message before it on the same subject (NATS ADR-28).
_SEQUENCE_BEFORE = "Nats-Last-Sequence"


class Outgoing(NamedTuple):
    """A request as it is published. `given_id` tells that the id is the asker's, who may have used it before."""

    id: str
    subject: str
    body: bytes
    headers: dict[str, str]
    given_id: bool = False


class RecordEntry(NamedTuple):
    """One message of a record: its sequence in the stream, as it stands there, and read."""

    sequence: int
    data: bytes
    answer: Answer


class Asker:
    """Asks the pipeline over one connection. One per connection is enough; its methods may run side by side.

    Args:
        bus: the connection.
        tracing: where the publishing's spans go.
    """

    def __init__(self, bus: Bus, tracing: Tracing) -> None:
        self._bus = bus
        self._tracing = tracing
        self._records: set[RecordReader] = set()
        self._abandoned: set[asyncio.Task[None]] = set()
        bus.on_reconnect(self._on_reconnect)

    async def submit(self, request: Outgoing, *, patience_s: float = STORE_PATIENCE_S) -> RecordReader:
        """Put a request on the queue; it is durable when this returns.

        Cancelled before the broker has said so, it takes the request back as soon as it is there.

        Returns:
            The record to read the answer from, already listening: the caller closes it.

        Raises:
            HeadraceError: `queue_full`, or `unavailable` when the broker did not take it within patience_s.
        """
        before = await self._last_sequence(request.id) if request.given_id else 0
        record = RecordReader(self._bus, request.id, after=before, open_records=self._records)
        await record.open()
        try:
            ack = await self._put(request, patience_s)
        except BaseException:
            await record.close()
            raise
        if ack.duplicate:
            # It was asked before: its answer, or the beginning of it, may stand in the record already.
            record.reread()
        return record

    async def _put(self, request: Outgoing, patience_s: float) -> Ack:
        headers = {**request.headers, MSG_ID: request.id}
        with self._tracing.publish(request.subject, headers, request_id=request.id):
            storing = asyncio.ensure_future(
                self._bus.put(request.subject, request.body, headers=headers, patience_s=patience_s)
            )
            try:
                return await asyncio.shield(storing)
            except asyncio.CancelledError:
                self._abandon(storing, request.id)
                raise
            except LaneFull:
                raise HeadraceError(ErrorCode.QUEUE_FULL, f"the lane {request.subject} is full: try again") from None
            except BusError as error:
                raise HeadraceError(ErrorCode.UNAVAILABLE, f"the request could not be stored: {error}") from error

    def _abandon(self, storing: asyncio.Future[Ack], request_id: str) -> None:
        """Take a request back whose publishing nobody waits for any more, once it is there."""

        async def take_back() -> None:
            with contextlib.suppress(BusError):
                if not (await storing).duplicate:
                    await self.cancel(request_id)

        task = asyncio.get_running_loop().create_task(take_back())
        self._abandoned.add(task)
        task.add_done_callback(self._abandoned.discard)

    async def _last_sequence(self, request_id: str) -> int:
        """Of what stands under an id from before, 0 where nothing does."""
        try:
            found = await self._bus.last_message(STREAM_REPLIES, reply_subject(request_id))
        except Unreachable as error:
            raise HeadraceError(ErrorCode.UNAVAILABLE, f"the record cannot be read: {error}") from error
        return found[0] if found else 0

    async def read(self, request_id: str, *, after: int = 0) -> RecordReader:
        """The record of a request that somebody published, from behind a sequence on; the caller closes it."""
        record = RecordReader(self._bus, request_id, after=after, open_records=self._records)
        await record.open()
        record.look()
        return record

    async def last(self, request_id: str) -> RecordEntry | None:
        """The last message of a request's record so far, or None where there is none.

        Raises:
            Unreachable: the broker does not answer.
        """
        found = await self._bus.last_message(STREAM_REPLIES, reply_subject(request_id))
        return None if found is None else RecordEntry(*found, decode_answer(found[1]))

    async def cancel(self, request_id: str) -> None:
        """Have a request cancelled; nobody says whether it could be.

        Raises:
            Unreachable: the connection is closed.
        """
        await self._bus.publish(f"{CANCEL}.{request_id}", b"")

    async def cancelled(self, request_id: str) -> Cancelled:
        """Have a request cancelled, and hear what became of it.

        Raises:
            Unreachable: the monitor does not answer.
        """
        answer = await self._bus.request(f"{CANCEL}.{request_id}")
        return msgspec.json.decode(answer.data, type=Cancelled)

    async def position(self, request_id: str) -> Position:
        """Where a request stands.

        Raises:
            Unreachable: the monitor does not answer.
        """
        answer = await self._bus.request(QUEUE_POSITION, request_id.encode())
        return msgspec.json.decode(answer.data, type=Position)

    def _on_reconnect(self) -> None:
        for record in self._records:
            record.look()


class RecordReader:
    """The messages of one request's record, each once and in order, as they come.

    Live messages are used where they follow on what was read last. Where one is missing (a lost connection, a reader
    that is too slow for them to be kept here), the stream has it. One reader at a time.
    """

    def __init__(self, bus: Bus, request_id: str, *, after: int, open_records: set[RecordReader]) -> None:
        self.id = request_id
        self._open_records = open_records
        self._bus = bus
        self._subject = reply_subject(request_id)
        self._last_sequence = after
        self._live: deque[Message] = deque()
        self._fetched: deque[RecordEntry] = deque()
        self._look = False
        self._missed = False
        self._arrived = asyncio.Event()
        self._subscription: Subscription | None = None

    async def __aenter__(self) -> Self:
        """Nothing more than `open` has done."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Listen. What is published on the same connection after this cannot be answered unheard."""
        self._subscription = await self._bus.subscribe(self._subject, self._on_message)
        self._open_records.add(self)

    async def close(self) -> None:
        """Stop listening; twice is harmless."""
        self._open_records.discard(self)
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await self._bus.unsubscribe(subscription)

    def look(self) -> None:
        """Have the stream looked at before more is taken from what is live."""
        self._look = True
        self._arrived.set()

    def reread(self) -> None:
        """Begin at the record's start, whatever was there before."""
        self._last_sequence = 0
        self.look()

    async def next(self) -> RecordEntry:
        """The next message. Cancelling is safe: what was not returned comes again."""
        while True:
            if self._fetched:
                return self._taken(self._fetched.popleft())
            if self._look:
                await self._fetch()
            elif self._live:
                if (entry := self._from_live(self._live[0])) is not None:
                    return self._taken(entry)
            else:
                await self._wait()

    def _taken(self, entry: RecordEntry) -> RecordEntry:
        self._last_sequence = entry.sequence
        return entry

    def _from_live(self, message: Message) -> RecordEntry | None:
        """The live message, if it is the next one."""
        sequence = int(message.headers.get(STORED_SEQUENCE, 0))
        if sequence > self._last_sequence and int(message.headers.get(_SEQUENCE_BEFORE, 0)) > self._last_sequence:
            self._look = self._missed = True
            return None
        self._live.popleft()
        return (
            RecordEntry(sequence, message.data, decode_answer(message.data)) if sequence > self._last_sequence else None
        )

    async def _fetch(self) -> None:
        self._look = False
        try:
            batch = await self._bus.batch(STREAM_REPLIES, self._subject, self._last_sequence + 1)
        except BaseException as error:
            self._look = True
            if not isinstance(error, Unreachable):
                raise
            log.debug("%s: its record cannot be read now: %s", self.id, error)
            await asyncio.sleep(_PAUSE_AWAY_S)
            return
        self._look |= len(batch) >= BATCH
        self._fetched.extend(RecordEntry(int(m.headers[STORED_SEQUENCE]), m.data, decode_answer(m.data)) for m in batch)
        if self._missed and not batch:
            # A replica that answers may be a moment behind the one that told us.
            self._look = True
            await asyncio.sleep(_LOOK_AGAIN_S)
        self._missed = self._missed and not batch

    async def _wait(self) -> None:
        self._arrived.clear()
        try:
            async with asyncio.timeout(_LOOK_AFTER_S):
                await self._arrived.wait()
        except TimeoutError:
            self._look = True

    async def _on_message(self, message: Message) -> None:
        if len(self._live) < _MAX_HELD:
            self._live.append(message)
        else:
            self._look = True
        self._arrived.set()


async def whole(record: RecordReader) -> RecordEntry:
    """The last message of a record."""
    while not is_last((entry := await record.next()).answer):
        pass
    return entry
