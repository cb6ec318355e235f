"""Reads the headers of a long stream, five times as fast as `Bus.scan`, and does not keep the bodies.

A consumer with `headers_only` is not possible: a work queue allows no second consumer of a subject (nats-server 2.15
refuses it with the errors 10098 to 10100). Batched direct get (NATS ADR-31) sends the bodies too; they are dropped on
arrival.
"""

from __future__ import annotations

import asyncio
import re

import msgspec
import nats.errors

from pipeline.broker.connection import REQUEST_TIMEOUT_S, Message, Unreachable, what
from pipeline.broker.jetstream import Bus, Stored, to_stored
from pipeline.wire.subjects import with_known_names

# Other messages on the connection wait while a batch is received, a few milliseconds.
BATCH_MESSAGES = 500
BATCH_BYTES = 1 << 20

_STATUS = re.compile(rb"NATS/1\.0 +([0-9]{3})")
_END_OF_BATCH = (b"204", b"404")


async def read_heads(
    bus: Bus, stream: str, start: int, *, messages: int = BATCH_MESSAGES, max_bytes: int = BATCH_BYTES
) -> list[bytes]:
    """Return the headers of the messages of a stream from sequence start on, for `to_head`; none at the end.

    Args:
        bus: the connection.
        stream: the stream's name.
        start: the first sequence.
        messages: the most messages.
        max_bytes: the most bytes, bodies included, but at least one message.

    Raises:
        Unreachable: the stream does not answer.
    """
    body = {"seq": start, "next_by_subj": ">", "batch": messages, "max_bytes": max_bytes}
    try:
        heads, ended_with = await _get_batch(bus, stream, msgspec.json.encode(body))
    except (nats.errors.Error, TimeoutError) as error:
        raise Unreachable(f"{stream} does not answer: {what(error)}") from error
    if ended_with not in _END_OF_BATCH:
        raise Unreachable(f"{stream} does not answer: status {ended_with.decode()}")
    return heads


async def _get_batch(bus: Bus, stream: str, body: bytes) -> tuple[list[bytes], bytes]:
    """The headers of the messages of one batch, and the status that ended it."""
    inbox, heads = bus.nc.new_inbox(), list[bytes]()
    status: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def take(head: bytes, _: bytes) -> None:
        found = _STATUS.match(head)
        if found is None:
            heads.append(head)
        elif not status.done():
            status.set_result(found[1])

    subscription = await bus.nc.subscribe(inbox)
    bus.nc.takers[subscription._id] = take  # noqa: SLF001 - the client's number of it
    try:
        await bus.nc.publish(f"$JS.API.DIRECT.GET.{stream}", body, reply=inbox)
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            return heads, await status
    finally:
        bus.nc.takers.pop(subscription._id, None)  # noqa: SLF001 - as above
        await bus.unsubscribe(subscription)


async def readable(bus: Bus, stream: str) -> set[int]:
    """The sequences of the messages of a stream that the broker can read. It skips one whose checksum is wrong.

    Raises:
        Unreachable: the stream does not answer.
    """
    found: set[int] = set()
    start = 1
    while heads := await read_heads(bus, stream, start):
        sequences = [to_head(head).sequence for head in heads]
        found.update(sequences)
        start = sequences[-1] + 1
    return found


def to_head(head: bytes) -> Stored:
    """Parse the headers of a stored message, as the broker sent them, to a message without a body.

    Raises:
        KeyError, ValueError: the broker's own headers are not among them.
    """
    # latin-1 decodes any byte. No header that is used here may have a value beyond ASCII.
    headers = {}
    for line in head.decode("latin-1").split("\r\n"):
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip()] = value.strip()
    return to_stored(Message("", b"", with_known_names(headers), ""))
