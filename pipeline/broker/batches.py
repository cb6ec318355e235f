"""Batches on the broker: orders, cancels, states, and the journals of results.

The stream `LLM_BATCH` keeps each part of a batch on a subject of its own. The gateway or a command writes the order and
the cancel. The process that leads the role `batches` writes the others. Each of its writes names the sequence of the
last message on the subject, so of two processes that take themselves for the leader one is refused.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from pipeline.broker.connection import Message
from pipeline.broker.jetstream import Bus, Fenced
from pipeline.wire.batches import BatchObject, BatchOrder, BatchPart, BatchStatus, part_subject
from pipeline.wire.subjects import LINE, STORED_SEQUENCE, STREAM_BATCH

_ROLLUP = {"Nats-Rollup": "sub"}
# Of a journal, read at once.
_READ_BYTES = 1 << 20
_order_decoder = msgspec.json.Decoder(BatchOrder)
_batch_decoder = msgspec.json.Decoder(BatchObject)


class NewOrder(NamedTuple):
    """An order and its sequence in the stream."""

    sequence: int
    order: BatchOrder


@dataclass(slots=True)
class Journal:
    """One part of a batch with one writer.

    Args:
        bus: the connection.
        subject: of the part.
    """

    bus: Bus
    subject: str
    _last: int = field(init=False, default=0)

    async def entries(self) -> AsyncIterator[tuple[int, bytes]]:
        """Everything written so far, oldest first, as (number of the line, message). What follows is written after it.

        Raises:
            Unreachable: the broker does not answer.
        """
        start = 1
        while found := await self._batch(start):
            for message in found:
                self._last = int(message.headers[STORED_SEQUENCE])
                yield int(message.headers.get(LINE, 0)), message.data
            start = self._last + 1

    async def append(self, data: bytes, number: int) -> None:
        """Write the result of a line.

        Raises:
            Fenced: another process wrote to the part.
            BusError: the broker did not store it.
        """
        await self._write(data, {LINE: str(number)})

    async def replace(self, data: bytes) -> None:
        """Write a message in place of all that were written before; raises as `append`."""
        await self._write(data, _ROLLUP)

    async def latest(self) -> bytes | None:
        """The last message, or None; raises as `entries`. What follows is written after it."""
        found = await self.bus.last_message(STREAM_BATCH, self.subject)
        self._last, data = found or (0, None)
        return data

    async def clear(self) -> None:
        """Remove everything; raises as `entries`."""
        if (found := await self.bus.last_message(STREAM_BATCH, self.subject)) is not None:
            await self.bus.purge(STREAM_BATCH, self.subject, up_to=found[0])

    async def _write(self, data: bytes, headers: dict[str, str]) -> None:
        try:
            self._last = await self.bus.store(self.subject, data, headers=headers, expected_last=self._last)
        except Fenced:
            # If the reply to a write was lost, its repetition is refused, and the write is the last one.
            found = await self.bus.last_message(STREAM_BATCH, self.subject)
            if found is None or found[0] <= self._last or found[1] != data:
                raise
            self._last = found[0]

    async def _batch(self, start: int) -> list[Message]:
        return await self.bus.batch(STREAM_BATCH, self.subject, start, max_bytes=_READ_BYTES)


@dataclass(frozen=True, slots=True)
class BatchStore:
    """The batches on a broker."""

    bus: Bus

    def journal(self, batch_id: str, part: BatchPart) -> Journal:
        """One part of a batch, for its writer."""
        return Journal(self.bus, part_subject(batch_id, part))

    async def create(self, order: BatchOrder) -> None:
        """Store a new batch.

        Raises:
            BusError: the broker did not store it.
        """
        await self.journal(order.id, BatchPart.ORDER).replace(msgspec.json.encode(order))

    async def cancel(self, batch_id: str) -> None:
        """Ask for a batch to be cancelled; raises as `create`. Twice is harmless."""
        if not await self.is_cancelled(batch_id):
            await self.journal(batch_id, BatchPart.CANCEL).replace(b"{}")

    async def is_cancelled(self, batch_id: str) -> bool:
        """Whether a batch was cancelled."""
        return await self.bus.last_message(STREAM_BATCH, part_subject(batch_id, BatchPart.CANCEL)) is not None

    async def orders(self, start: int = 1) -> AsyncIterator[NewOrder]:
        """The orders from a sequence of the stream, oldest first.

        Raises:
            Unreachable: the broker does not answer.
        """
        subject = part_subject("*", BatchPart.ORDER)
        while found := await self.bus.batch(STREAM_BATCH, subject, start, max_bytes=_READ_BYTES):
            for message in found:
                start = int(message.headers[STORED_SEQUENCE]) + 1
                yield NewOrder(start - 1, _order_decoder.decode(message.data))

    async def order(self, batch_id: str) -> BatchOrder | None:
        """The order of a batch, or None if there is no such batch; raises as `orders`."""
        found = await self.bus.last_message(STREAM_BATCH, part_subject(batch_id, BatchPart.ORDER))
        return None if found is None else _order_decoder.decode(found[1])

    async def show(self, order: BatchOrder) -> BatchObject:
        """A batch as it stands; raises as `orders`."""
        found = await self.bus.last_message(STREAM_BATCH, part_subject(order.id, BatchPart.STATE))
        batch = order.begun() if found is None else _batch_decoder.decode(found[1])
        if not batch.status.is_final and batch.status is not BatchStatus.FINALIZING:
            batch.status = BatchStatus.CANCELLING if await self.is_cancelled(order.id) else batch.status
        return batch


def decode_batch(data: bytes) -> BatchObject:
    """A batch as it was stored."""
    return _batch_decoder.decode(data)
