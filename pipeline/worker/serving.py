"""One delivery from start to end: read what stands in the record, refuse or generate, close the record."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.broker.connection import Delivery, Unreachable
from pipeline.broker.jetstream import Bus
from pipeline.config import Config
from pipeline.core.answer import Answer, Record, decide, error_answer, expired
from pipeline.core.ending import ended_event
from pipeline.core.envelope import Envelope
from pipeline.core.letters import letter_headers
from pipeline.delivery.lease import Lease, LeaseKeeper
from pipeline.delivery.move import give_back, times_given_back
from pipeline.delivery.record import LeaseLost, RecordWriter, Repeated
from pipeline.engine import Engine, Generation, Work
from pipeline.telemetry import ChatSpan, ProcessSpan, Tracing
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import Completion, EmbeddingList, EngineName, EventKind, RequestEvent, Success, encode
from pipeline.wire.requests import ChatRequest, EmbeddingRequest, Request, decode_request
from pipeline.wire.subjects import DEAD, EVENT, STREAM_REPLIES, reply_subject

log = logging.getLogger(__name__)

# A request that failed for no reason of its own comes again after this long, or to somebody else.
RETRY_DELAY_S = 0.5
_MOST_DOUBLINGS = 6
# What the largest message has besides its body.
_HEADERS_BYTES = 4096


class Elsewhere(Protocol):
    """Where a request may go that this engine cannot serve."""

    async def offer(self, delivery: Delivery, envelope: Envelope, request: Request, error: HeadraceError) -> bool:
        """Move the request if another engine can serve it. Returns whether it was moved and acknowledged."""
        ...


class HandedBack(Exception):
    """The worker is draining and its time is up: somebody else goes on."""


@dataclass(slots=True)
class Desk:
    """What every serving of one worker shares."""

    bus: Bus
    engine: Engine
    config: Config
    tracing: Tracing
    leases: LeaseKeeper
    elsewhere: Elsewhere
    on_slot_left: Callable[[], None]


@dataclass(slots=True)
class Serving:
    """One delivery being served. `run` ends it in exactly one way; `interrupt` ends it from outside.

    Attributes:
        cost_tokens: (prompt, output) tokens that the engine spent on it.
        in_slot: whether it takes up one of the engine's slots, or may yet.
    """

    desk: Desk
    delivery: Delivery
    envelope: Envelope
    reason: str
    cost_tokens: tuple[int, int] = (0, 0)
    in_slot: bool = True
    _interruption: Exception | None = field(init=False, default=None)
    _task: asyncio.Task[None] | None = field(init=False, default=None)
    _lease: Lease = field(init=False)

    def interrupt(self, why: Exception) -> None:
        """End the serving: with the error `why` for its reader, or handed back, or dropped where the lease is lost.

        Once a last message is being written it is too late. The first reason holds.
        """
        if self._interruption is None:
            self._interruption = why
            if self._task is not None:
                self._task.cancel()

    async def run(self) -> None:
        """Serve; what goes wrong ends in the record or in a redelivery."""
        self._lease = self.desk.leases.hold(self.delivery, lambda: self.interrupt(LeaseLost()))
        writer = RecordWriter(self.desk.bus, self.envelope, self._lease.holds)
        deadline = self._arm_deadline()
        try:
            await self._run(writer)
        except Repeated:
            log.info("%s: published twice; the other one is answered", self.envelope.id)
            await self.delivery.ack()
        except LeaseLost:
            log.info("%s: another worker has it; dropped", self.envelope.id)
        except HandedBack:
            await self._give_back()
        except Unreachable as error:
            log.warning("%s: %s; it comes again", self.envelope.id, error)
        finally:
            if deadline is not None:
                deadline.cancel()
            self.desk.leases.release(self._lease)

    def _arm_deadline(self) -> asyncio.TimerHandle | None:
        if self.envelope.deadline is None:
            return None
        left_s = self.envelope.deadline - self.desk.bus.clock.wall()
        return asyncio.get_running_loop().call_later(left_s, self.interrupt, expired()) if left_s > 0 else None

    async def _run(self, writer: RecordWriter) -> None:
        envelope, desk = self.envelope, self.desk
        record, tries = Record(), 1
        if envelope.delivered > 1 or envelope.move is not None:
            kept = await desk.bus.read_answers(reply_subject(envelope.id))
            record = Record.read(kept, envelope.created)
            tries = max(1, envelope.delivered - await times_given_back(desk.bus, self.delivery))
            writer.last_sequence = record.last_sequence
            if record.older_up_to:
                await desk.bus.purge(STREAM_REPLIES, reply_subject(envelope.id), up_to=record.older_up_to)
            if record.last_sequence:
                writer.newest = kept[-1][1]
        if record.last is not None:
            await writer.settle(encode(record.last), self.delivery)
            return
        attempt = max(tries, record.attempt + 1)
        with desk.tracing.process(
            self.delivery.message.subject,
            self.delivery.message.headers,
            request_id=envelope.id,
            priority=envelope.priority,
            task=envelope.task,
            attempt=attempt,
        ) as span:
            wall_now = desk.bus.clock.wall()
            span.queue_wait(envelope.stored_at, wall_now)
            try:
                decision = decide(envelope, tries=tries, max_attempts=desk.config.max_attempts, wall_now=wall_now)
                if early := self._interruption or decision:
                    raise early
                answer = await self._until_interrupted(self._complete(writer, record, attempt, span))
            except HeadraceError as error:
                span.fail(error)
                await self._fail(writer, error, attempt, span)
            else:
                if answer is not None:
                    await self._succeed(writer, answer)

    async def _until_interrupted(self, work: Coroutine[Any, Any, Success | None]) -> Success | None:
        """Do work, unless `interrupt` comes meanwhile."""
        self._task = asyncio.current_task()
        try:
            return await work
        except asyncio.CancelledError:
            if self._interruption is None or self._task is None:
                raise
            self._task.uncancel()
            raise self._interruption from None
        finally:
            self._task = None

    async def _complete(self, writer: RecordWriter, record: Record, attempt: int, span: ProcessSpan) -> Success | None:
        """Make the answer; None where another engine will."""
        request = decode_request(self.delivery.message.data, max_body_bytes=self.desk.config.max_body_bytes)
        await writer.check_reply_to()
        try:
            if isinstance(request, EmbeddingRequest):
                return await self._embed(request, attempt)
            return await self._generate(writer, request, record, attempt)
        except HeadraceError as error:
            if not self._lease.holds():
                raise LeaseLost from None
            if not await self.desk.elsewhere.offer(self.delivery, self.envelope, request, error):
                raise
            span.event("moved", reason=error.message)
            return None

    async def _generate(self, writer: RecordWriter, request: ChatRequest, record: Record, attempt: int) -> Completion:
        desk, envelope = self.desk, self.envelope
        model = desk.engine.resolve(request.wanted_model)
        answer = self._answer(model, attempt, record)
        if record.first_said and (first := await desk.bus.stored(STREAM_REPLIES, record.first_said)) is not None:
            answer.first_token_at = first.stored_at
        work = Work(
            envelope.id,
            request,
            model,
            seed=envelope.seed if request.seed is None else request.seed,
            resume_tokens=record.resumable_tokens if record.model == model else [],
            resume_text=record.text,
        )
        with desk.tracing.chat(request, request_id=envelope.id, engine=desk.engine.name, model=model) as chat:
            generation = await desk.engine.submit(work)
            try:
                await self._tell("started", wait_ms=answer.queue_ms)
                if request.streams:
                    await writer.forward_newest()
                    for opening in answer.openings():
                        await writer.write(opening)
                return await self._follow(generation, answer, writer, request, chat)
            finally:
                await self._leave_slot(generation)

    def _answer(self, model: str, attempt: int, record: Record) -> Answer:
        engine, wall_now = self.desk.engine, self.desk.bus.clock.wall()
        return Answer(self.envelope, engine.name, model, attempt, wall_now, self.reason, engine.simulated, record)

    async def _embed(self, request: EmbeddingRequest, attempt: int) -> EmbeddingList:
        desk, embedder = self.desk, self.desk.engine.embedder
        if embedder is None:
            raise HeadraceError(ErrorCode.MODEL_NOT_FOUND, f"{desk.engine.name} makes no embeddings", param="model")
        model = embedder.embedding_model(request.wanted_model)
        answer = self._answer(model, attempt, Record())
        with desk.tracing.embeddings(
            request, request_id=self.envelope.id, engine=desk.engine.name, model=model
        ) as span:
            await self._tell("started", wait_ms=answer.queue_ms)
            embedded = await embedder.embed(request, model)
            span.finish(embedded.prompt_tokens, model=model)
        self.cost_tokens = (embedded.prompt_tokens, 0)
        message = answer.embeddings(embedded, request.encoding_format, now=desk.bus.clock.wall())
        size, most = len(encode(message)), desk.bus.max_payload - _HEADERS_BYTES
        if size > most:
            raise HeadraceError(
                ErrorCode.REQUEST_TOO_LARGE,
                f"the embeddings of {len(request.texts)} texts have {size} bytes and an answer at most {most}: "
                "send fewer texts at once, or ask for `base64`",
                param="input",
            )
        return message

    async def _follow(
        self, generation: Generation, answer: Answer, writer: RecordWriter, request: ChatRequest, chat: ChatSpan
    ) -> Completion:
        """Turn pieces into chunks until the last one. While a chunk is being stored, what comes gathers in the next."""
        clock, waits_for_first = self.desk.bus.clock, True
        began_at = clock.now()
        while True:
            piece = await generation.next()
            if piece.finish_reason is not None:
                await self._leave_slot(generation)
            if piece.restarted:
                answer.attempt += piece.restarted
                if request.streams:
                    await writer.write(answer.status("restarted"))
            # An answer that is broken off has been paid for so far.
            self.cost_tokens = (0, self.cost_tokens[1] + len(piece.token_ids))
            chunk = answer.chunk(piece, clock.wall())
            if waits_for_first and (piece.text or piece.tool_calls):
                waits_for_first = False
                chat.first_chunk(clock.now() - began_at)
            if request.streams and chunk is not None:
                await writer.write(chunk)
            if piece.finish_reason is not None and piece.usage is not None:
                self.cost_tokens = (piece.usage.prompt_tokens, piece.usage.completion_tokens)
                chat.finish(piece.finish_reason, piece.usage, model=answer.model)
                return answer.completion(piece.finish_reason, piece.usage, now=clock.wall())

    async def _leave_slot(self, generation: Generation) -> None:
        """Let the next request begin while the end of this one, whole or broken off, is still being written."""
        await generation.close()
        self.in_slot = False
        self.desk.on_slot_left()

    async def _succeed(self, writer: RecordWriter, answer: Success) -> None:
        with self.desk.tracing.publish(reply_subject(self.envelope.id), request_id=self.envelope.id):
            await writer.close(answer, self.delivery)
        account = answer.headrace
        await self._tell(
            "done", wait_ms=account.queue_ms, ttft_ms=account.ttft_ms, total_ms=account.total_ms, reason=self.reason
        )

    async def _fail(self, writer: RecordWriter, error: HeadraceError, attempt: int, span: ProcessSpan) -> None:
        if error.code is ErrorCode.UNAVAILABLE:
            delay_s = RETRY_DELAY_S * 2 ** min(self.envelope.delivered - 1, _MOST_DOUBLINGS)
            await self._give_back(delay_s)
            return
        if error.code is ErrorCode.ENGINE_FAILED:
            await self._bury(error, attempt, span)
        await refuse(self.desk.bus, writer, self.delivery, error, engine=self.desk.engine.name)

    async def _give_back(self, delay_s: float = 0.0) -> None:
        if not self._lease.holds():
            # The broker would take it from whoever has it now.
            log.info("%s: another worker has it; not handed back", self.envelope.id)
            return
        await give_back(self.desk.bus, self.delivery, self.envelope, delay_s=delay_s)
        await self._tell("returned")

    async def _bury(self, error: HeadraceError, attempt: int, span: ProcessSpan) -> None:
        """Put the request among the dead letters, once, as it came and with what became of it."""
        delivered = self.delivery.message
        headers = letter_headers(
            self.envelope,
            delivered.headers,
            subject=delivered.subject,
            sequence=self.delivery.sequence,
            error=error,
            attempts=attempt,
            trace_id=span.trace_id or "",
        )
        await self.desk.bus.store(f"{DEAD}.{self.envelope.priority}", delivered.data, headers=headers)

    async def _tell(
        self,
        kind: EventKind,
        *,
        wait_ms: float | None = None,
        ttft_ms: float | None = None,
        total_ms: float | None = None,
        reason: str = "",
    ) -> None:
        envelope = self.envelope
        event = RequestEvent(
            id=envelope.id,
            kind=kind,
            priority=envelope.priority,
            engine=self.desk.engine.name,
            wait_ms=wait_ms,
            ttft_ms=ttft_ms,
            total_ms=total_ms,
            reason=reason,
            tenant=envelope.tenant,
        )
        await self.desk.bus.publish(f"{EVENT}.{envelope.priority}.{kind}", encode(event))


async def refuse(
    bus: Bus, writer: RecordWriter, delivery: Delivery, error: HeadraceError, *, engine: EngineName | None = None
) -> None:
    """End a request with an error: tell its reader, acknowledge it, and have it counted."""
    envelope = writer.envelope
    await writer.close(error_answer(envelope, error), delivery)
    event = ended_event(envelope, error, engine=engine)
    await bus.publish(f"{EVENT}.{envelope.priority}.{event.kind}", encode(event))
