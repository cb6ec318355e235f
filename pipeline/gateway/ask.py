"""Core request-reply: `nats req llm.ask.high 'Why is the sky blue?'` is answered by one message; nothing to set up."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from uuid import uuid4

from pipeline.bus import Bus, BusError, LaneFull, Message
from pipeline.core.delivery import error_answer, read_envelope
from pipeline.errors import ErrorCode, HeadraceError
from pipeline.messages import encode
from pipeline.subjects import ASK, MSG_ID, REPLY_TO, Lane, Priority, Task
from pipeline.telemetry import Tracing

log = logging.getLogger(__name__)

_GROUP = "headrace-ask"
# An asker waits for seconds; what cannot be stored by then is better refused.
_PATIENCE_S = 2.0


@dataclass(slots=True)
class Ask:
    """Puts core requests on the same queue as everything else, with their reply subject in `Reply-To`."""

    bus: Bus
    tracing: Tracing

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
            envelope = read_envelope(
                headers, priority=Priority.HIGH, task=Task.UNTRIAGED, sequence=0, stored_at=time.time(), delivered=1
            )
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
                await self.bus.store(subject, message.data, headers=headers, patience_s=_PATIENCE_S)
            except LaneFull:
                return HeadraceError(ErrorCode.QUEUE_FULL, f"the lane {subject} is full: try again later")
            except BusError as error:
                return HeadraceError(ErrorCode.UNAVAILABLE, f"the request could not be stored: {error}")
        return None
