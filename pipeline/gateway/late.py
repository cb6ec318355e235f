"""Reading an answer late, or again, by request-reply: for users who cannot read the stream of answers themselves.

`llm.queue.answer` is for the default tenant, `llm.queue.answer.t.<tenant>` for a tenant. The broker's permissions say
who can ask there.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from pipeline.broker.connection import BusError
from pipeline.broker.jetstream import Bus
from pipeline.wire.answers import read_answer
from pipeline.wire.messages import LateAnswer, LateMessage, LateQuery, encode
from pipeline.wire.subjects import (
    QUEUE_ANSWER,
    QUEUE_ANSWER_OF_TENANT,
    STORED_SEQUENCE,
    STREAM_REPLIES,
    is_request_id,
    is_tenant,
    reply_subject,
    request_name,
)
from pipeline.wire.validation import UNREADABLE

# What one reply has at most, unless its only message is larger.
_MAX_BYTES = 1 << 20
# Of a reply, beside its messages.
_FRAME_BYTES = 64 << 10

_query_decoder = msgspec.json.Decoder(LateQuery)


@dataclass(slots=True)
class LateAnswers:
    """Replies with the messages that the stream keeps of a request.

    Args:
        bus: the connection.
    """

    bus: Bus

    async def start(self) -> None:
        """Begin to reply, until the connection ends. Several gateways share the requests."""
        endpoints = {QUEUE_ANSWER: self._read, QUEUE_ANSWER_OF_TENANT: self._read}
        await self.bus.serve("headrace-answers", "The messages kept of an answer", endpoints)

    async def _read(self, subject: str, body: bytes) -> bytes:
        tenant = subject.removeprefix(QUEUE_ANSWER).removeprefix(".t.")
        query = _query(body)
        if not is_request_id(query.id) or (tenant and not is_tenant(tenant)):
            return encode(LateAnswer(query.id[:128], []))
        kept = reply_subject(request_name(tenant, query.id))
        found = []
        for message in await self.bus.batch(STREAM_REPLIES, kept, max(0, query.after) + 1, max_bytes=_MAX_BYTES):
            sequence = int(message.headers[STORED_SEQUENCE])
            if len(message.data) > self.bus.nc.max_payload - _FRAME_BYTES:
                raise BusError(f"The message at sequence {sequence} is too large for a reply. Read it by a direct get.")
            if read_answer(message.data) is not None:
                found.append(LateMessage(sequence, msgspec.Raw(message.data)))
        return encode(LateAnswer(query.id, found))


def _query(body: bytes) -> LateQuery:
    """The query in a body: a JSON object, or the id alone."""
    try:
        return _query_decoder.decode(body)
    except UNREADABLE:
        return LateQuery(body.decode(errors="replace").strip().strip('"'))
