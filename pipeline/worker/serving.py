"""Serving one delivery: generate or embed what the request asks for, and find out how the request ends."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from pipeline.broker.clock import Clock
from pipeline.config import Config
from pipeline.core.answer import AnswerWriter, Record, cut_short, decide, expired
from pipeline.core.ending import (
    Abandoned,
    Answered,
    Loss,
    Moved,
    Outcome,
    Returned,
    Settled,
    closing,
    failure,
    reason,
    word,
)
from pipeline.core.envelope import Envelope
from pipeline.core.handback import HandBacks
from pipeline.core.placement import KnownModels, Tries, after_error, is_for_another, is_on, lent_to_mlx
from pipeline.core.saturation import STALE_S
from pipeline.core.turnaways import TurnAways
from pipeline.delivery.held import Fresh, Held, MustEnd
from pipeline.engine import Engine, EngineStatus, Generation, NotLoaded, TurnedAway, Work
from pipeline.process.role import Role
from pipeline.telemetry import ChatSpan, ProcessSpan
from pipeline.wire.answers import Completion, EmbeddingList, Success
from pipeline.wire.decoding import decode_request
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import encode
from pipeline.wire.requests import ChatRequest, EmbeddingRequest, Request
from pipeline.wire.subjects import Priority

log = logging.getLogger(__name__)

# For so long after its start a worker returns a request that only another worker might answer: that one may have the
# model, and not have said so yet. It is shorter once a ready worker of the other engine has been heard.
PATIENCE_S = 20.0
# What the largest message has besides its body.
_HEADERS_BYTES = 4096


@dataclass(slots=True)
class ServingContext:
    """What all servings of one worker share.

    Args:
        me: the role's connection, peers and spans.
        engine: answers the requests.
        config: the settings.
        patience_s: how long the other workers have to say which models they have.
        entering: the requests in hand, by priority, that the engine has not been given yet.
        coming: how many requests of a priority are on their way to the engine, as far as is known.
        on_lending: called before a request is returned for MLX to take it.
        on_lent: called with its priority after it was returned.
    """

    me: Role
    engine: Engine
    config: Config
    patience_s: float = PATIENCE_S
    entering: Counter[Priority] = field(default_factory=Counter)
    coming: Callable[[Priority], int] = lambda _: 0
    on_lending: Callable[[], None] = lambda: None
    on_lent: Callable[[Priority], None] = lambda _: None
    _began_at: float = field(init=False)
    _hand_backs: HandBacks = field(init=False, default_factory=HandBacks)
    _paused: HandBacks = field(init=False, default_factory=HandBacks)
    _turn_aways: TurnAways = field(init=False, default_factory=TurnAways)

    def __post_init__(self) -> None:
        self._began_at = self.clock.now()

    @property
    def clock(self) -> Clock:
        """The connection's."""
        return self.me.bus.clock

    def models(self) -> KnownModels:
        """The models of all workers."""
        peers, engine = self.me.peers, self.engine.name
        ready = [s for s in peers.workers("mlx" if engine == "ollama" else "ollama") if s.state == "ready"]
        heard = bool(ready)
        listened_s = self.clock.now() - self._began_at
        # Each worker that lives publishes its status within STALE_S.
        complete = listened_s >= self.patience_s or (heard and listened_s >= STALE_S)
        return KnownModels(
            peers.catalogue(self.config),
            complete=complete,
            others=peers.others(engine, self.me.name, self.config),
            lends=any(status.borrows for status in ready),
        )

    def turned_away(self, error: HeadraceError, envelope: Envelope) -> int:
        """How often the engine turned a request away, this time included; 0 if the error is another one."""
        return self._turn_aways.count(envelope.name, envelope.created) if isinstance(error, TurnedAway) else 0

    def held_back(self, envelope: Envelope) -> Returned | None:
        """How a request that no attempt has begun goes back to its lane while it is paused; None if it may begin."""
        if not self.me.peers.pauses.now.holds(envelope.priority, envelope.owner):
            return None
        return Returned(self._paused.delay_s(self.clock.now(), envelope.name, delivered=envelope.delivered, room=False))

    def hand_back_s(self, envelope: Envelope, request: Request) -> float:
        """How long the broker keeps a request that is left to another worker of this engine, seconds."""
        engine = self.engine.name
        room = is_on(self.me.peers.others(engine, self.me.name, self.config, with_room=True), engine, request)
        return self._hand_backs.delay_s(self.clock.now(), envelope.name, delivered=envelope.delivered, room=room)


