"""A request in hand: opened once, written to while it is held, and ended in exactly one way.

Workers, the router, its evacuation and the monitor hold requests alike. Everything that a holder tells the broker about
a request passes through `Held`, which alone asks whether the request is still this process's. What each outcome takes,
and in which order, is decided in `pipeline.core.ending`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Self

from pipeline.broker.connection import BusError, Delivery, TooLarge, Unreachable
from pipeline.broker.events import publish_event
from pipeline.broker.jetstream import Bus, LaneFull, Stored
from pipeline.broker.usage import store_note
from pipeline.core import ending
from pipeline.core.answer import Record
from pipeline.core.ending import Abandoned, Buried, EndStep, Loss, Moved, Outcome, Returned, Settled
from pipeline.core.envelope import Envelope
from pipeline.core.letters import letter_headers
from pipeline.core.usage import note_of
from pipeline.delivery.grips import Grip, Leased, Queued
from pipeline.delivery.lease import LeaseKeeper
from pipeline.delivery.record import Duplicate, RecordWriter, Superseded
from pipeline.telemetry import ProcessSpan, Tracing
from pipeline.wire.answers import Answer
from pipeline.wire.messages import EngineName, RequestEvent, encode
from pipeline.wire.subjects import DEAD, STREAM_REPLIES, reply_subject, stream_of

log = logging.getLogger(__name__)


class MustEnd(Exception):
    """The request can only end with this outcome: its holder stops working on it and passes the outcome to `end`."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


@dataclass(frozen=True, slots=True)
class Fresh:
    """No attempt has written to the record."""

    record: Record = field(default_factory=Record)


@dataclass(frozen=True, slots=True)
class Resumed:
    """An earlier attempt has begun the record."""

    record: Record


Opened = Fresh | Resumed | Settled | Abandoned


