"""Begins the spans of a request: their names, first attributes and parents.

Without a recorder, every span is a shared object that does nothing. With one, `recording` records and sends it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, Self
from urllib.parse import urlsplit

from pipeline.core import ending
from pipeline.core.attempts import LostAttempt
from pipeline.core.ending import Outcome
from pipeline.core.envelope import Envelope
from pipeline.core.origin import TraceOrigin, trace_origin
from pipeline.core.triage import Verdict
from pipeline.telemetry import names
from pipeline.telemetry.names import Value
from pipeline.telemetry.spans import ChatSpan, EmbeddingsSpan, ProcessSpan, Span, TriageSpan
from pipeline.wire.messages import EngineName
from pipeline.wire.requests import ChatRequest, EmbeddingRequest
from pipeline.wire.subjects import out_subject, reply_subject

if TYPE_CHECKING:
    from pipeline.telemetry.recording import Kind, Recorder

_logger = logging.getLogger(__name__)

_INBOX: Final = "_INBOX."
_PER_REQUEST: Final = (out_subject(""), reply_subject(""), _INBOX)


class Tracing:
    """Makes the spans of one process. No method raises, and none waits except `shutdown`.

    As a context manager it shuts down at the end. Use it around the event loop, not inside.

    Use each span in a `with` statement in one task. Spans opened inside the block, and in tasks started there, are its
    children. An exception that leaves the block marks the span as failed.
    """

    def __init__(self, recorder: Recorder | None = None) -> None:
        self._recorder = recorder

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    @classmethod
    def from_environment(cls, *, service: str, instance: str) -> Tracing:
        """Tracing as OpenTelemetry's environment variables configure it.

        It is on if `OTEL_EXPORTER_OTLP_ENDPOINT` or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` is set, unless
        `OTEL_SDK_DISABLED=true` or `OTEL_TRACES_EXPORTER=none`.

        Args:
            service: `service.name`, unless `OTEL_SERVICE_NAME` sets another.
            instance: `service.instance.id`, which distinguishes the processes of one service.
        """
        if not _is_wanted(os.environ):
            return cls()
        try:
            # Imported here so that the SDK costs nothing where tracing is off.
            from pipeline.telemetry.recording import Recorder

            return cls(Recorder(service, instance, _collector(os.environ)))
        except Exception as error:
            # The traceback would show the SDK's code alone.
            _logger.error("Tracing is off; requests go on without it (%s).", error)  # noqa: TRY400
            return cls()

    def use_clock(self, wall: Callable[[], float]) -> None:
        """Take the times of spans from a clock, UTC seconds. Until then they come from this machine's."""
        if self._recorder is not None:
            self._recorder.wall = wall

    def publish(
        self,
        subject: str,
        headers: dict[str, str] | None = None,
        *,
        request_id: str | None = None,
        verdict: Verdict | None = None,
    ) -> Span:
        """The span of sending a message. Its context is written into headers, and replaces any context there.

        Its parent is the current span. Without a current span it is the one in headers. Without either, a trace begins.

        Args:
            subject: where the message is sent.
            headers: the message's.
            request_id: the request's.
            verdict: the class that the publisher gives the request and the reason, if it does.
        """
        if self._recorder is None:
            return _SPAN
        recording = self._recorder.start(
            f"publish {_short(subject)}",
            "producer",
            _messaging("publish", "send", subject)
            | {
                names.MESSAGING_MESSAGE_ID: request_id,
                names.HEADRACE_TRIAGE_TASK: verdict.task if verdict else None,
                names.HEADRACE_TRIAGE_REASON: verdict.reason if verdict else None,
            },
            headers=headers,
        )
        if headers is not None:
            recording.inject(headers)
        return Span(recording)

    def process(
        self,
        subject: str,
        headers: Mapping[str, str] | None,
        envelope: Envelope,
        *,
        attempt: int = 1,
        stored_at_s: float = 0.0,
    ) -> ProcessSpan:
        """The span of handling one delivery. Its parent is the span in headers, or the first span of a derived trace.

        A redelivery is another such span in the same trace. `attempt` counts them from 1.

        Args:
            subject: of the delivered message.
            headers: of the delivered message.
            envelope: the request's.
            attempt: the number of this attempt.
            stored_at_s: when the broker stored the delivered message, UTC seconds. The span does not begin before.
        """
        if self._recorder is None:
            return _PROCESS
        attributes = _messaging("process", "process", subject) | _request(envelope) | {names.HEADRACE_ATTEMPT: attempt}
        return ProcessSpan(
            self._recorder.start(
                f"process {_short(subject)}",
                "consumer",
                attributes,
                headers=headers,
                origin=_origin(envelope),
                not_before_s=stored_at_s,
            )
        )

    def withdrawn(
        self, subject: str, headers: Mapping[str, str], envelope: Envelope, outcome: Outcome, *, stored_at_s: float
    ) -> None:
        """Record that a request which waited was ended in its queue: its wait, and the span of ending it.

        Args:
            subject: of the queued message.
            headers: of the queued message.
            envelope: the request's.
            outcome: how it ended.
            stored_at_s: when the broker stored the queued message, UTC seconds.
        """
        if self._recorder is None:
            return
        recording = self._recorder.start(
            f"withdraw {_short(subject)}",
            "client",
            _messaging("withdraw", "settle", subject) | _request(envelope),
            headers=headers,
            origin=_origin(envelope),
            not_before_s=stored_at_s,
        )
        with ProcessSpan(recording) as span:
            span.queue_wait(envelope, stored_at_s)
            span.ended(outcome)
        self.ended(headers, envelope, outcome)

    def ended(self, headers: Mapping[str, str], envelope: Envelope, outcome: Outcome) -> None:
        """This process has let go of a request. If that closed its record, and its trace is derived, record the first
        span of the trace: from when the request was first stored until now.

        Args:
            headers: those of the message that held the request at the end.
            envelope: the request's.
            outcome: how it ended.
        """
        closed = ending.closing(outcome)
        if self._recorder is None or closed is None or not self._recorder.is_first(headers, _origin(envelope)):
            return
        recording = self._recorder.first("request", _request(envelope), _origin(envelope), envelope.stored_at)
        with ProcessSpan(recording) as span:
            span.ended(outcome)

    def lost(self, attempt: LostAttempt) -> None:
        """Record an attempt whose worker did not say how it ended: from its begin until the loss was noticed."""
        if self._recorder is None:
            return
        known: dict[str, Value] = {
            names.MESSAGING_MESSAGE_ID: attempt.id,
            names.HEADRACE_ATTEMPT: attempt.attempt,
            names.HEADRACE_WORKER: attempt.worker,
            names.HEADRACE_OUTCOME: "lost",
            names.HEADRACE_OUTCOME_REASON: attempt.reason,
        }
        recording = self._recorder.past("attempt lost", known, {"traceparent": attempt.trace}, attempt.began_at)
        recording.fail("attempt_lost", f"Worker {attempt.worker} did not end its attempt: {attempt.reason}.")
        recording.exit(attempt.noticed_at)

    def chat(
        self,
        request: ChatRequest,
        *,
        request_id: str,
        engine: EngineName,
        model: str,
        server: str = "",
        provider: str = "",
    ) -> ChatSpan:
        """The span of one attempt of an engine to answer request with model.

        Args:
            request: the request.
            request_id: its id.
            engine: the engine.
            model: the engine's name of the model.
            server: the URL of the server that is the engine, if it is one.
            provider: the API of that server; by default the engine's name.
        """
        if self._recorder is None:
            return _CHAT
        attributes = (
            _generation(request)
            | _server(server)
            | {
                names.GEN_AI_PROVIDER_NAME: provider or engine,
                names.GEN_AI_REQUEST_MODEL: model,
                names.GEN_AI_RESPONSE_ID: request_id,
            }
        )
        return ChatSpan(self._recorder.start(f"chat {model}", _kind_of(engine), attributes), streams=request.streams)

    def embeddings(
        self,
        request: EmbeddingRequest,
        *,
        request_id: str,
        engine: EngineName,
        model: str,
        server: str = "",
        provider: str = "",
    ) -> EmbeddingsSpan:
        """The span of one attempt of an engine to embed the texts of request with model; arguments as of `chat`."""
        if self._recorder is None:
            return _EMBEDDINGS
        attributes = _server(server) | {
            names.GEN_AI_OPERATION_NAME: "embeddings",
            names.GEN_AI_PROVIDER_NAME: provider or engine,
            names.GEN_AI_REQUEST_MODEL: model,
            names.GEN_AI_RESPONSE_ID: request_id,
            names.GEN_AI_EMBEDDINGS_DIMENSION_COUNT: request.dimensions,
            names.GEN_AI_REQUEST_ENCODING_FORMATS: [request.encoding_format] if request.encoding_format else None,
        }
        return EmbeddingsSpan(self._recorder.start(f"embeddings {model}", _kind_of(engine), attributes))

    def triage(self) -> TriageSpan:
        """The span of deciding which engine a queued request may use."""
        if self._recorder is None:
            return _TRIAGE
        return TriageSpan(self._recorder.start("triage", "internal", {}))

    def shutdown(self, timeout_s: float = 2.0) -> None:
        """Send the queued spans for at most timeout_s seconds. Calling it again is safe.

        It blocks. Call it after the event loop has ended, or from another thread.
        """
        if self._recorder is not None:
            self._recorder.shutdown(timeout_s)


# Spans that record nothing. They have no state, so all callers share them.
_SPAN = Span()
_PROCESS = ProcessSpan()
_CHAT = ChatSpan()
_EMBEDDINGS = EmbeddingsSpan()
_TRIAGE = TriageSpan()


def _origin(envelope: Envelope) -> TraceOrigin:
    return trace_origin(envelope.name, envelope.created)


def _request(envelope: Envelope) -> dict[str, Value]:
    return {
        names.MESSAGING_MESSAGE_ID: envelope.name,
        names.HEADRACE_PRIORITY: envelope.priority,
        names.HEADRACE_TASK: envelope.task,
    }


def _server(url: str) -> dict[str, Value]:
    """The address of a server, as the conventions write it; nothing for an empty URL."""
    parts = urlsplit(url)
    return {names.SERVER_ADDRESS: parts.hostname, names.SERVER_PORT: parts.port} if parts.hostname else {}


def _kind_of(engine: EngineName) -> Kind:
    """Ollama is another server; MLX belongs to this process."""
    return "client" if engine == "ollama" else "internal"


def _is_wanted(environ: Mapping[str, str]) -> bool:
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() == "none":
        return False
    return bool(_collector(environ))


def _collector(environ: Mapping[str, str]) -> str:
    return environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or ""


def _short(subject: str) -> str:
    """The subject for a span's name, without the request's id: there should be few different span names."""
    for prefix in _PER_REQUEST:
        if subject.startswith(prefix):
            return prefix.removesuffix(".")
    return subject


def _messaging(name: str, kind: str, subject: str) -> dict[str, Value]:
    short = _short(subject)
    return {
        names.MESSAGING_SYSTEM: "nats",
        names.MESSAGING_OPERATION_NAME: name,
        names.MESSAGING_OPERATION_TYPE: kind,
        names.MESSAGING_DESTINATION_NAME: subject,
        names.MESSAGING_DESTINATION_TEMPLATE: subject if short == subject else f"{short}.{{id}}",
        names.MESSAGING_DESTINATION_TEMPORARY: True if subject.startswith(_INBOX) else None,
    }


def _generation(request: ChatRequest) -> dict[str, Value]:
    asked = request.response_format
    return {
        names.GEN_AI_OPERATION_NAME: "chat",
        names.GEN_AI_OUTPUT_TYPE: None if asked is None else "text" if asked.type == "text" else "json",
        names.GEN_AI_REQUEST_STREAM: True if request.streams else None,
        names.GEN_AI_REQUEST_MAX_TOKENS: request.token_limit,
        names.GEN_AI_REQUEST_TEMPERATURE: request.temperature,
        names.GEN_AI_REQUEST_TOP_P: request.top_p,
        names.GEN_AI_REQUEST_TOP_K: request.top_k,
        names.GEN_AI_REQUEST_SEED: request.seed,
        names.GEN_AI_REQUEST_STOP_SEQUENCES: request.stops or None,
        names.GEN_AI_REQUEST_PRESENCE_PENALTY: request.presence_penalty,
        names.GEN_AI_REQUEST_FREQUENCY_PENALTY: request.frequency_penalty,
    }
