"""Core request-reply: `nats req llm.ask.high 'Why is the sky blue?'` is answered by one message; nothing to set up."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from uuid import uuid4

from pipeline.broker.asker import Asker
from pipeline.broker.connection import BusError, Message
from pipeline.broker.jetstream import Bus, LaneFull, Stored
from pipeline.core.answer import error_answer
from pipeline.core.envelope import read_envelope
from pipeline.telemetry import Tracing
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import encode, is_last
from pipeline.wire.subjects import ASK, MSG_ID, REPLY_TO, Lane, Priority, Task

log = logging.getLogger(__name__)

_GROUP = "headrace-ask"
# An asker waits for seconds; what cannot be stored by then is better refused.
_PATIENCE_S = 2.0
# Nobody waits longer on an inbox, and the record is kept no longer.
_FOLLOW_S = 600.0


@dataclass(slots=True)
class Ask:
    """Puts core requests on the same queue as everything else, with their reply subject in `Reply-To`.

    One that repeats another's id within two minutes is the same request: it is told what the record of that one says.
    """

    bus: Bus
    tracing: Tracing
    client: Asker
    _followers: set[asyncio.Task[None]] = field(init=False, default_factory=set)

    async def start(self) -> None:
        """Listen. Call once; several gateways share the requests."""
        await self.bus.subscribe(ASK, self._on_ask, queue=_GROUP)

    async def _on_ask(self, message: Message) -> None:
        if not message.reply:
            log.info("%s came without a reply subject: nobody could read the answer", message.subject)
            return
        headers = {MSG_ID: uuid4().hex, **message.headers, REPLY_TO: message.reply}
        error = await self._store(message, headers)
        if error is not None:
            unstored = Stored(message.subject, 0, self.bus.clock.wall(), headers, message.data)
            envelope = read_envelope(unstored, Priority.HIGH)
            await self.bus.publish(message.reply, encode(error_answer(envelope, error)))

    async def _store(self, message: Message, headers: dict[str, str]) -> HeadraceError | None:
        """Put the request on its lane. Returns what the asker is to be told where that fails."""
        name = message.subject.removeprefix("llm.ask.")
        try:
            subject = Lane(Priority(name), Task.UNTRIAGED).subject
        except ValueError:
            return HeadraceError(ErrorCode.INVALID_REQUEST, f"no priority {name[:40]!r}: ask high, medium or low")
        with self.tracing.publish(subject, headers, request_id=headers[MSG_ID]):
            try:
                ack = await self.bus.put(subject, message.data, headers=headers, patience_s=_PATIENCE_S)
            except LaneFull:
                return HeadraceError(ErrorCode.QUEUE_FULL, f"the lane {subject} is full: try again later")
            except BusError as error:
                return HeadraceError(ErrorCode.UNAVAILABLE, f"the request could not be stored: {error}")
        if ack.duplicate:
            follower = asyncio.get_running_loop().create_task(self._follow(headers[MSG_ID], message.reply))
            self._followers.add(follower)
            follower.add_done_callback(self._followers.discard)
        return None

    async def _follow(self, request_id: str, reply: str) -> None:
        """Pass the record of a request on, up to its last message."""
        try:
            async with asyncio.timeout(_FOLLOW_S), await self.client.read(request_id) as record:
                ended = False
                while not ended:
                    entry = await record.next()
                    await self.bus.publish(reply, entry.data)
                    ended = is_last(entry.answer)
        except (BusError, TimeoutError) as error:
            log.info("%s: who asked again is not told the answer: %s", request_id, error)
