"""An OTLP collector for tests: what any exporter sends over HTTP, decoded from the real protobuf.

It answers as the protocol says (https://opentelemetry.io/docs/specs/otlp/#otlphttp) on a free port of the
loopback interface, in threads of its own, so that whoever exports may block.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import threading
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2

_CONTENT_TYPE = "application/x-protobuf"
BROKEN = (DecodeError, OSError, EOFError, zlib.error)


@dataclass(frozen=True)
class Event:
    name: str
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Span:
    """One span as it was received; ids in hexadecimal, times in nanoseconds."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str | None
    trace_state: str
    start_ns: int
    end_ns: int
    status: str
    status_message: str
    attributes: dict[str, Any]
    events: list[Event]
    resource: dict[str, Any] = field(repr=False)


class Collector:
    """What has been received so far. Written by the server's threads, read by the test."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.encodings: list[str] = []
        self.endpoint = ""
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()

    def named(self, name: str) -> list[Span]:
        """The spans of that name, oldest first."""
        return sorted((span for span in self.spans if span.name == name), key=lambda span: span.start_ns)

    def one(self, name: str) -> Span:
        """The only span of that name."""
        (span,) = self.named(name)
        return span

    def children(self, parent: Span) -> list[Span]:
        """The spans right under parent, oldest first."""
        spans = [span for span in self.spans if span.parent_id == parent.span_id]
        return sorted(spans, key=lambda span: span.start_ns)

    def tree(self, trace_id: str) -> list[Any]:
        """The names of a trace as nested lists, `[name, child, ...]`; each top one has no received parent.

        A trace is connected when this holds one list.
        """
        spans = sorted((s for s in self.spans if s.trace_id == trace_id), key=lambda span: span.start_ns)
        known = {span.span_id for span in spans}

        def branch(span: Span) -> list[Any]:
            return [span.name, *(branch(child) for child in self.children(span))]

        return [branch(span) for span in spans if span.parent_id not in known]

    async def wait_for(self, condition: Callable[[Collector], object], *, timeout_s: float = 60.0) -> None:
        """Wait until condition holds for what has arrived."""
        async with asyncio.timeout(timeout_s):
            while not condition(self):
                self._arrived.clear()
                await self._arrived.wait()

    def receive(self, body: bytes, encoding: str) -> None:
        """Take in one export request; raises one of BROKEN for a body that is none."""
        spans = _spans(ExportTraceServiceRequest.FromString(_decompress(body, encoding)))

        def take() -> None:
            self.encodings.append(encoding)
            self.spans += spans
            self._arrived.set()

        self._loop.call_soon_threadsafe(take)


@contextlib.asynccontextmanager
async def collector() -> AsyncIterator[Collector]:
    """A running collector; its `endpoint` is what `OTEL_EXPORTER_OTLP_ENDPOINT` wants."""
    received = Collector()
    with _Server(received) as server:
        host, port = cast("tuple[str, int]", server.server_address)
        received.endpoint = f"http://{host}:{port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="otlp")
        thread.start()
        try:
            yield received
        finally:
            await asyncio.to_thread(server.shutdown)
            await asyncio.to_thread(thread.join)


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # closing waits for what is being answered

    def __init__(self, received: Collector) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.received = received


class _Handler(BaseHTTPRequestHandler):
    timeout = 10.0

    def do_POST(self) -> None:
        if self.path != "/v1/traces":
            self._answer(404)
        elif self.headers.get("Content-Type") != _CONTENT_TYPE:
            self._answer(415)
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            try:
                cast("_Server", self.server).received.receive(body, self.headers.get("Content-Encoding", ""))
            except BROKEN:
                self._answer(400)
            else:
                self._answer(200, ExportTraceServiceResponse().SerializeToString())

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Type", _CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class calls it so
        """Write nothing to standard error."""


def _decompress(body: bytes, encoding: str) -> bytes:
    if encoding == "gzip":
        return gzip.decompress(body)
    if encoding == "deflate":
        return zlib.decompress(body)
    return body


def _spans(request: ExportTraceServiceRequest) -> list[Span]:
    return [
        _span(span, _attributes(group.resource.attributes))
        for group in request.resource_spans
        for scope in group.scope_spans
        for span in scope.spans
    ]


def _span(span: trace_pb2.Span, resource: dict[str, Any]) -> Span:
    return Span(
        name=span.name,
        kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex() or None,
        trace_state=span.trace_state,
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        status=trace_pb2.Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_"),
        status_message=span.status.message,
        attributes=_attributes(span.attributes),
        events=[Event(event.name, _attributes(event.attributes)) for event in span.events],
        resource=resource,
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in cast("list[KeyValue]", pairs)}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind) if kind else None
