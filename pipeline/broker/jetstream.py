"""JetStream on a connection: stored and fenced publishes, reading streams, the broker's clock, answers' records."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import ClassVar, NamedTuple

import msgspec
import nats.errors

from pipeline.aio import cancellation_kept, wait_set
from pipeline.broker import api
from pipeline.broker.connection import (
    REQUEST_TIMEOUT_S,
    BusError,
    Connection,
    Headers,
    Message,
    Unreachable,
    to_message,
    what,
)
from pipeline.core.backoff import Backoff
from pipeline.wire.answers import Answer, read_answer
from pipeline.wire.messages import StoreFailure, encode
from pipeline.wire.subjects import (
    EXPECTED_LAST_SUBJECT_SEQUENCE,
    STORE_FAILED,
    STORED_SEQUENCE,
    STORED_SUBJECT,
    STORED_TIME,
    STREAM_REPLIES,
    STREAM_REQUESTS,
)
from pipeline.wire.validation import UNREADABLE

log = logging.getLogger(__name__)

# A stored publish is retried for this long, with the same message id: a cluster elects a leader within seconds.
STORE_PATIENCE_S = 12.0
_STORE_PAUSE_S = 0.05
_STORE_PAUSE_MOST_S = 1.0
BATCH = 500
# So many consumers are listed twice, if several requests are needed.
_OVERLAP = 64
# Five hundred long requests at once would exceed the client's buffers.
_SCAN_BYTES = 8 << 20
_END_OF_BATCH = ("204", "404")
# Of a message that is no part of an answer, in the log.
_SHOWN_BYTES = 80
# Drift over this time is a millisecond; a machine that was suspended finds the broker's time again within it.
_SAMPLE_EVERY_S = 10.0


class LaneFull(BusError):
    """The lane holds as many requests as it may."""


class Fenced(BusError):
    """The expected last sequence is not the last: another process has written to the subject."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A message read from a stream. `stored_at`: UTC seconds. `delivered` is 1: reading is no delivery."""

    subject: str
    sequence: int
    stored_at: float
    headers: Headers
    data: bytes
    delivered: ClassVar[int] = 1


class Ack(NamedTuple):
    """A stream's confirmation. `duplicate`: the message id had been stored before, at that sequence."""

    sequence: int
    duplicate: bool


_failure = msgspec.json.Decoder(StoreFailure)


