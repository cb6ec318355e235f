"""Writing a request's record: fenced, forwarded where it was asked for, and closed exactly once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import msgspec

from pipeline.broker.connection import Delivery
from pipeline.broker.jetstream import Bus, Fenced
from pipeline.core.envelope import Envelope
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import Answer, ErrorAnswer, Last, decode_answer, encode
from pipeline.wire.subjects import DUPLICATE_WINDOW_S, REPLY_TO, STREAM_REPLIES, out_subject, reply_subject

log = logging.getLogger(__name__)

_TRIES = 3


class LeaseLost(Exception):
    """The request is not ours any more: somebody else goes on with it, and nothing may be written or acknowledged."""


class Repeated(LeaseLost):
    """The record is that of the same request, published twice: only this delivery of it is to be acknowledged."""


class _Taken(Exception):
    """The last message on the subject is somebody else's; how it goes on is for the writer to say."""

    def __init__(self, sequence: int, data: bytes) -> None:
        super().__init__(sequence)
        self.sequence = sequence
        self.data = data


@dataclass(slots=True)
class _Tail:
    """The end of what `LLM_REPLIES` holds under one id, to which one writer appends.

    Attributes:
        last_sequence: of the last message, 0 where there is none.
        last_data: that message, where it is known; it is not appended again.
        older_up_to: up to which sequence it belongs to an older request under the same id, 0 where nothing does.
    """

    bus: Bus
    id: str
    last_sequence: int = 0
    last_data: bytes = b""
    older_up_to: int = 0
    _unconfirmed: list[bytes] = field(init=False, default_factory=list)

    async def append(self, data: bytes) -> None:
        """Append data, whether or not the messages before it, which a cancellation interrupted, were stored.

        Raises:
            _Taken: somebody else has written.
            Unreachable: the broker is away for too long.
        """
        if data == self.last_data:
            return
        self._unconfirmed.append(data)
        for _ in range(_TRIES):
            try:
                self.last_sequence = await self.bus.store(out_subject(self.id), data, expected_last=self.last_sequence)
                break
            except Fenced:
                if await self._catch_up() == data:
                    break
        else:
            raise _Taken(self.last_sequence, b"")
        self.last_data = data
        self._unconfirmed.clear()
        await self._let_the_older_go()

    async def _catch_up(self) -> bytes | None:
        """Learn the last sequence after a refusal. Returns the last message, None where there is none."""
        sequence, data = await self.bus.last_message(STREAM_REPLIES, reply_subject(self.id)) or (0, None)
        if data is not None and data not in self._unconfirmed:
            raise _Taken(sequence, data)
        self.last_sequence = sequence
        return data

    async def _let_the_older_go(self) -> None:
        """What an older request left goes once something stands behind it.

        An empty record would let in whoever was frozen in the moment in which he was about to begin it.
        """
        if self.older_up_to:
            await self.bus.purge(STREAM_REPLIES, reply_subject(self.id), up_to=self.older_up_to)
            self.older_up_to = 0


