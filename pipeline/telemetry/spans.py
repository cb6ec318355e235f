"""The spans of a request, each with what it records. Without a recording, a span does nothing."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

from pipeline.core import ending
from pipeline.core.ending import Outcome
from pipeline.core.envelope import Envelope
from pipeline.telemetry import names
from pipeline.telemetry.names import Value
from pipeline.wire.answers import FinishReason, Usage
from pipeline.wire.errors import HeadraceError
from pipeline.wire.subjects import Move, Task

if TYPE_CHECKING:
    from pipeline.telemetry.recording import Recording


class Span:
    """One step in the life of a request."""

    __slots__ = ("_recording",)

    def __init__(self, recording: Recording | None = None) -> None:
        self._recording = recording

    def __enter__(self) -> Self:
        if self._recording is not None:
            self._recording.enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._recording is None:
            return
        if isinstance(error, Exception):
            self.fail(error)
        elif error is not None:  # a cancelled task has not failed
            self.event("interrupted")
        self._recording.exit()

    @property
    def trace_id(self) -> str | None:
        """The trace id, 32 hexadecimal digits, or None if tracing is off."""
        return None if self._recording is None else self._recording.trace_id

    def event(self, name: str, /, **attributes: Value) -> None:
        """Record an event at the present time. An attribute `reason` becomes `headrace.reason`."""
        if self._recording is not None:
            self._recording.event(name, {names.HEADRACE + key: value for key, value in attributes.items()})

    def fail(self, error: Exception) -> None:
        """Mark the step as failed. `error.type` is the code of a `HeadraceError`, or the class of another exception."""
        if self._recording is None:
            return
        if isinstance(error, HeadraceError):
            self._recording.fail(str(error.code), error.message)
        else:
            self._recording.fail(type(error).__qualname__, str(error), unforeseen=error)


class ProcessSpan(Span):
    """The handling of one delivery."""

    __slots__ = ()

    @property
    def parent_context(self) -> str:
        """The context that the delivered message has in its trace, as `traceparent`; empty if tracing is off."""
        return "" if self._recording is None else self._recording.parent_context

    def queue_wait(
        self, envelope: Envelope, stored_at_s: float, *, attempt: int | None = None, reason: str = ""
    ) -> None:
        """Record how long the message was stored before this span began, as an attribute and as a span beside this one.

        Args:
            envelope: the request's.
            stored_at_s: when the broker stored it, UTC, unix seconds. If the clocks disagree so much that this is
                later, the wait is 0.
            attempt: the number of the attempt that begins; None for a message that was not delivered.
            reason: what happened in that time, if it was delivered before.
        """
        if self._recording is None:
            return
        wait_ms = max(0.0, self._recording.start_ns / 1e6 - stored_at_s * 1e3)
        deliveries = None if attempt is None else envelope.delivered
        known: dict[str, Value] = {
            names.MESSAGING_MESSAGE_ID: envelope.name,
            names.HEADRACE_ATTEMPT: attempt,
            names.HEADRACE_DELIVERIES: deliveries,
            names.HEADRACE_REASON: reason or None,
        }
        self._recording.set({names.HEADRACE_QUEUE_WAIT_MS: wait_ms, names.HEADRACE_DELIVERIES: deliveries})
        self._recording.beside("queue wait", stored_at_s, known)

    def served(self, reason: str) -> None:
        """An engine serves the request, for a reason in words."""
        if self._recording is not None:
            self._recording.set({names.HEADRACE_REASON: reason})

    def ended(self, outcome: Outcome) -> None:
        """Record how the request left this process, and why."""
        if self._recording is None:
            return
        self._recording.set(
            {
                names.HEADRACE_OUTCOME: ending.word(outcome),
                names.HEADRACE_OUTCOME_REASON: ending.reason(outcome) or None,
            }
        )
        if isinstance(closed := ending.closing(outcome), HeadraceError):
            self.fail(closed)


class ChatSpan(Span):
    """One generation."""

    __slots__ = ("_streams",)

    def __init__(self, recording: Recording | None = None, *, streams: bool = False) -> None:
        super().__init__(recording)
        self._streams = streams

    def first_chunk(self, after_s: float) -> None:
        """The first piece of the answer came after_s seconds after the engine was asked. Recorded for a stream only."""
        if self._recording is not None and self._streams:
            self._recording.set({names.GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK: after_s})

    def finish(self, reason: FinishReason, usage: Usage, *, model: str) -> None:
        """The answer is complete. Record why it ended, its token counts and its model."""
        if self._recording is not None:
            self._recording.set(
                {
                    names.GEN_AI_RESPONSE_FINISH_REASONS: [reason],
                    names.GEN_AI_RESPONSE_MODEL: model,
                    names.GEN_AI_USAGE_INPUT_TOKENS: usage.prompt_tokens,
                    names.GEN_AI_USAGE_OUTPUT_TOKENS: usage.completion_tokens,
                }
            )

    def cut_short(self, error_type: str, message: str, output_tokens: int) -> None:
        """The generation was stopped before its end. Record why, and how many tokens it made."""
        if self._recording is not None:
            self._recording.set(
                {
                    names.GEN_AI_RESPONSE_FINISH_REASONS: ["error"],
                    names.GEN_AI_USAGE_OUTPUT_TOKENS: output_tokens,
                }
            )
            self._recording.fail(error_type, message)

    def fail(self, error: Exception) -> None:
        """Mark the generation as failed."""
        if self._recording is not None:
            self._recording.set({names.GEN_AI_RESPONSE_FINISH_REASONS: ["error"]})
        super().fail(error)


class EmbeddingsSpan(Span):
    """One embeddings request."""

    __slots__ = ()

    def finish(self, prompt_tokens: int, *, model: str) -> None:
        """The texts are embedded. Record the token count and the model."""
        if self._recording is not None:
            self._recording.set({names.GEN_AI_RESPONSE_MODEL: model, names.GEN_AI_USAGE_INPUT_TOKENS: prompt_tokens})


class TriageSpan(Span):
    """One decision about a queued request."""

    __slots__ = ()

    def decision(
        self,
        task: Task,
        reason: str,
        *,
        move: Move | None,
        saturation: float | None = None,
        mlx_wait_ms: float | None = None,
        ollama_ms: float | None = None,
    ) -> None:
        """Record the decision, its reason and the figures behind it.

        Args:
            task: the class of the request.
            reason: in words, as in the `headrace` object of the answer.
            move: how it moves, or None if it stays.
            saturation: MLX's saturation, 1.0 is full.
            mlx_wait_ms: the predicted wait for MLX.
            ollama_ms: the predicted time that Ollama takes.
        """
        if self._recording is not None:
            self._recording.set(
                {
                    names.HEADRACE_TRIAGE_TASK: task,
                    names.HEADRACE_TRIAGE_REASON: reason,
                    names.HEADRACE_TRIAGE_MOVE: move or "stay",
                    names.HEADRACE_MLX_SATURATION: saturation,
                    names.HEADRACE_MLX_PREDICTED_WAIT_MS: mlx_wait_ms,
                    names.HEADRACE_OLLAMA_PREDICTED_MS: ollama_ms,
                }
            )