class Bus(Connection):
    """A connection to the broker with JetStream: stored publishes, and reading streams."""

    async def store(
        self,
        subject: str,
        data: bytes,
        *,
        headers: Headers | None = None,
        expected_last: int | None = None,
        patience_s: float = STORE_PATIENCE_S,
    ) -> int:
        """As `put`; returns only the sequence."""
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
        """Publish to a stream and wait until the message is stored. Retries while the broker is away.

        A retry is safe only if the headers contain a message id, or expected_last is given.

        Args:
            subject: one of the stream's.
            data: the body.
            headers: with a `Nats-Msg-Id`, unless expected_last is given.
            expected_last: the sequence that must be the last one on the subject (0: none yet).
            patience_s: how long to retry, seconds.

        Returns:
            The message's place in the stream.

        Raises:
            Fenced: expected_last is not the last sequence.
            LaneFull: the lane is full.
            Unreachable: the broker did not answer within patience_s, or no stream accepts the subject.
            TooLarge: the broker accepts no message of this size.
            BusError: any other refusal.
        """
        sent = dict(headers or {})
        if expected_last is not None:
            sent[EXPECTED_LAST_SUBJECT_SEQUENCE] = str(expected_last)
        ack = await self._store_patiently(subject, data, sent, patience_s)
        if ack.error is not None:
            raise _refused(subject, ack.error)
        return Ack(ack.seq, ack.duplicate)

    async def _store_patiently(
        self, subject: str, data: bytes, headers: dict[str, str], patience_s: float
    ) -> api.PubAck:
        """Publish until a stream answers.

        Raises:
            Unreachable: none does within patience_s.
        """
        deadline = self.clock.now() + patience_s
        backoff = Backoff(_STORE_PAUSE_S, _STORE_PAUSE_MOST_S)
        while True:
            try:
                return await self._store_once(subject, data, headers)
            except Unreachable:
                await self._announce_failure(subject)
                pause_s = backoff.failed()
                if self.clock.now() + pause_s > deadline:
                    raise
                await asyncio.sleep(pause_s)

    async def _announce_failure(self, subject: str) -> None:
        """Tell the other processes that the broker is there and did not store a message."""
        if self.is_connected:
            with contextlib.suppress(Unreachable):
                await self.publish(STORE_FAILED, encode(StoreFailure(subject)))

    async def _store_once(self, subject: str, data: bytes, headers: dict[str, str]) -> api.PubAck:
        answer = await self.request(subject, data, headers=headers)
        if answer.status is not None:
            raise Unreachable(f"No stream accepts {subject} (status {answer.status})")
        ack = api.read_puback(answer.data)
        if ack.error is not None and ack.error.code == api.UNAVAILABLE and ack.error.err_code != api.FULL:
            # For example while a leader is being elected.
            raise Unreachable(f"{subject}: {ack.error.description}")
        return ack

    # ---- the broker's clock

    async def sample_clock(self) -> bool:
        """Ask the broker for its time, once. Returns whether it was learned; not before the streams exist.

        The server that stores requests answers, so its clock is the one that their times of storing come from.
        """
        sent_at = self.clock.now()
        try:
            answer = await self.request(f"$JS.API.STREAM.INFO.{STREAM_REQUESTS}")
        except Unreachable:
            return False
        stamped_at = None if answer.status is not None else api.read_stamped(answer.data).ts
        if stamped_at is not None:
            self.clock.stamped(sent_at, stamped_at.timestamp())
        return stamped_at is not None

    async def keep_clock(self) -> None:
        """Sample the broker's clock every ten seconds and after each reconnect, until cancelled; warn of an offset."""
        reconnected = asyncio.Event()
        self.on_reconnect(reconnected.set)
        while True:
            if await self.sample_clock():
                self.clock.report()
            await wait_set(reconnected, _SAMPLE_EVERY_S)
            reconnected.clear()

    # ---- consumers and streams

    async def _call(self, subject: str, body: bytes = b"") -> bytes:
        """What JetStream's API answers. It may be the refusal of a call that can never succeed.

        Raises:
            Unreachable: the broker does not answer, or is not able to now: while a leader is elected, for example. Read
                as an answer, this would be an empty list.
        """
        answer = await self.request(f"$JS.API.{subject}", body)
        error = api.error_in(answer.data)
        if error is not None and error.code == api.UNAVAILABLE:
            raise Unreachable(f"{subject}: {error.description}")
        return answer.data

    async def lacks(self, stream: str) -> bool:
        """Whether the broker says that it has no such stream. An account that may not ask gets no answer."""
        try:
            answer = await self.request(f"$JS.API.STREAM.INFO.{stream}")
        except Unreachable:
            return False
        error = None if answer.status is not None else api.error_in(answer.data)
        return error is not None and error.err_code == api.NO_STREAM

    async def halt(self, stream: str, consumer: str, for_s: float) -> bool:
        """Halt a consumer for a time, or resume it (0): until then it delivers nothing, redeliveries included.

        Returns:
            Whether the server did. Only nats-server 2.11 and later can.

        Raises:
            Unreachable: the broker does not answer.
        """
        until = {"pause_until": datetime.fromtimestamp(self.clock.wall() + for_s, UTC)} if for_s else {}
        answer = await self.request(f"$JS.API.CONSUMER.PAUSE.{stream}.{consumer}", msgspec.json.encode(until))
        return answer.status is None and api.error_in(answer.data) is None

    # ---- reading streams

    async def consumers(self, stream: str) -> list[api.ConsumerState]:
        """The durable consumers of a stream. The server lists 256 with one request.

        Raises:
            Unreachable: the broker does not answer.
        """
        found: dict[str, api.ConsumerState] = {}
        offset = 0
        while True:
            body = msgspec.json.encode({"offset": offset}) if offset else b"{}"
            page = api.read_consumer_list(await self._call(f"CONSUMER.LIST.{stream}", body))
            found |= {state.name: state for state in page.consumers}
            end = offset + len(page.consumers)
            if not page.consumers or end >= page.total:
                return list(found.values())
            # They are listed by name. Those that are removed meanwhile move the others up.
            offset = max(offset + 1, end - _OVERLAP)

    async def consumer(self, stream: str, name: str) -> api.ConsumerState | None:
        """One durable consumer of a stream; None if it does not exist.

        Raises:
            Unreachable: the broker does not answer.
        """
        answer = await self._call(f"CONSUMER.INFO.{stream}.{name}")
        return None if api.error_in(answer) else api.read_consumer_state(answer)

    async def subjects(self, stream: str, which: str) -> dict[str, int]:
        """How many messages a stream holds on each subject that matches which.

        Raises:
            Unreachable: the broker does not answer.
        """
        found: dict[str, int] = {}
        offset, total = 0, 1
        while offset < total:
            body = msgspec.json.encode({"subjects_filter": which, "offset": offset})
            page = api.read_subjects_page(await self._info(stream, body))
            if not page.state.subjects:
                break
            found |= page.state.subjects
            offset, total = offset + len(page.state.subjects), page.total
        return found

    async def stream_state(self, stream: str) -> api.StreamState:
        """How much a stream holds.

        Raises:
            Unreachable: the broker does not answer.
        """
        return api.read_stream_info(await self._info(stream)).state

    async def has(self, stream: str, consumer: str = "") -> bool:
        """Whether the broker has a stream, or a consumer of it.

        Raises:
            Unreachable: the broker does not answer.
        """
        kind, name = ("CONSUMER", f"{stream}.{consumer}") if consumer else ("STREAM", stream)
        return api.error_in((await self.request(f"$JS.API.{kind}.INFO.{name}")).data) is None

    async def removed(self, stream: str) -> set[int]:
        """The sequences between the first and the last one of a stream whose messages were removed.

        Raises:
            Unreachable: the broker does not answer.
        """
        return set(api.read_stream_details(await self._info(stream, b'{"deleted_details": true}')).state.deleted)

    async def _info(self, stream: str, body: bytes = b"") -> bytes:
        """What is said of a stream; raises Unreachable also where it does not exist."""
        answer = await self._call(f"STREAM.INFO.{stream}", body)
        if (error := api.error_in(answer)) is not None:
            raise Unreachable(f"The stream {stream}: {error.description}")
        return answer

    async def stored(self, stream: str, sequence: int) -> Stored | None:
        """One message of a stream, or None if it was removed.

        Raises:
            Unreachable: the stream does not answer.
        """
        answer = await self.request(f"$JS.API.DIRECT.GET.{stream}", msgspec.json.encode({"seq": sequence}))
        if STORED_SEQUENCE not in answer.headers:
            return None
        return to_stored(answer)

    async def delete(self, stream: str, sequence: int) -> bool:
        """Remove one message from a stream. Returns whether it existed."""
        body = msgspec.json.encode({"seq": sequence, "no_erase": True})
        return api.error_in(await self._call(f"STREAM.MSG.DELETE.{stream}", body)) is None

    async def scan(self, stream: str, subject: str) -> AsyncIterator[Message]:
        """All messages of a stream on a subject, oldest first. The subject may contain wildcards.

        Their headers include `Nats-Stream`, `Nats-Subject` and `Nats-Sequence`.

        Raises:
            Unreachable: the stream does not answer.
        """
        start = 1
        while batch := await self.batch(stream, subject, start, max_bytes=_SCAN_BYTES):
            for message in batch:
                yield message
            start = int(batch[-1].headers[STORED_SEQUENCE]) + 1

    async def batch(self, stream: str, subject: str, start: int, *, max_bytes: int = 0) -> list[Message]:
        """Up to `BATCH` messages on subject from sequence start, with one request (NATS ADR-31, batched direct get).

        With max_bytes fewer, but at least one if there is any.

        Raises:
            Unreachable: the stream does not answer.
        """
        inbox = self.nc.new_inbox()
        found: list[Message] = []
        try:
            subscription = await self.nc.subscribe(inbox)
        except nats.errors.Error as error:
            raise Unreachable(f"The stream {stream} was not asked: {what(error)}") from error
        try:
            body = msgspec.json.encode({"seq": start, "next_by_subj": subject, "batch": BATCH, "max_bytes": max_bytes})
            await self.nc.publish(f"$JS.API.DIRECT.GET.{stream}", body, reply=inbox)
            while True:
                with cancellation_kept():
                    message = to_message(await subscription.next_msg(REQUEST_TIMEOUT_S))
                if STORED_SEQUENCE in message.headers:
                    found.append(message)
                elif message.status in _END_OF_BATCH:
                    return found
                else:
                    raise Unreachable(f"The stream {stream} does not answer: status {message.status}")
        except (nats.errors.Error, TimeoutError) as error:
            raise Unreachable(f"The stream {stream} does not answer: {what(error)}") from error
        finally:
            with contextlib.suppress(nats.errors.Error):  # the connection is closed, and the subscription with it
                await subscription.unsubscribe()

    # ---- the records of answers

    async def read_answers(self, subject: str) -> list[tuple[int, Answer | None]]:
        """All messages of `LLM_REPLIES` on a literal subject as (sequence, message), oldest first.

        The message is None if it is no part of an answer, as `answer_in`.

        Raises:
            Unreachable: the stream does not answer.
        """
        return [
            (int(message.headers[STORED_SEQUENCE]), self.answer_in(subject, message.data))
            async for message in self.scan(STREAM_REPLIES, subject)
        ]

    async def last_answer(self, subject: str) -> tuple[int, bytes | None] | None:
        """The last sequence of `LLM_REPLIES` on a literal subject, and the last message that is part of an answer.

        Returns:
            None if there is no message; (sequence, None) if none of them is part of an answer.

        Raises:
            Unreachable: the stream does not answer.
        """
        found = await self.last_message(STREAM_REPLIES, subject)
        if found is None or self.answer_in(subject, found[1]) is not None:
            return found
        kept = [message async for message in self.scan(STREAM_REPLIES, subject)]
        answers = [message.data for message in kept if self.answer_in(subject, message.data) is not None]
        tail = int(kept[-1].headers[STORED_SEQUENCE]) if kept else found[0]
        return tail, answers[-1] if answers else None

    def answer_in(self, subject: str, data: bytes) -> Answer | None:
        """The message in data that was read from a record; None, counted and logged, if it is no part of an answer."""
        found = read_answer(data)
        if found is None:
            self.foreign += 1
            log.warning("Skipping a message on %s that is no part of an answer: %r", subject, data[:_SHOWN_BYTES])
        return found

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
        """Remove the messages of a stream on a subject, up to and including a sequence."""
        body = msgspec.json.encode({"filter": subject, "seq": up_to + 1})
        await self._call(f"STREAM.PURGE.{stream}", body)


def _refused(subject: str, error: api.Rejection) -> BusError:
    """What it means that a stream refused a message on subject."""
    if error.err_code == api.WRONG_LAST_SEQUENCE:
        return Fenced(subject)
    if error.err_code == api.FULL:
        of_all = error.description == api.ALL_FULL
        return LaneFull("The queue of all tenants is full" if of_all else f"The lane {subject} is full")
    return BusError(f"The broker refused a message on {subject}: {error.description}")


def read_failure(message: Message) -> str | None:
    """The subject in an announcement that a message was not stored; None for anything else.

    A client can have the broker's own answers sent here: an acknowledgement is no announcement, and what the broker
    read from a stream has headers.
    """
    try:
        return None if message.headers else _failure.decode(message.data).subject
    except UNREADABLE:
        return None


def to_stored(message: Message) -> Stored:
    """A message that was read from a stream, by the headers that the broker added."""
    headers = message.headers
    stored_at = datetime.fromisoformat(headers[STORED_TIME]).timestamp()
    return Stored(headers[STORED_SUBJECT], int(headers[STORED_SEQUENCE]), stored_at, headers, message.data)