@dataclass(slots=True)
class RecordWriter:
    """Appends to the record of one request as long as the request is ours.

    Every message carries the sequence that must be the record's last. Whoever was taken for dead and wakes up is
    refused by the stream, and readers never see what was refused. One writer: the task that serves the request.

    Args:
        bus: the connection.
        envelope: the request's.
        holds_lease: whether the request is still ours, as far as this process knows.
        newest: the record's last message where an earlier attempt wrote it.
    """

    bus: Bus
    envelope: Envelope
    holds_lease: Callable[[], bool]
    newest: Answer | None = None
    _record: _Tail = field(init=False)
    _forwarded: _Tail | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._record = _Tail(self.bus, self.envelope.id)

    @property
    def last_sequence(self) -> int:
        """Of the record's last message, 0 where there is none; set by whoever has read the record."""
        return self._record.last_sequence

    @last_sequence.setter
    def last_sequence(self, sequence: int) -> None:
        self._record.last_sequence = sequence

    async def write(self, message: Answer) -> None:
        """Append message, then forward it to the request's `Reply-To`.

        After a cancellation, or when the broker was away, the next write finds out whether this one was stored.

        Raises:
            LeaseLost: another attempt has written.
            Unreachable: the broker is away for too long.
        """
        data = encode(message)
        await self._append(data)
        await self._forward(data)

    async def forward_newest(self) -> None:
        """Forward what an earlier attempt wrote last: it may have died before it could. The reader may see it twice."""
        if self.newest is not None:
            await self._forward(encode(self.newest))

    async def close(self, last: Last, delivery: Delivery) -> None:
        """Append the last message, forward it, acknowledge the request.

        Forwarding and acknowledging go to the broker in one write: a process that dies does both or neither.

        Raises:
            LeaseLost, Unreachable: as `write`.
        """
        data = encode(last)
        await self._append(data)
        await self.settle(data, delivery)

    async def settle(self, last: bytes, delivery: Delivery) -> None:
        """Forward a last message that the record already holds, and acknowledge the request."""
        await self._forward(last)
        if not self.holds_lease():
            raise LeaseLost
        await delivery.ack()

    async def check_reply_to(self) -> None:
        """See that the `Reply-To`, where it is another record's subject, does not belong to another request.

        Raises:
            HeadraceError: `reply_subject_denied`.
        """
        target = self.envelope.reply_to
        if target is None or not target.startswith("llm.reply.") or self._forwarded is not None:
            return
        found = await self.bus.last_message(STREAM_REPLIES, target)
        if found is not None and _id_of(found[1]) != self.envelope.id:
            self.envelope = replace(self.envelope, reply_to=None)
            raise HeadraceError(
                ErrorCode.REPLY_SUBJECT_DENIED, f"{target} holds another request's answer", param=REPLY_TO
            )
        self._forwarded = _Tail(self.bus, target.removeprefix("llm.reply."), *(found or (0, b"")))
        if found is not None and not self._is_ours(found[1]):
            if self._repeats(found[1]):
                raise Repeated
            # An older request had this id; its answer makes way here as it does in the record.
            self._forwarded.older_up_to = found[0]

    async def _append(self, data: bytes) -> None:
        if not self.holds_lease():
            raise LeaseLost
        try:
            await self._record.append(data)
        except _Taken as taken:
            if not taken.data or self._is_ours(taken.data):
                raise LeaseLost from None
            if self._repeats(taken.data):
                raise Repeated from None
            # An older request had this id; its answer makes way.
            self._record.last_sequence = self._record.older_up_to = taken.sequence
            await self._append(data)

    def _is_ours(self, data: bytes) -> bool:
        """Whether a message belongs to this request, and not to an older one under the same id or another one."""
        message = _answer_in(data)
        return message is not None and (message.id, message.created) == (self.envelope.id, self.envelope.created)

    def _repeats(self, data: bytes) -> bool:
        """Whether a message belongs to another copy of this request, sent while the same id is the same request.

        The broker refuses the second copy, but one that was started again has forgotten the ids of finished requests.
        """
        message = _answer_in(data)
        if message is None or message.id != self.envelope.id:
            return False
        failed = isinstance(message, ErrorAnswer) and message.error.code is ErrorCode.ENGINE_FAILED
        if failed and self.envelope.move is not None:
            # Replayed from the dead letters, to be answered again; it may have moved on since.
            return False
        return abs(self.envelope.created - message.created) < DUPLICATE_WINDOW_S

    async def _forward(self, data: bytes) -> None:
        if not self.holds_lease():
            raise LeaseLost
        try:
            await self.check_reply_to()
        except HeadraceError as error:
            log.warning("%s: %s; the answer stands in the record only", self.envelope.id, error)
        target = self.envelope.reply_to
        if target is None:
            return
        if self._forwarded is None:
            await self.bus.publish(target, data)
            return
        try:
            await self._forwarded.append(data)
        except _Taken:
            log.warning("%s: somebody else wrote to %s; the rest stands in the record only", self.envelope.id, target)
            self.envelope = replace(self.envelope, reply_to=None)


def _answer_in(data: bytes) -> Answer | None:
    try:
        return decode_answer(data)
    except msgspec.DecodeError:
        return None


def _id_of(data: bytes) -> str | None:
    message = _answer_in(data)
    return None if message is None else message.id
