"""Core request-reply: `nats req --timeout 2m llm.ask.high 'What is NATS?'` gets one answer, without any set-up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from uuid import uuid4

from pipeline.aio import Background
from pipeline.broker.asker import Asker
from pipeline.broker.connection import BusError, Message
from pipeline.broker.jetstream import Bus, LaneFull, Stored
from pipeline.broker.peers import Peers
from pipeline.core.answer import error_answer
from pipeline.core.envelope import Envelope, read_envelope
from pipeline.gateway.intake import refused_by_store, refused_by_tenants
from pipeline.telemetry import Tracing
from pipeline.wire.answers import is_last
from pipeline.wire.errors import ErrorCode, HeadraceError, quoted
from pipeline.wire.messages import encode
from pipeline.wire.subjects import (
    ASK,
    MSG_ID,
    REPLY_TO,
    TENANT_ADVICE,
    Lane,
    Priority,
    Task,
    generated_id,
    is_generated_id,
    is_imported,
    is_inbox,
    is_request_id,
    is_tenant,
    request_name,
    split_name,
    tenant_of,
)

log = logging.getLogger(__name__)

_GROUP = "headrace-ask"
# A core request waits for seconds only, so one that cannot be stored within this time is refused.
_PATIENCE_S = 2.0
# The record is kept this long.
_FOLLOW_S = 600.0


@dataclass(slots=True)
class Ask:
    """Puts core requests on the queue, with their reply subject in `Reply-To`.

    A second request with the same id within two minutes is the same request: it gets the messages of its record.
    """

    bus: Bus
    tracing: Tracing
    client: Asker
    peers: Peers
    tenants_max_messages: int
    _followers: Background = field(init=False, default_factory=Background)

    async def start(self) -> None:
        """Subscribe. Call once. Several gateways share the requests."""
        await self.bus.subscribe(f"{ASK}.*", self._on_ask, queue=_GROUP)
        await self.bus.subscribe(f"{ASK}.*.t.*", self._on_ask, queue=_GROUP)

    async def _on_ask(self, message: Message) -> None:
        if not is_inbox(message.reply):
            log.info("Ignoring a request on %s: its reply subject is not an inbox", message.subject)
            return
        headers = {
            MSG_ID: request_name(tenant_of(message.subject), uuid4().hex),
            **message.headers,
            REPLY_TO: message.reply,
        }
        if (name := _name(headers, tenant_of(message.subject))) is not None:
            # The broker compares ids with those of all tenants. Names of two tenants are never equal.
            headers[MSG_ID] = name
        if is_imported(message.reply):
            # Only the account of this process can reply there; that of an engine cannot.
            del headers[REPLY_TO]
        unstored = Stored(message.subject, 0, self.bus.clock.wall(), headers, message.data)
        envelope = read_envelope(unstored, Priority.HIGH, moves=self.bus.moves)
        error = await self._store(message, headers, envelope)
        if error is not None:
            await self.bus.publish(message.reply, encode(error_answer(envelope, error)))

    async def _store(self, message: Message, headers: dict[str, str], envelope: Envelope) -> HeadraceError | None:
        """Put the request on its lane. Returns the error for the client, or None."""
        try:
            lane = _lane_of(message.subject)
        except HeadraceError as error:
            return error
        full = refused_by_store(self.peers.store()) or refused_by_tenants(
            self.peers.load("mlx"), lane.priority, lane.tenant, self.tenants_max_messages
        )
        if full is not None and MSG_ID not in message.headers:
            return full
        with self.tracing.publish(lane.subject, headers, request_id=headers[MSG_ID]) as span:
            try:
                before = await self._before(headers, message)
                ack = await self.bus.put(lane.subject, message.data, headers=headers, patience_s=_PATIENCE_S)
            except LaneFull as error:
                refusal = HeadraceError(ErrorCode.QUEUE_FULL, f"{error}. Retry later.")
                span.fail(refusal)
                return refusal
            except BusError as error:
                refusal = HeadraceError(
                    ErrorCode.UNAVAILABLE, f"The request could not be stored: {error}. Retry later."
                )
                span.fail(refusal)
                return refusal
        name = _name(headers, lane.tenant)
        if ack.duplicate and name is None:
            # It is no copy of a request of this tenant, and a worker never sees it.
            return envelope.fault
        if ack.duplicate or is_imported(message.reply):
            name = name or request_name(lane.tenant, generated_id(ack.sequence))
            following = self._follow(name, message.reply, after=0 if ack.duplicate else before)
            self._followers.start(following, what=f"following request {name}")
        return None

    async def _before(self, headers: dict[str, str], message: Message) -> int:
        """The last sequence of an older answer under an id that the client chose; 0 if that does not matter."""
        name = _name(headers, tenant_of(message.subject))
        if not is_imported(message.reply) or MSG_ID not in message.headers or name is None:
            return 0
        last = await self.client.last(name)
        return 0 if last is None else last.sequence

    async def _follow(self, name: str, reply: str, *, after: int) -> None:
        """Forward the record of a request after a sequence, up to its last message."""
        try:
            async with asyncio.timeout(_FOLLOW_S), await self.client.read(name, after=after) as record:
                ended = False
                while not ended:
                    entry = await record.next()
                    await self.bus.publish(reply, entry.data)
                    ended = is_last(entry.answer)
        except (BusError, TimeoutError) as error:
            log.info("Request %s: the request at %s gets no answer: %s", name, reply, error)


def _lane_of(subject: str) -> Lane:
    """The lane of a question's subject.

    Raises:
        HeadraceError: `invalid_request`.
    """
    priority, tenant = subject.split(".")[2], tenant_of(subject)
    if tenant and not is_tenant(tenant):
        raise HeadraceError(ErrorCode.INVALID_REQUEST, f"{quoted(tenant, 64)} is not a valid tenant. {TENANT_ADVICE}")
    try:
        return Lane(Priority(priority), Task.UNTRIAGED, tenant)
    except ValueError:
        message = f"Unknown priority {quoted(priority, 40)}. Use high, medium or low."
        raise HeadraceError(ErrorCode.INVALID_REQUEST, message) from None


def _name(headers: Mapping[str, str], tenant: str) -> str | None:
    """The name of the request with these headers in a tenant's lane; None if its id is not valid."""
    named, request_id = split_name(headers[MSG_ID])
    is_valid = named in ("", tenant) and is_request_id(request_id) and not is_generated_id(request_id)
    return request_name(tenant, request_id) if is_valid else None