@dataclass(slots=True)
class Serving:
    """One request being served. `run` ends it in exactly one way; `interrupt` decides that way from outside.

    Args:
        context: shared by the worker's servings.
        held: the request.
        reason: why this engine serves it.
        on_slot_left: called when the request has left the engine, before its end is written.
        extra: another worker had begun the request.

    Attributes:
        cost_tokens: (prompt, output) tokens that the engine spent on it.
        request: the decoded request, None until it is read.
    """

    context: ServingContext
    held: Held
    reason: str
    on_slot_left: Callable[[], None] = lambda: None
    extra: bool = False
    cost_tokens: tuple[int, int] = field(init=False, default=(0, 0))
    request: Request | None = field(init=False, default=None)
    _lends: bool = field(init=False, default=False)
    _enters: bool = field(init=False, default=True)
    _interruption: Outcome | None = field(init=False, default=None)
    _task: asyncio.Task[Outcome] | asyncio.Task[None] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.held.when_lost(self._lost)
        self.context.entering[self.envelope.priority] += 1

    @property
    def envelope(self) -> Envelope:
        """The request's."""
        return self.held.envelope

    def interrupt(self, outcome: Outcome) -> bool:
        """End the serving with outcome: cancelled, expired, moved, returned or abandoned.

        Once the last message is being written it is too late. The first interruption holds.

        Returns:
            Whether the work was interrupted: it was running, and this is the first interruption.
        """
        if self._interruption is not None:
            return False
        self._interruption = outcome
        return self._task is not None and self._task.cancel()

    def lend(self) -> None:
        """The request is about to be returned for MLX to take it."""
        self._lends = True
        self.context.on_lending()

    def _lost(self) -> None:
        self.interrupt(Abandoned(Loss.LEASE))

    async def run(self) -> None:
        """Serve the request and end it. Cancelling leaves it to another delivery, once its lease has run out."""
        deadline = self._arm_deadline()
        try:
            opened = await self.held.open()
            if isinstance(opened, Settled | Abandoned):
                await self.held.end(opened)
                return
            if isinstance(opened, Fresh) and (back := self.context.held_back(self.envelope)) is not None:
                await self.held.end(back)
                return
            with self.held.process() as span:
                span.served(self.reason)
                ended = await self.held.end(await self._outcome(opened.record, span))
            if self._lends and isinstance(ended, Returned):
                self.context.on_lent(self.envelope.priority)
        finally:
            if deadline is not None:
                deadline.cancel()
            self._entered()
            self.held.release()

    def _entered(self) -> None:
        """The engine has the request now, or will not get it."""
        if self._enters:
            self._enters = False
            self.context.entering[self.envelope.priority] -= 1

    def _arm_deadline(self) -> asyncio.TimerHandle | None:
        if self.envelope.deadline is None:
            return None
        left_s = self.envelope.deadline - self.context.clock.wall()
        if left_s <= 0:
            return None
        return asyncio.get_running_loop().call_later(left_s, self.interrupt, failure(expired()))

    async def _outcome(self, record: Record, span: ProcessSpan) -> Outcome:
        """Do the work. Returns how the request ends."""
        refusal = decide(
            self.envelope,
            tries=self.held.tries,
            max_attempts=self.context.config.max_attempts,
            wall_now=self.context.clock.wall(),
        )
        if self._interruption is not None:
            return self._interruption
        if refusal is not None:
            return failure(refusal)
        try:
            return await self._until_interrupted(self._work(record, span))
        except MustEnd as must:
            return must.outcome

    async def _until_interrupted(self, work: Coroutine[Any, Any, Outcome]) -> Outcome:
        """Do work, unless `interrupt` comes meanwhile."""
        self._task = asyncio.current_task()
        try:
            return await work
        except asyncio.CancelledError:
            if self._interruption is None or self._task is None:
                raise
            self._task.uncancel()
            return self._interruption
        finally:
            self._task = None

    async def _work(self, record: Record, span: ProcessSpan) -> Outcome:
        try:
            request = decode_request(self.held.body, max_body_bytes=self.context.config.max_body_bytes)
            self.request = request
            await self.held.check_reply_to()
        except HeadraceError as error:
            return failure(error)
        had = record.next_seq
        try:
            if isinstance(request, EmbeddingRequest):
                return Answered(await self._embed(request))
            return Answered(await self._generate(request, record))
        except HeadraceError as error:
            began = isinstance(request, ChatRequest) and bool(request.streams) and record.next_seq > had
            return self._after(error, request, span, began=began)

    def _after(self, error: HeadraceError, request: Request, span: ProcessSpan, *, began: bool) -> Outcome:
        """How the request ends after an error of the engine's. The log says it once: `Held` tells of a dead letter."""
        engine, models = self.context.engine.name, self.context.models()
        if isinstance(error, NotLoaded):
            return Returned(self.context.hand_back_s(self.envelope, request), error=error)
        if is_for_another(error, engine, request, models):
            return Returned(self.context.hand_back_s(self.envelope, request), error=error)
        outcome = self._lent(error, request, models) if began and engine == "ollama" else None
        outcome = outcome or after_error(
            error,
            engine=engine,
            envelope=self.envelope,
            request=request,
            models=models,
            tries=Tries(
                self.held.tries,
                self.held.attempt,
                self.context.config.max_attempts,
                self.context.turned_away(error, self.envelope),
            ),
        )
        if error.code in (ErrorCode.ENGINE_FAILED, ErrorCode.UNAVAILABLE):
            span.fail(error)
            match outcome:
                case Moved(to=to):
                    log.warning("%s: moved to %s: %s", self.envelope.name, to, error)
                case Returned(uses_attempt=True):
                    log.warning("%s: attempt %d failed: %s", self.envelope.name, self.held.attempt, error)
                case Returned():
                    log.info("%s: returned to its lane: %s", self.envelope.name, error)
                case _:
                    pass
        return outcome

    def _lent(self, error: HeadraceError, request: Request, models: KnownModels) -> Outcome | None:
        """How MLX gets an answer that this attempt began and cannot end: its reader has half of it."""
        outcome = lent_to_mlx(self.envelope, request, models, why=error.message)
        if isinstance(outcome, Returned):
            self.lend()
        return outcome

    async def _generate(self, request: ChatRequest, record: Record) -> Success:
        engine = self.context.engine
        model, status = engine.resolve(request.wanted_model), engine.status()
        self._entered()
        with self.context.me.tracing.chat(
            request,
            request_id=self.envelope.name,
            engine=engine.name,
            model=model,
            server=status.server,
            provider=status.dialect or "",
        ) as chat:
            generation = await engine.submit(self._work_of(request, model, record))
            try:
                # Made now: what the model's load took is part of the queue time.
                answer = self._answer(model, record, status)
                await self._begin(answer, request, record)
                return await self._follow(generation, answer, request, chat)
            except (asyncio.CancelledError, MustEnd) as stop:
                self._note_cut_short(chat, stop.outcome if isinstance(stop, MustEnd) else self._interruption)
                raise
            finally:
                await self._leave_slot(generation)

    def _work_of(self, request: ChatRequest, model: str, record: Record) -> Work:
        """What the engine does: the whole answer, or what is missing of the record's."""
        envelope = self.envelope
        return Work(
            envelope.name,
            request,
            model,
            seed=envelope.seed if request.seed is None else request.seed,
            resume_tokens=record.resumable_tokens if record.model == model else [],
            resume_text=record.text,
            resume_reasoning=record.reasoning,
            priority=envelope.priority,
            extra=self.extra,
            coming=self.context.coming(envelope.priority),
            tenant=envelope.tenant,
        )

    async def _begin(self, answer: AnswerWriter, request: ChatRequest, record: Record) -> None:
        """Say that the attempt has begun, to watchers and to the reader of a streamed answer."""
        held = self.held
        answer.first_token_at = await held.first_said_at(record)
        answer.notes, answer.one_call = request.notes, request.parallel_tool_calls is False
        await held.began(wait_ms=answer.queue_ms)
        if request.streams:
            await held.repeat_newest()
            for opening in answer.openings():
                await held.say(opening)

    def _note_cut_short(self, chat: ChatSpan, outcome: Outcome | None) -> None:
        """Say in the span why the generation was stopped."""
        closed = None if outcome is None else closing(outcome)
        what = "interrupted" if outcome is None else closed.code if isinstance(closed, HeadraceError) else word(outcome)
        chat.cut_short(str(what), "" if outcome is None else reason(outcome), self.cost_tokens[1])

    def _answer(self, model: str, record: Record, status: EngineStatus) -> AnswerWriter:
        engine = self.context.engine
        return AnswerWriter(
            self.envelope,
            engine.name,
            model,
            self.held.attempt,
            self.context.clock.wall(),
            self.reason,
            engine.simulated,
            record,
            dialect=status.dialect,
        )

    async def _embed(self, request: EmbeddingRequest) -> EmbeddingList:
        engine = self.context.engine
        if engine.embedder is None:
            raise HeadraceError(ErrorCode.MODEL_NOT_FOUND, f"{engine.name} makes no embeddings", param="model")
        model = engine.embedder.embedding_model(request.wanted_model)
        status = engine.status()
        answer = self._answer(model, Record(), status)
        answer.notes = request.notes
        with self.context.me.tracing.embeddings(
            request,
            request_id=self.envelope.name,
            engine=engine.name,
            model=model,
            server=status.server,
            provider=status.dialect or "",
        ) as span:
            await self.held.began(wait_ms=answer.queue_ms)
            embedded = await engine.embedder.embed(request, model)
            span.finish(embedded.prompt_tokens, model=model)
        self.cost_tokens = (embedded.prompt_tokens, 0)
        message = answer.embeddings(embedded, request.encoding_format, now=self.context.clock.wall())
        self._check_size(message, request)
        return message

    def _check_size(self, message: EmbeddingList, request: EmbeddingRequest) -> None:
        size, most = len(encode(message)), self.context.me.bus.max_payload - _HEADERS_BYTES
        if size > most:
            raise HeadraceError(
                ErrorCode.REQUEST_TOO_LARGE,
                f"The embeddings of {len(request.texts)} texts take {size} bytes, and an answer holds at most {most}. "
                "Send fewer texts at once, or ask for `base64`.",
                param="input",
            )

    async def _follow(
        self, generation: Generation, answer: AnswerWriter, request: ChatRequest, chat: ChatSpan
    ) -> Completion:
        """Turn pieces into chunks until the last one. While a chunk is being stored, pieces gather in the next."""
        clock, waits_for_first = self.context.clock, True
        began_at = clock.now()
        while True:
            piece = await generation.next()
            if piece.finish_reason is not None:
                await self._leave_slot(generation)
            opening = answer.before(piece)
            self.held.attempt = answer.attempt
            for status in opening:
                if request.streams:
                    await self.held.say(status)
            # An answer that breaks off has been paid for so far.
            self.cost_tokens = (0, self.cost_tokens[1] + len(piece.token_ids))
            self.held.written += len(piece.token_ids)
            chunk = answer.chunk(piece, clock.wall())
            if waits_for_first and (piece.text or piece.tool_calls or piece.reasoning):
                waits_for_first = False
                chat.first_chunk(clock.now() - began_at)
            if request.streams and chunk is not None:
                await self.held.say(chunk)
            for status in answer.after(piece):
                if request.streams:
                    await self.held.say(status)
            if piece.finish_reason is not None and piece.usage is not None:
                # Tokens that an earlier request had left cost nothing.
                self.cost_tokens = (piece.usage.computed_prompt_tokens, piece.usage.completion_tokens)
                answer.notes = (
                    answer.notes + piece.notes + cut_short(request.token_limit, piece.finish_reason, piece.usage)
                )
                chat.finish(piece.finish_reason, piece.usage, model=answer.model)
                return answer.completion(piece.finish_reason, piece.usage, now=clock.wall(), stop=piece.stop)

    async def _leave_slot(self, generation: Generation) -> None:
        """Let the next request begin while the end of this one is still being written."""
        await generation.close()
        self.on_slot_left()
