"""The answer of a request: what its record holds, whether an attempt may run, and the messages that it writes.

A request's answer is a record on its reply subject, which only the current attempt can extend. Each attempt reads the
record first (`Record`). If the record has its last message, the request needs only to be acknowledged. Otherwise the
request is refused (`decide`), or its answer continues from there (`AnswerWriter`): chunks are numbered on, and exactly
one last message closes the record.
"""

from __future__ import annotations

import struct
from base64 import b64encode
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from pipeline.core.envelope import Envelope
from pipeline.engine import Embedded, Piece
from pipeline.wire.answers import (
    Account,
    Answer,
    AssistantMessage,
    Choice,
    Chunk,
    ChunkChoice,
    Completion,
    Delta,
    Embedding,
    EmbeddingList,
    EmbeddingUsage,
    ErrorAnswer,
    ErrorBody,
    FinishReason,
    FunctionCall,
    Last,
    Logprobs,
    Status,
    StatusState,
    TokenScore,
    ToolCall,
    ToolCallDelta,
    Usage,
    add_call,
)
from pipeline.wire.errors import ErrorCode, HeadraceError, quoted
from pipeline.wire.messages import Dialect, EngineName
from pipeline.wire.requests import NO_LIMIT, EncodingFormat
from pipeline.wire.subjects import Move
from pipeline.wire.validation import UNREADABLE

