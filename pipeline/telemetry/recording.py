"""The one home of the OpenTelemetry SDK: spans into the batch processor, from there over OTLP to a collector.

A collector that is slow, away or broken costs spans and a line in the log, never a request: spans wait in a
bounded queue (`OTEL_BSP_MAX_QUEUE_SIZE`) for a thread of their own; when it is full the oldest are dropped.
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
    """Makes one process's spans and sends them; how, is set by OpenTelemetry's own environment variables."""

    def __init__(self, service: str, instance: str) -> None:
        _mind_the_logs()
        resource = Resource.create(_identity(service, instance)).merge(OTELResourceDetector().detect())
        self._exporter = _Exporter()
        # Not at interpreter exit: the SDK would wait there for half a minute for a collector that is away.
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

        Its parent is the current span, if there is one and `adopt`; else the one that headers carry, if any.
        """
        parent = otel_context.get_current() if adopt else Context()
        if headers and not trace.get_current_span(parent).get_span_context().is_valid:
            parent = _extract(headers)
        span = self._tracer.start_span(name, parent, SpanKind[kind.upper()], _known(attributes))
        return Recording(self._tracer, span)

    def shutdown(self, timeout_s: float) -> None:
        """Send what is left, for at most timeout_s; what has not been sent by then is lost."""
        flush = threading.Thread(target=self._provider.shutdown, name="telemetry shutdown", daemon=True)
        flush.start()
        flush.join(timeout_s)
        self._exporter.shutdown()  # ends the pause between two tries


class Recording:
    """One span on its way."""

    __slots__ = ("_span", "_token", "_tracer")

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer = tracer
        self._span = span
        self._token: Token[Context] | None = None

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits."""
        return trace.format_trace_id(self._span.get_span_context().trace_id)

    def enter(self) -> None:
        """Become the parent of what begins from here on, in this task and the ones it starts."""
        self._token = otel_context.attach(trace.set_span_in_context(self._span))

    def exit(self) -> None:
        """End."""
        if self._token is not None:
            otel_context.detach(self._token)
        self._span.end()

    def inject(self, headers: dict[str, str]) -> None:
        """Write the span's context into headers, in the place of any other, whatever the case of its name."""
        for name in [name for name in headers if name.lower() in _propagator.fields]:
            del headers[name]
        _propagator.inject(headers, trace.set_span_in_context(self._span))

    def set(self, attributes: Mapping[str, Value]) -> None:
        """Add attributes; those that are None say nothing."""
        self._span.set_attributes(_known(attributes))

    def event(self, name: str, attributes: Mapping[str, Value]) -> None:
        """Add an event, now."""
        self._span.add_event(name, _known(attributes))

    def child(self, name: str, start_s: float, end_s: float) -> None:
        """Add a span for what is already over; times in unix seconds."""
        parent = trace.set_span_in_context(self._span)
        self._tracer.start_span(name, parent, start_time=_ns(start_s)).end(_ns(end_s))

    def fail(self, error_type: str, message: str, *, unforeseen: Exception | None = None) -> None:
        """Set the status to ERROR; an exception that nobody foresaw is recorded with its traceback."""
        self._span.set_attribute(names.ERROR_TYPE, error_type)
        self._span.set_status(Status(StatusCode.ERROR, message))
        if unforeseen is not None:
            self._span.record_exception(unforeseen)


class _Exporter(OTLPSpanExporter):
    """Notices when the collector is back, and may be shut down twice."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = super().export(spans)
        if result is SpanExportResult.SUCCESS:
            _undelivered.settle()
        return result

    def shutdown(self) -> None:
        if not self._shutdown:
            super().shutdown()  # type: ignore[no-untyped-call]


class _Complaint(logging.Filter):
    """Lets one record through, where the SDK writes several a second, and no other until settled."""

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
        """Delivery works (again)."""
        if self._made:
            self._made = False
            _logger.warning("traces are being delivered again")


_undelivered = _Complaint("traces are not being delivered, requests go on without them: %s")
_overflowing = _Complaint("spans come faster than they can be delivered, some are lost: %s")


def _mind_the_logs() -> None:
    logging.getLogger("opentelemetry.exporter.otlp.proto.http.trace_exporter").addFilter(_undelivered)
    logging.getLogger("opentelemetry.sdk._shared_internal").addFilter(_overflowing)
    # These write down what a publisher puts into its `tracestate`, whatever it is, at every message.
    for name in ("opentelemetry.trace.span", "opentelemetry.trace.propagation.tracecontext"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _identity(service: str, instance: str) -> dict[str, str]:
    identity = {"service.name": service, "service.instance.id": instance}
    with suppress(metadata.PackageNotFoundError):  # run from a checkout that is not installed
        identity["service.version"] = metadata.version("headrace")
    return identity


def _extract(headers: Mapping[str, str]) -> Context:
    """The context in headers, whose names NATS leaves in the publisher's own case; empty where unusable."""
    carried = {name.lower(): value for name, value in headers.items() if name.lower() in _propagator.fields}
    return _propagator.extract(carried, Context())


def _known(attributes: Mapping[str, Value]) -> dict[str, str | bool | int | float | list[str]]:
    return {name: value for name, value in attributes.items() if value is not None}


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
