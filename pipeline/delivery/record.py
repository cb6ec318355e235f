"""Writing a request's record: under the fence, and copied to the request's `Reply-To`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

from pipeline.broker.jetstream import Bus, Fenced
from pipeline.core.envelope import Envelope
from pipeline.wire.answers import ErrorAnswer, read_answer
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.subjects import DUPLICATE_WINDOW_S, REPLY_TO, STREAM_REPLIES, out_subject, reply_subject

log = logging.getLogger(__name__)

# A refused message is stored behind one of ours whose acknowledgement was lost. Another such message may still be on
# its way, and be stored in between.
_TRIES = 3


class Superseded(Exception):
    """Another attempt writes this record. This one must neither write nor acknowledge anything more."""


class Duplicate(Exception):
    """The record belongs to another copy of the same request, which was published twice within two minutes."""


class _Taken(Exception):
    """The last message on the subject is not ours. The writer decides what that means."""

    def __init__(self, sequence: int, data: bytes) -> None:
        super().__init__(sequence)
        self.sequence = sequence
        self.data = data


@dataclass(slots=True)
class _Tail:
    """The end of what `LLM_REPLIES` holds under one name, to which one writer appends.

    Attributes:
        last_sequence: of the last message, 0 where there is none.
        last_data: that message, where it is known; it is not appended again.
        older_up_to: the last sequence that belongs to an older request under the same id, 0 where there is none.
    """

    bus: Bus
    name: str
    last_sequence: int = 0
    last_data: bytes = b""
    older_up_to: int = 0
    _unconfirmed: list[bytes] = field(init=False, default_factory=list)

    async def append(self, data: bytes) -> None:
        """Append data. It is unknown whether the messages of interrupted calls before this one were stored.

        Raises:
            _Taken: another process has written.
            Unreachable: the broker is away for too long.
        """
        if data == self.last_data:
            return
        self._unconfirmed.append(data)
        subject = out_subject(self.name)
        for _ in range(_TRIES):
            try:
                self.last_sequence = await self.bus.store(subject, data, expected_last=self.last_sequence)
                break
            except Fenced:
                if await self._catch_up() == data:
                    break
        else:
            raise _Taken(self.last_sequence, b"")
        self.last_data = data
        self._unconfirmed.clear()
        await self._purge_older()

    async def _catch_up(self) -> bytes | None:
        """Learn the last sequence after a refusal. Returns the last message of an answer, None where there is none."""
        sequence, data = await self.bus.last_answer(reply_subject(self.name)) or (0, None)
        if data is not None and data != self.last_data and data not in self._unconfirmed:
            raise _Taken(sequence, data)
        self.last_sequence = sequence
        if data is None:
            # Whatever is there is no part of an answer.
            self.older_up_to = sequence
        return data

    async def _purge_older(self) -> None:
        """Purge the previous request's messages, only after the first new one is stored.

        An empty subject would accept a write from a stalled worker that still expects sequence 0.
        """
        if self.older_up_to:
            await self.bus.purge(STREAM_REPLIES, reply_subject(self.name), up_to=self.older_up_to)
            self.older_up_to = 0


@dataclass(slots=True)
class RecordWriter:
    """Appends to the record of one request, and copies what is stored to its `Reply-To`.

    Each message carries the sequence that must be the record's last. The stream refuses a worker that was taken for
    dead and wakes up, and readers never see what it refused. One writer: the `Held` of the request.

    Attributes:
        envelope: the request's; its `reply_to` is None once that place has turned out to be another request's.
        last_sequence: of the record's last message, 0 where there is none.
    """

    bus: Bus
    envelope: Envelope
    _record: _Tail = field(init=False)
    _forwarded: _Tail | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._record = _Tail(self.bus, self.envelope.name)

    @property
    def last_sequence(self) -> int:
        """Of the record's last message, 0 where there is none."""
        return self._record.last_sequence

    @last_sequence.setter
    def last_sequence(self, sequence: int) -> None:
        self._record.last_sequence = sequence

    async def append(self, data: bytes) -> None:
        """Append an encoded message.

        Cancelling is safe: the next call finds out whether this message was stored.

        Raises:
            Superseded: another attempt has written.
            Duplicate: another copy of the request has written.
            Unreachable: the broker is away for too long; as after a cancellation.
        """
        try:
            await self._record.append(data)
        except _Taken as taken:
            if not taken.data or self._is_ours(taken.data):
                raise Superseded from None
            if self._repeats(taken.data):
                raise Duplicate from None
            # An older request under the same id: its answer makes way.
            self._record.last_sequence = self._record.older_up_to = taken.sequence
            await self.append(data)

    async def forward(self, data: bytes) -> None:
        """Copy a message that the record holds to the request's `Reply-To`, if it has one.

        Raises:
            Duplicate: as `check_reply_to`.
            Unreachable: the broker is away for too long.
        """
        try:
            await self.check_reply_to()
        except HeadraceError as error:
            log.warning("%s: the answer is stored in its record only: %s", self.envelope.name, error)
        target = self.envelope.reply_to
        if target is None:
            return
        if self._forwarded is None:
            await self.bus.publish(target, data)
            return
        try:
            await self._forwarded.append(data)
        except _Taken:
            log.warning(
                "%s: the rest is stored in its record only: another request writes to %s", self.envelope.name, target
            )
            self.envelope = replace(self.envelope, reply_to=None)

    async def check_reply_to(self) -> None:
        """See that a `Reply-To` which is another record's subject does not belong to another request.

        Raises:
            HeadraceError: `reply_subject_denied`.
            Duplicate: another copy of this request has been answered there.
        """
        target = self.envelope.reply_to
        if target is None or not target.startswith("llm.reply.") or self._forwarded is not None:
            return
        sequence, last = await self.bus.last_answer(target) or (0, None)
        if last is not None and _id_of(last) != self.envelope.id:
            self.envelope = replace(self.envelope, reply_to=None)
            message = f"{target} holds the answer of another request. Use a subject of your own."
            raise HeadraceError(ErrorCode.REPLY_SUBJECT_DENIED, message, param=REPLY_TO)
        self._forwarded = _Tail(self.bus, target.removeprefix("llm.reply."), sequence, last or b"")
        if last is None or not self._is_ours(last):
            if last is not None and self._repeats(last):
                raise Duplicate
            # An older request under the same id: its answer makes way here as it does in the record.
            self._forwarded.older_up_to = sequence

    def _is_ours(self, data: bytes) -> bool:
        """Whether a message belongs to this request, and not to an older one under the same id or to another one."""
        message = read_answer(data)
        return message is not None and (message.id, message.created) == (self.envelope.id, self.envelope.created)

    def _repeats(self, data: bytes) -> bool:
        """Whether a message belongs to another copy of this request, published while the same id is the same request.

        The broker refuses a second copy, except after a restart: then it has forgotten the ids of finished requests.
        """
        message = read_answer(data)
        if message is None or message.id != self.envelope.id:
            return False
        ended = message.error.code if isinstance(message, ErrorAnswer) else None
        if ended is ErrorCode.ENGINE_FAILED and self.envelope.move is not None:
            # Replayed from the dead letters, to be answered again; it may have moved on since.
            return False
        if ended is ErrorCode.CANCELLED and self.envelope.anew:
            return False
        return abs(self.envelope.created - message.created) < DUPLICATE_WINDOW_S


def _id_of(data: bytes) -> str | None:
    message = read_answer(data)
    return None if message is None else message.id