# ---- the record ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Record:
    """The part of a request's answer that its reply subject holds.

    Attributes:
        text: the text of all chunks.
        token_ids: the tokens of that text, as far as they are known.
        tool_calls: the tool calls of all chunks.
        reasoning: what the model has thought.
        scores: the log-probabilities of the tokens, if the request asks for them.
        next_seq: the number of the next chunk.
        attempt: the latest attempt that wrote.
        model: the model that produced the tokens, empty until there are chunks.
        models: the models that wrote the text and the tool calls, in order, each once.
        tells_spill: whether a status message reports that the request was spilled.
        last: the last message, or None.
        has_gap: whether tokens are missing, or come from more than one model.
        last_sequence: the newest message's sequence in the stream; 0 if there is none.
        older_up_to: the sequence of the newest message before it that belongs to an older request under the same id.
        first_said: the sequence of the first message that shows a part of the answer; 0 if there is none.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)
    reasoning: str = ""
    scores: list[TokenScore] = field(default_factory=list)
    next_seq: int = 0
    attempt: int = 0
    model: str = ""
    models: list[str] = field(default_factory=list)
    tells_spill: bool = False
    last: Last | None = None
    has_gap: bool = False
    last_sequence: int = 0
    older_up_to: int = 0
    first_said: int = 0

    @classmethod
    def read(cls, messages: Iterable[tuple[int, Answer | None]], created: int) -> Record:
        """Read (stream sequence, message) pairs in order. Messages of an older request are left out.

        Args:
            messages: what the stream holds under the request's id; None for what is no part of an answer.
            created: the request's `Envelope.created`.
        """
        record, older = cls(), 0
        for sequence, message in messages:
            if message is None and record.last_sequence:
                record.last_sequence = sequence
                continue
            if message is None or message.created != created:
                older = sequence
                continue
            record.last_sequence, record.older_up_to = sequence, older
            match message:
                case Chunk():
                    record.add(message)
                    if record.text or record.tool_calls or record.reasoning:
                        record.first_said = record.first_said or sequence
                case Status():
                    record.attempt = max(record.attempt, message.attempt)
                    record.tells_spill |= message.state == "spilled"
                case _:
                    record.last = message
        return record

    def add(self, chunk: Chunk) -> None:
        """Take in one accepted chunk."""
        choice = chunk.choices[0]
        self.text += choice.delta.content or ""
        self.reasoning += choice.delta.reasoning_content or ""
        self.scores += choice.logprobs.content if isinstance(choice.logprobs, Logprobs) else ()
        self.token_ids += choice.token_ids
        for call in choice.delta.tool_calls or ():
            add_call(self.tool_calls, call)
        self.has_gap |= choice.delta.says and not choice.token_ids
        self.has_gap |= self.model not in ("", chunk.model)
        self.model = chunk.model
        if choice.delta.says and chunk.model not in self.models:
            self.models.append(chunk.model)
        self.next_seq = chunk.seq + 1
        self.attempt = max(self.attempt, chunk.attempt)

    @property
    def resumable_tokens(self) -> list[int]:
        """The tokens of the whole text; empty if some are unknown."""
        return [] if self.has_gap else self.token_ids


def decide(envelope: Envelope, *, tries: int, max_attempts: int, wall_now: float) -> HeadraceError | None:
    """Whether a request whose record is open may run: None, or the error that ends it.

    Args:
        envelope: the request's.
        tries: deliveries that count as attempts, this one included. Returned deliveries do not count.
        max_attempts: how many attempts the request has.
        wall_now: UTC seconds.
    """
    if envelope.fault is not None:
        return envelope.fault
    if envelope.deadline is not None and wall_now >= envelope.deadline:
        return expired()
    if tries > max_attempts:
        return HeadraceError(
            ErrorCode.ENGINE_FAILED,
            f"Request {envelope.id} failed after {max_attempts} attempts and was moved to the dead letters.",
        )
    return None


def expired(*, queued: bool = False) -> HeadraceError:
    """The error of a request whose deadline has passed, in its queue or afterwards.

    A worker and the monitor may find at the same moment that a request has expired. Each knows its own message by its
    bytes, so the two have different texts: the second writer is fenced, and the request is counted once.
    """
    when = "while the request was queued" if queued else "before the answer was complete"
    return HeadraceError(ErrorCode.DEADLINE_EXCEEDED, f"The deadline passed {when}.")


# ---- the answer ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class AnswerWriter:
    """Makes the messages of one request's answer: numbers the chunks, keeps the whole text, makes the last message.

    One writer: the task that serves the request. Times are UTC seconds.

    Attributes:
        envelope: the request's.
        engine: the engine of this attempt.
        model: the engine's model.
        attempt: the number of this attempt, from 1.
        started_at: when this attempt began.
        reason: why this engine serves the request.
        simulated: whether no model runs.
        record: what the answer holds so far.
        first_token_at: when the reader first saw a part of the answer, in whichever attempt.
        notes: the request's, as `ChatRequest.notes`.
        one_call: keep only the first tool call: the request has `parallel_tool_calls: false`.
        preempted: how many times the engine suspended the request.
        dialect: the API of the server that is the engine; None for an engine of this machine's own.
    """

    envelope: Envelope
    engine: EngineName
    model: str
    attempt: int
    started_at: float
    reason: str
    simulated: bool = False
    record: Record = field(default_factory=Record)
    first_token_at: float | None = None
    notes: list[str] = field(default_factory=list)
    one_call: bool = False
    preempted: int = 0
    dialect: Dialect | None = None
    _suspended: bool = field(init=False, default=False)
    _held_tokens: list[int] = field(init=False, default_factory=list)
    _held_scores: list[TokenScore] = field(init=False, default_factory=list)
    _calls: int = field(init=False)
    _repeated_calls: int = field(init=False)
    _repeated_arguments: str = field(init=False, default="")

    def __post_init__(self) -> None:
        # An engine that cannot resume from tokens begins again, and repeats the tool calls that the reader already has.
        resumes = bool(self.record.resumable_tokens)
        self._calls = len(self.record.tool_calls) if resumes else 0
        self._repeated_calls = 0 if resumes else len(self.record.tool_calls)

    @property
    def queue_ms(self) -> float:
        """How long the request had been stored when this attempt began."""
        return max(0.0, round((self.started_at - self.envelope.stored_at) * 1000, 3))

    @property
    def ttft_ms(self) -> float:
        """From storing to the first token, 0 if there was none."""
        if self.first_token_at is None:
            return 0.0
        return max(0.0, round((self.first_token_at - self.envelope.stored_at) * 1000, 3))

    def openings(self) -> list[Status]:
        """The status messages that open an attempt. The first one of a spilled request reports the spill, once."""
        begins = self.status("restarted" if self.attempt > 1 else "started")
        spilled = self.envelope.move is Move.SPILLED and self.engine == "ollama"
        says_spill = spilled and not self.record.tells_spill
        return [self.status("spilled"), begins] if says_spill else [begins]

    def before(self, piece: Piece) -> list[Status]:
        """The status messages that go before what piece adds to the answer: `restarted`, `resumed`."""
        self.preempted += piece.preempted
        if piece.restarted:
            self.attempt += piece.restarted
            self._suspended = False
            return [self.status("restarted")]
        if self._suspended and piece.suspended is False:
            self._suspended = False
            return [self.status("resumed")]
        return []

    def after(self, piece: Piece) -> list[Status]:
        """The status messages that go after what piece adds to the answer: `suspended`."""
        if self._suspended or not piece.suspended:
            return []
        self._suspended = True
        return [self.status("suspended")]

    def status(self, state: StatusState) -> Status:
        """A status message of this attempt."""
        return Status(
            id=self.envelope.id,
            state=state,
            created=self.envelope.created,
            engine=self.engine,
            model=self.model,
            attempt=self.attempt,
            queue_ms=self.queue_ms,
            reason=self.reason,
        )

    def chunk(self, piece: Piece, now: float) -> Chunk | None:
        """The next chunk, counted as part of the answer; None if the piece has nothing to show yet.

        Tokens without text (half a character, a stop string that may still fail) wait for the chunk with their text.
        So the record always holds some text and the tokens of all of it.
        """
        self._held_tokens += piece.token_ids
        self._held_scores += piece.scores
        calls = self._call_deltas(piece.tool_calls)
        if not (piece.text or calls or piece.reasoning or piece.finish_reason):
            return None
        if self.first_token_at is None and (piece.text or calls or piece.reasoning):
            self.first_token_at = now
        delta = Delta(
            role="assistant" if self.record.next_seq == 0 else None,
            content=piece.text or None,
            tool_calls=calls or None,
            reasoning_content=piece.reasoning or None,
            reasoning=piece.reasoning or None,
        )
        logprobs = Logprobs(self._held_scores) if self._held_scores else msgspec.UNSET
        chunk = Chunk(
            id=self.envelope.id,
            created=self.envelope.created,
            model=self.model,
            choices=[
                ChunkChoice(delta, finish_reason=piece.finish_reason, token_ids=self._held_tokens, logprobs=logprobs)
            ],
            seq=self.record.next_seq,
            attempt=self.attempt,
        )
        self._held_tokens, self._held_scores = [], []
        self.record.add(chunk)
        return chunk

    def _call_deltas(self, parts: list[ToolCall]) -> list[ToolCallDelta]:
        """The parts of calls of a piece that the record does not have."""
        deltas = []
        for part in parts:
            self._calls += part.begins
            index = self._calls - 1
            if index < 0 or (self.one_call and index > 0):
                continue
            delta = self._repeated(index, part) if index < self._repeated_calls else part
            if delta is not None:
                deltas.append(ToolCallDelta(index, delta.id, delta.function))
        return deltas

    def _repeated(self, index: int, part: ToolCall) -> ToolCall | None:
        """What a call that the reader has, or has the beginning of, adds to it.

        Raises:
            HeadraceError: `engine_failed`: the reader has the beginning of another call.
        """
        self._repeated_arguments = ("" if part.begins else self._repeated_arguments) + part.function.arguments
        had, again = self.record.tool_calls[index].function, self._repeated_arguments
        common = min(len(had.arguments), len(again))
        if had.arguments[:common] != again[:common] or (part.begins and part.function.name != had.name):
            if _is_object(had.arguments):
                return None
            raise HeadraceError(
                ErrorCode.ENGINE_FAILED,
                f"The answer broke off in a call of {quoted(had.name)}, and the next attempt wrote another call.",
            )
        return ToolCall(FunctionCall("", again[common:])) if len(again) > common else None

    def completion(self, finish_reason: FinishReason, usage: Usage, *, now: float, stop: str = "") -> Completion:
        """The last message of a request that was answered. `stop` is the stop string that ended it, if it is known."""
        record = self.record
        message = AssistantMessage(
            content=None if record.tool_calls and not record.text else record.text,
            tool_calls=record.tool_calls or None,
            reasoning_content=record.reasoning or msgspec.UNSET,
            reasoning=record.reasoning or msgspec.UNSET,
        )
        choice = Choice(
            message,
            finish_reason,
            stop_reason=stop or msgspec.UNSET,
            logprobs=Logprobs(record.scores) if record.scores else msgspec.UNSET,
        )
        return Completion(
            id=self.envelope.id,
            created=self.envelope.created,
            model=self.model,
            choices=[choice],
            usage=usage,
            headrace=self._account(now),
        )

    def embeddings(self, embedded: Embedded, encoding: EncodingFormat | None, *, now: float) -> EmbeddingList:
        """The last message of a request whose texts were embedded. All vectors arrive at once, at `now`.

        Args:
            embedded: the engine's vectors.
            encoding: how the vectors are written; None writes numbers.
            now: UTC seconds.
        """
        self.first_token_at = now
        tokens = embedded.prompt_tokens
        data = [
            Embedding(_as_base64(vector) if encoding == "base64" else vector, index)
            for index, vector in enumerate(embedded.vectors)
        ]
        return EmbeddingList(
            id=self.envelope.id,
            created=self.envelope.created,
            model=self.model,
            data=msgspec.Raw(msgspec.json.encode(data)),
            usage=EmbeddingUsage(tokens, tokens),
            headrace=self._account(now),
        )

    def _account(self, now: float) -> Account:
        return Account(
            engine=self.engine,
            priority=self.envelope.priority,
            task=self.envelope.task,
            attempts=self.attempt,
            queue_ms=self.queue_ms,
            ttft_ms=self.ttft_ms,
            total_ms=max(0.0, round((now - self.envelope.stored_at) * 1000, 3)),
            spilled=self.envelope.move in (Move.SPILLED, Move.RETURNED),
            reason=self.reason,
            preempted=self.preempted,
            simulated=True if self.simulated else msgspec.UNSET,
            dialect="openai" if self.dialect == "openai" else msgspec.UNSET,
            notes=self.notes or msgspec.UNSET,
            models=self.record.models if len(self.record.models) > 1 else msgspec.UNSET,
        )


def cut_short(limit: int | None, finish_reason: FinishReason, usage: Usage) -> list[str]:
    """The note on an answer that ended before the client's limit, because the context was full; or nothing."""
    if limit is None or finish_reason != "length" or usage.completion_tokens >= limit:
        return []
    wanted = "no limit" if limit == NO_LIMIT else limit
    return [f"The context was full after {usage.completion_tokens} tokens of the answer: `max_tokens` is {wanted}."]


def _is_object(arguments: str) -> bool:
    try:
        msgspec.json.decode(arguments, type=dict[str, msgspec.Raw])
    except UNREADABLE:
        return False
    return True


def _as_base64(vector: list[float]) -> str:
    return b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def error_answer(envelope: Envelope, error: HeadraceError) -> ErrorAnswer:
    """The last message of a request that was not answered."""
    return ErrorAnswer(id=envelope.id, created=envelope.created, error=ErrorBody.of(error))
