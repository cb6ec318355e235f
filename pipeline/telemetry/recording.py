"""Recording of spans with the OpenTelemetry SDK, which sends them to a collector over OTLP. No other module imports it.

A collector that is slow, unreachable or broken costs spans and a line in the log, never a request. Spans wait in a
bounded queue (`OTEL_BSP_MAX_QUEUE_SIZE`) for a thread that sends them. When the queue is full, the oldest are dropped.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from contextvars import Token
from importlib import metadata
from typing import Literal

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from pipeline.telemetry import names
from pipeline.telemetry.names import Value

Kind = Literal["producer", "consumer", "internal", "client"]

_propagator = TraceContextTextMapPropagator()
_logger = logging.getLogger(__name__)


class Recorder:
    """Makes the spans of one process and sends them. OpenTelemetry's own environment variables configure it."""

    def __init__(self, service: str, instance: str) -> None:
        _quiet_the_sdk()
        resource = Resource.create(_identity(service, instance)).merge(OTELResourceDetector().detect())
        self._exporter = _Exporter()
        # Without shutdown_on_exit=False the SDK waits at interpreter exit, up to 30 s, for an unreachable collector.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("headrace")

    def start(
        self,
        name: str,
        kind: Kind,
        attributes: Mapping[str, Value],
        *,
        headers: Mapping[str, str] | None = None,
        adopt: bool = True,
    ) -> Recording:
        """Begin a span.

        With `adopt`, its parent is the current span. Without one, it is the span in headers, if any.
        """
        parent = otel_context.get_current() if adopt else Context()
        if headers and not trace.get_current_span(parent).get_span_context().is_valid:
            parent = _extract(headers)
        span = self._tracer.start_span(name, parent, SpanKind[kind.upper()], _known(attributes))
        return Recording(self._tracer, span)

    def shutdown(self, timeout_s: float) -> None:
        """Send the queued spans for at most timeout_s seconds. Spans not sent by then are lost."""
        flush = threading.Thread(target=self._provider.shutdown, name="telemetry shutdown", daemon=True)
        flush.start()
        flush.join(timeout_s)
        self._exporter.shutdown()  # interrupts the pause between two tries


class Recording:
    """One span that is being recorded."""

    __slots__ = ("_span", "_token", "_tracer")

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer = tracer
        self._span = span
        self._token: Token[Context] | None = None

    @property
    def trace_id(self) -> str:
        """The trace id: 32 hexadecimal digits."""
        return trace.format_trace_id(self._span.get_span_context().trace_id)

    def enter(self) -> None:
        """Make this span the parent of spans that begin later in this task and in the tasks that it starts."""
        self._token = otel_context.attach(trace.set_span_in_context(self._span))

    def exit(self) -> None:
        """End the span."""
        if self._token is not None:
            otel_context.detach(self._token)
        self._span.end()

    def inject(self, headers: dict[str, str]) -> None:
        """Write the span's context into headers. It replaces any other context there, in any letter case."""
        for name in [name for name in headers if name.lower() in _propagator.fields]:
            del headers[name]
        _propagator.inject(headers, trace.set_span_in_context(self._span))

    def set(self, attributes: Mapping[str, Value]) -> None:
        """Add attributes, except those that are None."""
        self._span.set_attributes(_known(attributes))

    def event(self, name: str, attributes: Mapping[str, Value]) -> None:
        """Add an event at the present time."""
        self._span.add_event(name, _known(attributes))

    def child(self, name: str, start_s: float, end_s: float) -> None:
        """Add a child span for something that has already ended. Times are in unix seconds."""
        parent = trace.set_span_in_context(self._span)
        self._tracer.start_span(name, parent, start_time=_ns(start_s)).end(_ns(end_s))

    def fail(self, error_type: str, message: str, *, unforeseen: Exception | None = None) -> None:
        """Set the status to ERROR. An unforeseen exception is recorded with its traceback."""
        self._span.set_attribute(names.ERROR_TYPE, error_type)
        self._span.set_status(Status(StatusCode.ERROR, message))
        if unforeseen is not None:
            self._span.record_exception(unforeseen)


class _Exporter(OTLPSpanExporter):
    """An exporter that logs the first delivery after failed ones, and whose shutdown is idempotent."""

    _ended = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = super().export(spans)
        if result is SpanExportResult.SUCCESS:
            _undelivered.settle()
        return result

    def shutdown(self) -> None:
        if not self._ended:
            self._ended = True
            super().shutdown()  # type: ignore[no-untyped-call]


class _Complaint(logging.Filter):
    """Passes one log record of several that the SDK writes each second, and no other until `settle` is called."""

    def __init__(self, message: str) -> None:
        super().__init__()
        self._message = message
        self._made = False

    def filter(self, record: logging.LogRecord) -> bool:
        if self._made:
            return False
        self._made = True
        record.msg, record.args = self._message, (record.getMessage(),)
        return True

    def settle(self) -> None:
        """Delivery works. The next failure is logged again."""
        if self._made:
            self._made = False
            _logger.warning("Traces are delivered again.")


_undelivered = _Complaint("Traces are not delivered; requests go on without them (%s).")
_overflowing = _Complaint("Spans are lost, because they arrive faster than they are delivered (%s).")


def _quiet_the_sdk() -> None:
    logging.getLogger("opentelemetry.exporter.otlp.proto.http.trace_exporter").addFilter(_undelivered)
    logging.getLogger("opentelemetry.sdk._shared_internal").addFilter(_overflowing)
    # These loggers write the `tracestate` that a publisher sent, unchecked, for every message.
    for name in ("opentelemetry.trace.span", "opentelemetry.trace.propagation.tracecontext"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _identity(service: str, instance: str) -> dict[str, str]:
    identity = {"service.name": service, "service.instance.id": instance}
    with suppress(metadata.PackageNotFoundError):  # a checkout that is not installed
        identity["service.version"] = metadata.version("headrace")
    return identity


def _extract(headers: Mapping[str, str]) -> Context:
    """The context in headers, or an empty one if it is unusable. NATS keeps the letter case of header names."""
    carried = {name.lower(): value for name, value in headers.items() if name.lower() in _propagator.fields}
    return _propagator.extract(carried, Context())


def _known(attributes: Mapping[str, Value]) -> dict[str, str | bool | int | float | list[str]]:
    return {name: value for name, value in attributes.items() if value is not None}


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
