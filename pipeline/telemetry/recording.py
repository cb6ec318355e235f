"""Recording of spans with the OpenTelemetry SDK, which sends them to a collector over OTLP. No other module imports it.

A collector that is slow, unreachable or broken costs spans and a line in the log, never a request. Spans wait in a
bounded queue (`OTEL_BSP_MAX_QUEUE_SIZE`) for a thread that sends them. When the queue is full, the oldest are dropped.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import Token
from importlib import metadata
from typing import Literal
from urllib.parse import urlsplit

import requests
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from pipeline.core.origin import TraceOrigin
from pipeline.machine import is_local
from pipeline.telemetry import names
from pipeline.telemetry.names import Value

Kind = Literal["producer", "consumer", "internal", "client"]

_propagator = TraceContextTextMapPropagator()
_logger = logging.getLogger(__name__)


class Recorder:
    """Makes the spans of one process and sends them. OpenTelemetry's own environment variables configure it.

    Args:
        service, instance: of the process.
        collector: the URL that these variables name.

    Attributes:
        wall: the clock of the spans, UTC seconds.
    """

    def __init__(self, service: str, instance: str, collector: str) -> None:
        _quiet_the_sdk()
        resource = Resource.create(_identity(service, instance)).merge(OTELResourceDetector().detect())
        self.wall: Callable[[], float] = time.time
        self._exporter = _Exporter(collector)
        self._ids = _Ids()
        # Without shutdown_on_exit=False the SDK waits at interpreter exit, up to 30 s, for an unreachable collector.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False, id_generator=self._ids)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("headrace")

    def start(
        self,
        name: str,
        kind: Kind,
        attributes: Mapping[str, Value],
        *,
        headers: Mapping[str, str] | None = None,
        origin: TraceOrigin | None = None,
        not_before_s: float = 0.0,
    ) -> Recording:
        """Begin a span. Its parent is the current span; without one, the span in headers, if any.

        Args:
            name: of the span.
            kind: of the span.
            attributes: of the span.
            headers: those of a message.
            origin: that of the request. The parent is then the span in headers, or without one the origin's, whatever
                span is current.
            not_before_s: the span begins at this time if the clock shows an earlier one, UTC seconds.
        """
        parent = otel_context.get_current() if origin is None else Context()
        if not trace.get_current_span(parent).get_span_context().is_valid:
            parent = _extract(headers or {})
            if origin is not None and not trace.get_current_span(parent).get_span_context().is_valid:
                parent = self._context_of(origin)
        start_ns = max(self.now_ns(), _ns(not_before_s), _start_ns(trace.get_current_span(parent)))
        span = self._tracer.start_span(name, parent, SpanKind[kind.upper()], _known(attributes), start_time=start_ns)
        return Recording(self, self._tracer, span, parent, start_ns)

    def first(self, name: str, attributes: Mapping[str, Value], origin: TraceOrigin, start_s: float) -> Recording:
        """Begin the first span of a derived trace. Times are in unix seconds."""
        start_ns = _ns(start_s)
        with self._ids.fixed(origin):
            span = self._tracer.start_span(name, Context(), attributes=_known(attributes), start_time=start_ns)
        return Recording(self, self._tracer, span, Context(), start_ns)

    def past(self, name: str, attributes: Mapping[str, Value], headers: Mapping[str, str], start_s: float) -> Recording:
        """A span under the one in headers, for something that began at start_s, unix seconds."""
        parent, start_ns = _extract(headers), _ns(start_s)
        span = self._tracer.start_span(name, parent, attributes=_known(attributes), start_time=start_ns)
        return Recording(self, self._tracer, span, parent, start_ns)

    def is_first(self, headers: Mapping[str, str], origin: TraceOrigin) -> bool:
        """Whether a request with these headers belongs to the trace that is derived from it."""
        carried = trace.get_current_span(_extract(headers)).get_span_context()
        return not carried.is_valid or carried.trace_id == origin.trace_id

    def now_ns(self) -> int:
        """The clock of the spans, nanoseconds."""
        return _ns(self.wall())

    def _context_of(self, origin: TraceOrigin) -> Context:
        """The context of the first span of a derived trace, which the process that ends the request records.

        The sampler decides by the trace id, so every process comes to the same decision.
        """
        decision = self._provider.sampler.should_sample(Context(), origin.trace_id, "request").decision
        flags = TraceFlags(TraceFlags.SAMPLED if decision.is_sampled() else TraceFlags.DEFAULT)
        context = SpanContext(origin.trace_id, origin.span_id, is_remote=True, trace_flags=flags)
        return trace.set_span_in_context(NonRecordingSpan(context), Context())

    def shutdown(self, timeout_s: float) -> None:
        """Send the queued spans for at most timeout_s seconds. Spans not sent by then are lost."""
        flush = threading.Thread(target=self._provider.shutdown, name="telemetry shutdown", daemon=True)
        flush.start()
        flush.join(timeout_s)
        self._exporter.shutdown()  # interrupts the pause between two tries


class Recording:
    """One span that is being recorded.

    Attributes:
        start_ns: when it began, nanoseconds.
    """

    __slots__ = ("_parent", "_recorder", "_span", "_token", "_tracer", "start_ns")

    def __init__(
        self, recorder: Recorder, tracer: trace.Tracer, span: trace.Span, parent: Context, start_ns: int
    ) -> None:
        self._recorder = recorder
        self._tracer = tracer
        self._span = span
        self._parent = parent
        self._token: Token[Context] | None = None
        self.start_ns = start_ns

    @property
    def trace_id(self) -> str:
        """The trace id: 32 hexadecimal digits."""
        return trace.format_trace_id(self._span.get_span_context().trace_id)

    def enter(self) -> None:
        """Make this span the parent of spans that begin later in this task and in the tasks that it starts."""
        self._token = otel_context.attach(trace.set_span_in_context(self._span))

    def exit(self, end_s: float | None = None) -> None:
        """End the span, now or at a time in unix seconds."""
        if self._token is not None:
            otel_context.detach(self._token)
        end_ns = self._recorder.now_ns() if end_s is None else _ns(end_s)
        self._span.end(max(self.start_ns, end_ns))

    def inject(self, headers: dict[str, str]) -> None:
        """Write the span's context into headers. It replaces any other context there, in any letter case."""
        for name in [name for name in headers if name.lower() in _propagator.fields]:
            del headers[name]
        _propagator.inject(headers, trace.set_span_in_context(self._span))

    @property
    def parent_context(self) -> str:
        """The context of this span's parent, as `traceparent`."""
        headers: dict[str, str] = {}
        _propagator.inject(headers, self._parent)
        return headers.get("traceparent", "")

    def set(self, attributes: Mapping[str, Value]) -> None:
        """Add attributes, except those that are None."""
        self._span.set_attributes(_known(attributes))

    def event(self, name: str, attributes: Mapping[str, Value]) -> None:
        """Add an event at the present time."""
        self._span.add_event(name, _known(attributes), self._recorder.now_ns())

    def beside(self, name: str, start_s: float, attributes: Mapping[str, Value]) -> None:
        """Add a span with the same parent, for what ended when this span began. It began at start_s, unix seconds."""
        start_ns = min(_ns(start_s), self.start_ns)
        span = self._tracer.start_span(name, self._parent, attributes=_known(attributes), start_time=start_ns)
        span.end(self.start_ns)

    def fail(self, error_type: str, message: str, *, unforeseen: Exception | None = None) -> None:
        """Set the status to ERROR. An unforeseen exception is recorded with its traceback."""
        self._span.set_attribute(names.ERROR_TYPE, error_type)
        self._span.set_status(Status(StatusCode.ERROR, message))
        if unforeseen is not None:
            self._span.record_exception(unforeseen)