class Held:
    """One request in hand. One user: the task that works on it.

    Make it with `taken` or `standing`, `open` it, and `end` it with an outcome. `end` releases the lease; a holder that
    may be cancelled before `end` calls `release` as well.

    Attributes:
        envelope: the request's.
        tries: deliveries that counted as attempts, this one included. Known once the request is open.
        attempt: the number of this attempt in the record, from 1. Known once the request is open.
        written: the tokens of the answer so far, for the account of a request that ends without an answer.
        outcome: how it ended, None while it is held.
    """

    def __init__(
        self,
        bus: Bus,
        grip: Grip,
        envelope: Envelope,
        *,
        tracing: Tracing,
        engine: EngineName | None = None,
        worker: str = "",
        doubtful: bool = False,
        on_returned: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.envelope = envelope
        self.tries = self.attempt = 1
        self.written = 0
        self.outcome: Outcome | None = None
        self._bus = bus
        self._grip = grip
        self._tracing = tracing
        self._engine = engine
        self._worker = worker
        self._doubtful = doubtful
        self._on_returned = on_returned
        self._opened = self._began = False
        self._writer = RecordWriter(bus, envelope)
        self._newest: Answer | None = None
        self._encoded: tuple[Outcome, bytes] | None = None
        self._span = ProcessSpan()
        self._taken_at = bus.clock.wall()

    @classmethod
    def taken(
        cls,
        bus: Bus,
        delivery: Delivery,
        envelope: Envelope,
        leases: LeaseKeeper,
        *,
        tracing: Tracing,
        engine: EngineName | None = None,
        worker: str = "",
        on_returned: Callable[[float], None] = lambda _: None,
    ) -> Self:
        """Hold a request that was delivered, from now on under a lease.

        Args:
            bus: the connection that it was delivered on.
            delivery: the request.
            envelope: the request's.
            leases: renews the lease. If this process has just stood still, the request may have been sent long ago and
                be another process's by now: it can only be abandoned.
            tracing: for spans.
            engine: whose worker holds it, None for the router.
            worker: the process that holds it.
            on_returned: called after it was returned, with the seconds until it is delivered again.
        """
        doubtful = leases.stood_still()
        grip = Leased(bus, delivery, leases)
        return cls(
            bus,
            grip,
            envelope,
            tracing=tracing,
            engine=engine,
            worker=worker,
            doubtful=doubtful,
            on_returned=on_returned,
        )

    @classmethod
    def standing(
        cls, bus: Bus, stream: str, stored: Stored, envelope: Envelope, tracing: Tracing | None = None
    ) -> Self:
        """Hold a request that stands in a queue: it is acknowledged by deleting that message, and not returned."""
        return cls(bus, Queued(bus, stream, stored), envelope, tracing=tracing or Tracing())

    @property
    def body(self) -> bytes:
        """As it was published."""
        return self._grip.data

    @property
    def waited_ms(self) -> float:
        """How long the request had been stored when it was taken."""
        return max(0.0, (self._taken_at - self.envelope.stored_at) * 1000)

    def when_lost(self, callback: Callable[[], None]) -> None:
        """Have callback called once if the lease runs out."""
        self._grip.when_lost(callback)

    # ---- working on it

    async def open(self) -> Opened:
        """Read what earlier deliveries left, count them, and purge an older request's answer.

        Returns:
            Whether to begin or to go on; or the outcome with which the request must end now. Never raises.
        """
        if self._doubtful:
            return Abandoned(Loss.STOOD_STILL)
        try:
            opened = await self._read()
        except BusError as error:
            return self._unreachable(error)
        self._opened = True
        return opened

    async def _read(self) -> Fresh | Resumed | Settled:
        envelope = self.envelope
        if envelope.delivered == 1 and envelope.move is None and not isinstance(self._grip, Queued):
            return Fresh()
        subject = reply_subject(envelope.name)
        kept = await self._bus.read_answers(subject)
        record = Record.read(kept, envelope.created)
        self.tries = max(1, envelope.delivered - await self._grip.times_returned())
        self.attempt = max(self.tries, record.attempt + 1)
        self._writer.last_sequence = record.last_sequence
        self.written = len(record.token_ids)
        if record.older_up_to:
            await self._bus.purge(STREAM_REPLIES, subject, up_to=record.older_up_to)
        if record.last is not None:
            return Settled(record.last)
        if not record.last_sequence:
            return Fresh()
        self._newest = [message for _, message in kept if message is not None][-1]
        return Resumed(record)

    def process(self) -> ProcessSpan:
        """The span of this delivery, for a `with` statement around the work and `end`."""
        grip, envelope = self._grip, self.envelope
        self._span = self._tracing.process(
            grip.subject, grip.headers, envelope, attempt=self.attempt, stored_at_s=grip.stored_at
        )
        self._span.queue_wait(
            envelope,
            grip.stored_at,
            attempt=self.attempt,
            reason=ending.delivered_again(envelope.delivered, self.tries) if self._opened else "",
        )
        return self._span

    async def check_reply_to(self) -> None:
        """See that the answer may go to the request's `Reply-To`.

        Raises:
            HeadraceError: `reply_subject_denied`.
            MustEnd: another copy of the request was answered there, or the broker is away.
        """
        try:
            await self._writer.check_reply_to()
        except Duplicate:
            raise MustEnd(Settled(None)) from None
        except BusError as error:
            raise MustEnd(self._unreachable(error)) from None

    async def began(self, *, wait_ms: float) -> None:
        """Publish that an engine has begun the request, which waited for wait_ms."""
        self._began = True
        envelope = self.envelope
        event = RequestEvent(
            envelope.name,
            "started",
            envelope.priority,
            self._engine,
            wait_ms=wait_ms,
            tenant=envelope.tenant,
            attempt=self.attempt,
            trace=self._span.parent_context,
        )
        await self._tell(event)

    async def first_said_at(self, record: Record) -> float | None:
        """When the reader first saw something of the answer, UTC seconds; None before that.

        Raises:
            MustEnd: the broker is away.
        """
        if not record.first_said:
            return None
        try:
            first = await self._bus.stored(STREAM_REPLIES, record.first_said)
        except BusError as error:
            raise MustEnd(self._unreachable(error)) from None
        return None if first is None else first.stored_at

    async def say(self, message: Answer) -> None:
        """Append a message to the record and forward it.

        Cancelling is safe: the next message, or `end`, finds out whether this one was stored.

        Raises:
            MustEnd: the request is not this process's any more, or the broker is away for too long.
        """
        await self._write(encode(message), append=True)

    async def repeat_newest(self) -> None:
        """Forward what an earlier attempt wrote last, which may have died before it did. Readers may see it twice.

        Raises:
            MustEnd: as `say`.
        """
        if self._newest is not None:
            await self._write(encode(self._newest), append=False)

    async def _write(self, data: bytes, *, append: bool) -> None:
        try:
            if append:
                self._must_hold()
                await self._writer.append(data)
            self._must_hold()
            await self._writer.forward(data)
        except Superseded:
            raise MustEnd(Abandoned(Loss.OVERTAKEN)) from None
        except Duplicate:
            raise MustEnd(Settled(None)) from None
        except TooLarge as error:
            raise MustEnd(ending.too_large(error.size, error.most)) from None
        except BusError as error:
            raise MustEnd(self._unreachable(error)) from None

    def _must_hold(self) -> None:
        if not self._grip.holds():
            raise MustEnd(Abandoned(Loss.LEASE))

    def _unreachable(self, error: BusError) -> Abandoned:
        log.warning("%s: left to a later delivery: %s", self.envelope.name, error)
        return Abandoned(Loss.BROKER)

    # ---- ending it

    async def end(self, outcome: Outcome) -> Outcome:
        """End the request, once: a second call changes nothing. Nothing else may be called afterwards. Never raises.

        Cancelling leaves the request to a later delivery, which finds what was done so far.

        Returns:
            How it ended. A lane may be full, and a lease or the broker lost on the way.
        """
        if self.outcome is not None:
            return self.outcome
        self.outcome = Abandoned(Loss.STOOD_STILL) if self._doubtful else outcome
        try:
            self.outcome = await self._carry_out(self.outcome)
        finally:
            self.release()
        if self.outcome == Abandoned(Loss.BROKER):
            # The broker failed, not the engine: the next delivery is no further attempt.
            self._grip.owe_return()
        self._note(self.outcome)
        return self.outcome

    def release(self) -> None:
        """Renew the lease no more. Twice is harmless."""
        self._grip.release()

    async def _carry_out(self, outcome: Outcome) -> Outcome:
        steps = ending.steps(outcome)
        try:
            with self._publishing(steps):
                for step in steps:
                    if step in ending.NEEDS_LEASE and not self._grip.holds():
                        # The broker takes an acknowledgement of any kind from any earlier delivery.
                        return Abandoned(Loss.LEASE)
                    await self._do(step, outcome)
        except LaneFull as error:
            if isinstance(outcome, Moved):
                return await self._carry_out(ending.when_full(outcome))
            return self._unreachable(error)
        except Superseded:
            return Abandoned(Loss.OVERTAKEN)
        except Duplicate:
            return await self._carry_out(Settled(None))
        except TooLarge as error:
            log.warning("%s: %s was not carried out: %s", self.envelope.name, ending.word(outcome), error)
            stays = self._engine is None
            instead = ending.when_too_large(outcome, self.envelope, size=error.size, most=error.most, stays=stays)
            return await self._carry_out(instead)
        except BusError as error:
            return self._unreachable(error)
        return outcome

    async def _do(self, step: EndStep, outcome: Outcome) -> None:
        match step, outcome:
            case EndStep.LETTER, Buried():
                await self._bury(outcome)
            case EndStep.CLOSE, _:
                await self._writer.append(self._last(outcome))
            case EndStep.FORWARD, _:
                await self._writer.forward(self._last(outcome))
            case EndStep.ACCOUNT, _:
                await self._account(outcome)
            case EndStep.MOVE, Moved():
                await self._move(outcome)
            case EndStep.NOTE, _:
                await self._note_return()
            case EndStep.REMOVE, _:
                await self._grip.remove()
            case EndStep.RETURN, Returned(delay_s):
                await self._grip.nak(delay_s)
                self._on_returned(delay_s)
            case EndStep.TELL, _:
                event = ending.event(
                    outcome, self.envelope, engine=self._engine, began=self._began, waited_ms=self.waited_ms
                )
                if event is not None:
                    await self._tell(event)
            case _:
                raise AssertionError(f"{outcome} has no step {step}")

    def _last(self, outcome: Outcome) -> bytes:
        """The last message, encoded once: it may be as long as the whole answer."""
        if self._encoded is None or self._encoded[0] is not outcome:
            last = ending.last_message(outcome, self.envelope)
            if last is None:
                raise AssertionError(f"{outcome} has no last message")
            self._encoded = outcome, encode(last)
        return self._encoded[1]

    async def _bury(self, outcome: Buried) -> None:
        """Store the dead letter, once: the request as it was delivered, and its error."""
        headers = letter_headers(
            self.envelope,
            self._grip.headers,
            subject=self._grip.subject,
            sequence=self._grip.sequence,
            error=outcome.error,
            attempts=self.attempt,
            trace_id=self._span.trace_id or "",
        )
        await self._bus.store(f"{DEAD}.{self.envelope.priority}", self._grip.data, headers=headers)

    async def _account(self, outcome: Outcome) -> None:
        note = note_of(outcome, self.envelope, stream=stream_of(self._grip.subject), written=self.written)
        if note is not None:
            await store_note(self._bus, note, self.envelope.created)

    async def _move(self, outcome: Moved) -> None:
        grip = self._grip
        headers = ending.moved_headers(
            outcome,
            self.envelope,
            grip.headers,
            ids=self._bus.moves,
            sequence=grip.sequence,
            stored_at=grip.stored_at,
        )
        with self._tracing.publish(outcome.to, headers, request_id=self.envelope.name):
            await self._bus.store(outcome.to, grip.data, headers=headers)

    async def _note_return(self) -> None:
        try:
            await self._grip.note_return()
        except BusError as error:
            log.info("%s: its return is noted later: %s", self.envelope.name, error)
            self._grip.owe_return()

    async def _tell(self, event: RequestEvent) -> None:
        """Events are for watchers: the request goes on where one is lost."""
        event.worker, event.deliveries = self._worker, self.envelope.delivered
        try:
            await publish_event(self._bus, event)
        except Unreachable as error:
            log.debug("%s: the event %s was not published: %s", event.id, event.kind, error)

    def _publishing(self, steps: tuple[EndStep, ...]) -> AbstractContextManager[object]:
        if EndStep.CLOSE not in steps:
            return nullcontext()
        return self._tracing.publish(reply_subject(self.envelope.name), request_id=self.envelope.name)

    def _note(self, outcome: Outcome) -> None:
        """Say in the log and in the span how the request ended."""
        self._span.ended(outcome)
        self._tracing.ended(self._grip.headers, self.envelope, outcome)
        match outcome:
            case Buried(error):
                log.warning("%s: moved to the dead letters: %s", self.envelope.name, error)
            case Settled(last=None):
                log.info("%s: published twice; the other copy is answered", self.envelope.name)
            case Abandoned(why):
                log.info("%s: left to a later delivery: %s", self.envelope.name, why)
            case _:
                pass
