"""Writing a request's record: fenced, forwarded where it was asked for, and closed exactly once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import msgspec

from pipeline.bus import Bus, Delivery, Fenced
from pipeline.core.delivery import Envelope
from pipeline.errors import ErrorCode, HeadraceError
from pipeline.messages import Answer, Last, decode_answer, encode
from pipeline.subjects import REPLY_TO, STREAM_REPLIES, out_subject, reply_subject

log = logging.getLogger(__name__)

_TRIES = 3


class LeaseLost(Exception):
    """The request is not ours any more: somebody else goes on with it, and nothing may be written or acknowledged."""


@dataclass(slots=True)
class RecordWriter:
    """Appends to the record of one request as long as the request is ours.

    Every message carries the sequence that must be the record's last. Whoever was taken for dead and wakes up is
    refused by the stream, and readers never see what was refused. One writer: the task that serves the request.

    Args:
        bus: the connection.
        envelope: the request's.
        holds_lease: whether the request is still ours, as far as this process knows.
        last_sequence: of the record's last message, 0 where there is none.
    """

    bus: Bus
    envelope: Envelope
    holds_lease: Callable[[], bool]
    last_sequence: int = 0
    _unconfirmed: bytes = field(init=False, default=b"")
    _forward_last: int | None = field(init=False, default=None)

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
        if not self.holds_lease():
            raise LeaseLost
        await self._forward(last)
        await delivery.ack()

    async def check_reply_to(self) -> None:
        """See that the `Reply-To`, where it is another record's subject, does not belong to another request.

        Raises:
            HeadraceError: `reply_subject_denied`.
        """
        target = self.envelope.reply_to
        if target is None or not target.startswith("llm.reply."):
            return
        found = await self.bus.last_message(STREAM_REPLIES, target)
        if found is not None and not self._is_ours(found[1]):
            self.envelope = replace(self.envelope, reply_to=None)
            raise HeadraceError(
                ErrorCode.REPLY_SUBJECT_DENIED, f"{target} holds another request's answer", param=REPLY_TO
            )
        self._forward_last = 0 if found is None else found[0]

    async def _append(self, data: bytes) -> None:
        if not self.holds_lease():
            raise LeaseLost
        # A cancellation, or an absent broker, may have left the message before this one stored or not.
        interrupted, self._unconfirmed = self._unconfirmed, data
        for _ in range(_TRIES):
            try:
                self.last_sequence = await self.bus.store(
                    out_subject(self.envelope.id), data, expected_last=self.last_sequence
                )
                break
            except Fenced:
                if await self._catch_up(interrupted) == data:
                    break
        else:
            raise LeaseLost
        self._unconfirmed = b""

    async def _catch_up(self, interrupted: bytes) -> bytes | None:
        """Learn the record's last sequence after a refusal, if the record is still ours.

        Returns:
            The last message, None where there is none.

        Raises:
            LeaseLost: the last message is another attempt's.
        """
        subject = reply_subject(self.envelope.id)
        self.last_sequence, data = await self.bus.last_message(STREAM_REPLIES, subject) or (0, None)
        if data is None or data in (interrupted, self._unconfirmed):
            return data
        if self._is_ours(data):
            raise LeaseLost
        # An older request had this id; its answer makes way.
        await self.bus.purge(STREAM_REPLIES, subject)
        self.last_sequence = 0
        return None

    def _is_ours(self, data: bytes) -> bool:
        """Whether a message belongs to this request, and not to an older one under the same id or another one."""
        try:
            message = decode_answer(data)
        except msgspec.DecodeError:
            return False
        return message.id == self.envelope.id and message.created == self.envelope.created

    async def _forward(self, data: bytes) -> None:
        target = self.envelope.reply_to
        if target is None:
            return
        if self._forward_last is None:
            await self.bus.publish(target, data)
            return
        try:
            out = out_subject(target.removeprefix("llm.reply."))
            self._forward_last = await self.bus.store(out, data, expected_last=self._forward_last)
        except Fenced:
            log.warning("%s: somebody else wrote to %s; the rest stands in the record only", self.envelope.id, target)
            self._forward_last = None
            self.envelope = replace(self.envelope, reply_to=None)