class _Ids(RandomIdGenerator):
    """Random ids, except for the first span of a derived trace. Spans begin in the event loop's thread only."""

    def __init__(self) -> None:
        self._fixed: TraceOrigin | None = None

    @contextmanager
    def fixed(self, origin: TraceOrigin) -> Iterator[None]:
        """Give the span that begins in the block these ids."""
        self._fixed = origin
        try:
            yield
        finally:
            self._fixed = None

    def generate_trace_id(self) -> int:
        return self._fixed.trace_id if self._fixed is not None else super().generate_trace_id()

    def generate_span_id(self) -> int:
        return self._fixed.span_id if self._fixed is not None else super().generate_span_id()


class _Exporter(OTLPSpanExporter):
    """An exporter that logs the first delivery after failed ones, and whose shutdown is idempotent.

    A collector on this machine is called directly: requests would use the environment's proxies.
    """

    _ended = False

    def __init__(self, collector: str) -> None:
        session = requests.Session()
        session.trust_env = not is_local(urlsplit(collector).hostname or "")
        super().__init__(session=None if session.trust_env else session)

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


def _start_ns(span: trace.Span) -> int:
    """When a span of this process began; 0 for another process's."""
    return (span.start_time or 0) if isinstance(span, ReadableSpan) else 0


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
