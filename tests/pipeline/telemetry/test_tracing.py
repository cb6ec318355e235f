"""Traces as a collector receives them from the real exporter, and none where tracing is off."""

from __future__ import annotations

import ast
import asyncio
import importlib
import itertools
import logging
import re
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.core.ending import Failed, Returned
from pipeline.core.envelope import Envelope
from pipeline.core.origin import trace_origin
from pipeline.telemetry import ProcessSpan, Tracing, names
from pipeline.wire.answers import Usage
from pipeline.wire.constraints import ResponseFormat
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatRequest, EmbeddingRequest
from pipeline.wire.subjects import Move, Priority, Task
from tests.otlp import Collector, collector

FOREIGN_TRACE = "0af7651916cd43dd8448eb211c80319c"
FOREIGN_SPAN = "b7ad6b7169203331"
SAMPLED = f"00-{FOREIGN_TRACE}-{FOREIGN_SPAN}-01"
NOT_SAMPLED = f"00-{FOREIGN_TRACE}-{FOREIGN_SPAN}-00"

# Long enough for a collector that answers, on the busiest machine.
PATIENCE_S = 60.0

ENVELOPE = Envelope("r-1", Priority.HIGH, Task.UNTRIAGED, stored_at=1000.0, delivered=1)
ORIGIN = trace_origin("r-1", 1000)

NewTracing = Callable[[str], Tracing]


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in os.environ:
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


@pytest.fixture
async def traces(clean_environment: None, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Collector]:
    async with collector() as running:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", running.endpoint)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        yield running


@pytest.fixture
async def role(traces: Collector) -> AsyncIterator[NewTracing]:
    """Makes the tracing of one role, as its process would."""
    made: list[Tracing] = []

    def make(service: str) -> Tracing:
        made.append(Tracing.from_environment(service=service, instance=f"{service}-1"))
        return made[-1]

    yield make
    for tracing in made:
        await asyncio.to_thread(tracing.shutdown, PATIENCE_S)


def process(tracing: Tracing, headers: dict[str, str] | None, *, attempt: int = 1) -> ProcessSpan:
    return tracing.process("llm.request.high", headers, ENVELOPE, attempt=attempt)


def process_on_ollama(tracing: Tracing, headers: dict[str, str]) -> ProcessSpan:
    return tracing.process("llm.ollama.high", headers, ENVELOPE)


def a_request() -> ChatRequest:
    return ChatRequest(prompt="Why is the sky blue?", stream=True, max_tokens=64, temperature=0.5, seed=7, stop=["\n"])


# ---- one trace -------------------------------------------------------------------------------------------------------


async def test_a_request_is_one_tree_from_publish_to_reply(traces: Collector, role: NewTracing) -> None:
    gateway, mlx = role("headrace-gateway"), role("headrace-mlx")
    headers: dict[str, str] = {}
    with gateway.publish("llm.request.high", headers, request_id="r-1") as published:
        trace_id = published.trace_id
    now_s = time.time()
    with process(mlx, headers) as processed:
        assert processed.trace_id == trace_id
        processed.queue_wait(ENVELOPE, now_s - 0.25)
        with mlx.chat(a_request(), request_id="r-1", engine="mlx", model="demo") as chat:
            chat.first_chunk(0.125)
            chat.finish("stop", Usage(prompt_tokens=5, completion_tokens=9, total_tokens=14), model="demo")
        with mlx.publish("llm.reply.r-1", request_id="r-1"):
            pass

    await traces.wait_for(lambda seen: seen.named("process llm.request.high"))
    await traces.wait_for(lambda seen: seen.named("publish llm.request.high"))
    assert trace_id is not None
    assert traces.tree(trace_id) == [
        [
            "publish llm.request.high",
            ["queue wait"],
            ["process llm.request.high", ["chat demo"], ["publish llm.reply"]],
        ]
    ]
    kinds = {span.name: span.kind for span in traces.spans}
    assert kinds == {
        "publish llm.request.high": "PRODUCER",
        "process llm.request.high": "CONSUMER",
        "queue wait": "INTERNAL",
        "chat demo": "INTERNAL",
        "publish llm.reply": "PRODUCER",
    }
    assert {span.status for span in traces.spans} == {"UNSET"}


async def test_a_spilled_request_is_one_tree_through_the_routing_consumer(traces: Collector, role: NewTracing) -> None:
    router, ollama = role("headrace-router"), role("headrace-ollama")
    headers = {"traceparent": SAMPLED, "tracestate": "vendor=a"}
    with process(router, headers), router.triage() as triage:
        triage.decision(
            Task.SIMPLE,
            "short question",
            move=Move.SPILLED,
            saturation=1.5,
            mlx_wait_ms=4000.0,
            ollama_ms=300.0,
        )
        with router.publish("llm.ollama.high", headers, request_id="r-1"):
            pass
    with (
        process_on_ollama(ollama, headers),
        ollama.chat(a_request(), request_id="r-1", engine="ollama", model="demo:1b"),
    ):
        pass

    await traces.wait_for(lambda seen: len(seen.spans) == 5)
    assert traces.tree(FOREIGN_TRACE) == [
        [
            "process llm.request.high",
            ["triage", ["publish llm.ollama.high", ["process llm.ollama.high", ["chat demo:1b"]]]],
        ]
    ]
    assert traces.one("process llm.request.high").parent_id == FOREIGN_SPAN
    assert traces.one("chat demo:1b").kind == "CLIENT"
    assert traces.one("triage").attributes == {
        "headrace.triage.task": "simple",
        "headrace.triage.reason": "short question",
        "headrace.triage.move": "spilled",
        "headrace.mlx.saturation": 1.5,
        "headrace.mlx.predicted_wait_ms": 4000.0,
        "headrace.ollama.predicted_ms": 300.0,
    }
    assert headers["tracestate"] == "vendor=a"
    assert {span.trace_state for span in traces.spans} == {"vendor=a"}


REFUSED = Failed(HeadraceError(ErrorCode.CANCELLED, "Request r-1 was cancelled before it started."))


async def test_a_request_without_a_trace_is_one_tree_that_each_process_finds_by_itself(
    traces: Collector, role: NewTracing
) -> None:
    """A worker that dies, a router that moves the request, and the worker of the other engine, which ends it."""
    first, router, ollama = role("headrace-mlx"), role("headrace-router"), role("headrace-ollama")
    process(first, {}).queue_wait(ENVELOPE, 1000.0)  # nothing more is heard of this one: it is never ended
    headers: dict[str, str] = {}
    with process(router, headers, attempt=2) as routed, router.publish("llm.ollama.high", headers):
        router.ended({}, ENVELOPE, Returned())
    with process_on_ollama(ollama, headers) as span:
        ended = REFUSED
        span.ended(ended)
        ollama.ended(headers, ENVELOPE, ended)
    await traces.wait_for(lambda seen: len(seen.spans) == 5)
    assert routed.trace_id == f"{ORIGIN.trace_id:032x}"
    assert traces.tree(routed.trace_id) == [
        [
            "request",
            ["queue wait"],
            ["process llm.request.high", ["publish llm.ollama.high", ["process llm.ollama.high"]]],
        ]
    ]
    request = traces.one("request")
    assert (request.span_id, request.start_ns) == (f"{ORIGIN.span_id:016x}", 1000 * 10**9)
    assert request.attributes == {
        "messaging.message.id": "r-1",
        "headrace.priority": "high",
        "headrace.task": "untriaged",
        "headrace.outcome": "cancelled",
        "headrace.outcome.reason": "Request r-1 was cancelled before it started.",
        "error.type": "cancelled",
    }


async def test_a_request_that_is_withdrawn_says_why_and_how_long_it_waited(traces: Collector, role: NewTracing) -> None:
    monitor = role("headrace-monitor")
    monitor.withdrawn("llm.request.high", {}, ENVELOPE, REFUSED, stored_at_s=1000.5)
    await traces.wait_for(lambda seen: len(seen.spans) == 3)
    assert traces.tree(f"{ORIGIN.trace_id:032x}") == [["request", ["queue wait"], ["withdraw llm.request.high"]]]
    assert traces.one("queue wait").start_ns == 1_000_500_000_000
    assert traces.one("queue wait").attributes == {"messaging.message.id": "r-1"}
    withdrawn = traces.one("withdraw llm.request.high")
    assert withdrawn.attributes["messaging.operation.type"] == "settle"
    assert withdrawn.attributes["headrace.outcome"] == withdrawn.attributes["error.type"] == "cancelled"
    assert withdrawn.attributes["headrace.outcome.reason"] == "Request r-1 was cancelled before it started."


@pytest.mark.parametrize("headers", [{"traceparent": SAMPLED}, {"Traceparent": SAMPLED}])
async def test_the_first_span_of_a_publishers_own_trace_is_the_publishers(
    traces: Collector, role: NewTracing, headers: dict[str, str]
) -> None:
    monitor = role("headrace-monitor")
    monitor.withdrawn("llm.request.high", headers, ENVELOPE, REFUSED, stored_at_s=1000.0)
    with monitor.triage():  # sent after the others
        pass
    await traces.wait_for(lambda seen: seen.named("triage"))
    assert {span.name for span in traces.spans} == {"queue wait", "withdraw llm.request.high", "triage"}
    assert {span.parent_id for span in traces.spans} == {FOREIGN_SPAN, None}


async def test_a_sampler_that_drops_traces_drops_a_derived_one_in_every_process(
    traces: Collector, role: NewTracing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")
    mlx, router, kept = role("headrace-mlx"), role("headrace-router"), set()
    for number in range(40):
        envelope = replace(ENVELOPE, id=f"r-{number}")
        with mlx.process("llm.request.high", {}, envelope) as span:
            kept.add(span.trace_id)
        router.ended({}, envelope, REFUSED)

    def whole(seen: Collector) -> bool:
        first = {span.trace_id for span in seen.named("request")}
        return first == {span.trace_id for span in seen.named("process llm.request.high")} != set()

    await traces.wait_for(whole)
    assert {span.trace_id for span in traces.spans} < kept


async def test_a_redelivery_is_another_process_span_of_the_same_trace(traces: Collector, role: NewTracing) -> None:
    mlx = role("headrace-mlx")
    for attempt in (1, 2):
        with process(mlx, {"traceparent": SAMPLED}, attempt=attempt):
            pass
    await traces.wait_for(lambda seen: len(seen.spans) == 2)
    spans = traces.named("process llm.request.high")
    assert [span.attributes["headrace.attempt"] for span in spans] == [1, 2]
    assert {(span.trace_id, span.parent_id) for span in spans} == {(FOREIGN_TRACE, FOREIGN_SPAN)}


async def test_requests_served_at_once_in_tasks_keep_their_traces_apart(traces: Collector, role: NewTracing) -> None:
    mlx = role("headrace-mlx")
    all_began = asyncio.Barrier(8)

    async def serve(number: int) -> None:
        envelope = replace(ENVELOPE, id=f"r-{number}")
        with mlx.process("llm.request.high", None, envelope):
            await all_began.wait()
            async with asyncio.TaskGroup() as group:
                group.create_task(generate())

    async def generate() -> None:
        with mlx.chat(a_request(), request_id="r-1", engine="mlx", model="demo"):
            await all_began.wait()

    async with asyncio.TaskGroup() as group:
        for number in range(8):
            group.create_task(serve(number))
    await traces.wait_for(lambda seen: len(seen.spans) == 16)
    trace_ids = {span.trace_id for span in traces.spans}
    assert len(trace_ids) == 8
    assert all(traces.tree(each) == [["process llm.request.high", ["chat demo"]]] for each in trace_ids)


# ---- what the spans say ----------------------------------------------------------------------------------------------


async def test_messaging_spans_say_where_what_and_how(traces: Collector, role: NewTracing) -> None:
    mlx = role("headrace-mlx")
    with process(mlx, None) as span:
        span.queue_wait(replace(ENVELOPE, delivered=2), 1000.0, attempt=2, reason="1 of its deliveries returned it")
        span.event("preempted", reason="a high request came", tokens=12, nothing=None)
    with mlx.publish("_INBOX.abc.1"):
        pass
    await traces.wait_for(lambda seen: len(seen.spans) == 3)
    received = traces.one("process llm.request.high")
    assert received.attributes == {
        "messaging.system": "nats",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "llm.request.high",
        "messaging.destination.template": "llm.request.high",
        "messaging.message.id": "r-1",
        "headrace.priority": "high",
        "headrace.task": "untriaged",
        "headrace.attempt": 1,
        "headrace.deliveries": 2,
        "headrace.queue_wait_ms": (received.start_ns - 1e12) / 1e6,
    }
    (event,) = received.events
    assert event.name == "preempted"
    assert event.attributes == {"headrace.reason": "a high request came", "headrace.tokens": 12}
    waited = traces.one("queue wait")
    assert (waited.start_ns, waited.end_ns, waited.parent_id) == (10**12, received.start_ns, received.parent_id)
    assert waited.attributes == {
        "messaging.message.id": "r-1",
        "headrace.attempt": 2,
        "headrace.deliveries": 2,
        "headrace.reason": "1 of its deliveries returned it",
    }
    assert traces.one("publish _INBOX").attributes == {
        "messaging.system": "nats",
        "messaging.operation.name": "publish",
        "messaging.operation.type": "send",
        "messaging.destination.name": "_INBOX.abc.1",
        "messaging.destination.template": "_INBOX.{id}",
        "messaging.destination.temporary": True,
    }


async def test_a_broker_whose_clock_is_ahead_makes_no_negative_wait(traces: Collector, role: NewTracing) -> None:
    tracing = role("headrace-mlx")
    tracing.use_clock(lambda: 1000.0)
    with tracing.process("llm.request.high", None, ENVELOPE, stored_at_s=1001.0) as span:
        span.queue_wait(ENVELOPE, 1001.0)
    await traces.wait_for(lambda seen: len(seen.spans) == 2)
    received, waited = traces.one("process llm.request.high"), traces.one("queue wait")
    assert received.attributes["headrace.queue_wait_ms"] == 0.0
    assert waited.start_ns == waited.end_ns == received.start_ns == received.end_ns == 1001 * 10**9


async def test_a_generation_is_described_by_the_genai_conventions(traces: Collector, role: NewTracing) -> None:
    mlx = role("headrace-mlx")
    with mlx.chat(a_request(), request_id="r-1", engine="mlx", model="demo") as chat:
        chat.first_chunk(0.125)
        chat.finish("length", Usage(prompt_tokens=5, completion_tokens=64, total_tokens=69), model="demo")
    wants_json = ChatRequest(prompt="x", response_format=ResponseFormat(type="json_object"))
    with mlx.chat(wants_json, request_id="r-2", engine="ollama", model="other", server="http://10.0.0.7:11434") as chat:
        chat.first_chunk(0.125)
        chat.cut_short("cancelled", "Request r-2 was cancelled.", 3)
    await traces.wait_for(lambda seen: len(seen.spans) == 2)
    assert traces.one("chat demo").attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "mlx",
        "gen_ai.request.model": "demo",
        "gen_ai.request.stream": True,
        "gen_ai.request.max_tokens": 64,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 7,
        "gen_ai.request.stop_sequences": ["\n"],
        "gen_ai.response.id": "r-1",
        "gen_ai.response.model": "demo",
        "gen_ai.response.time_to_first_chunk": 0.125,
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 64,
    }
    other = traces.one("chat other")
    assert other.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "ollama",
        "gen_ai.output.type": "json",
        "gen_ai.request.model": "other",
        "gen_ai.response.id": "r-2",
        "gen_ai.response.finish_reasons": ["error"],
        "gen_ai.usage.output_tokens": 3,
        "server.address": "10.0.0.7",
        "server.port": 11434,
        "error.type": "cancelled",
    }
    assert (other.status, other.status_message) == ("ERROR", "Request r-2 was cancelled.")
    assert "Why is the sky blue?" not in repr(traces.spans)


async def test_embeddings_are_described_by_the_genai_conventions(traces: Collector, role: NewTracing) -> None:
    request = EmbeddingRequest(["a secret"], dimensions=256, encoding_format="base64")
    with role("headrace-ollama").embeddings(request, request_id="r-1", engine="ollama", model="e") as span:
        span.finish(2, model="e")
    await traces.wait_for(lambda seen: len(seen.spans) == 1)
    assert traces.one("embeddings e").kind == "CLIENT"
    assert traces.one("embeddings e").attributes == {
        "gen_ai.operation.name": "embeddings",
        "gen_ai.provider.name": "ollama",
        "gen_ai.request.model": "e",
        "gen_ai.response.id": "r-1",
        "gen_ai.response.model": "e",
        "gen_ai.embeddings.dimension.count": 256,
        "gen_ai.request.encoding_formats": ["base64"],
        "gen_ai.usage.input_tokens": 2,
    }
    assert "secret" not in repr(traces.spans)


async def test_a_failure_is_recorded_with_its_code(traces: Collector, role: NewTracing) -> None:
    mlx = role("headrace-mlx")
    failure = HeadraceError(ErrorCode.CONTEXT_LENGTH_EXCEEDED, "r-1 has 9000 tokens: send at most 4096")
    with (
        pytest.raises(HeadraceError),
        process(mlx, None),
        mlx.chat(a_request(), request_id="r-1", engine="mlx", model="demo"),
    ):
        raise failure
    await traces.wait_for(lambda seen: len(seen.spans) == 2)
    for span in traces.spans:
        assert (span.status, span.status_message) == ("ERROR", failure.message)
        assert span.attributes["error.type"] == "context_length_exceeded"
        assert span.events == []


async def test_an_unforeseen_exception_is_recorded_with_its_traceback(traces: Collector, role: NewTracing) -> None:
    with process(role("headrace-mlx"), None) as span:
        try:
            int("absent")
        except ValueError as error:
            span.fail(error)
    await traces.wait_for(lambda seen: seen.spans)
    (received,) = traces.spans
    assert (received.status, received.attributes["error.type"]) == ("ERROR", "ValueError")
    assert Path(__file__).name in received.events[0].attributes["exception.stacktrace"]


async def test_a_cancelled_task_is_interrupted_and_not_failed(traces: Collector, role: NewTracing) -> None:
    mlx = role("headrace-mlx")
    begun = asyncio.Event()

    async def serve() -> None:
        with process(mlx, None):
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(serve())
    await begun.wait()
    task.cancel()
    await asyncio.wait([task])
    await traces.wait_for(lambda seen: seen.spans)
    (span,) = traces.spans
    assert (span.status, [event.name for event in span.events]) == ("UNSET", ["interrupted"])


async def test_the_resource_tells_the_roles_apart(
    traces: Collector, role: NewTracing, monkeypatch: pytest.MonkeyPatch
) -> None:
    with process(role("headrace-mlx"), None):
        pass
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=lab")
    with role("headrace-router").triage():
        pass
    await traces.wait_for(lambda seen: len(seen.spans) == 2)
    resource = traces.one("process llm.request.high").resource
    assert (resource["service.name"], resource["service.instance.id"]) == ("headrace-mlx", "headrace-mlx-1")
    resource = traces.one("triage").resource
    assert (resource["service.name"], resource["deployment.environment.name"]) == ("ours", "lab")


# ---- context from elsewhere ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["traceparent", "Traceparent", "TRACEPARENT"])
async def test_a_foreign_publishers_trace_is_joined_in_any_case_of_its_name(
    traces: Collector, role: NewTracing, name: str
) -> None:
    headers = {name: SAMPLED, name.replace("parent", "state").replace("PARENT", "STATE"): "vendor=a"}
    mlx = role("headrace-mlx")
    with process(mlx, headers), mlx.publish("llm.ollama.high", headers):
        pass
    await traces.wait_for(lambda seen: len(seen.spans) == 2)
    assert traces.one("process llm.request.high").parent_id == FOREIGN_SPAN
    published = traces.one("publish llm.ollama.high")
    assert headers == {
        "traceparent": f"00-{FOREIGN_TRACE}-{published.span_id}-01",
        "tracestate": "vendor=a",
    }


async def test_a_bridge_outside_of_any_span_goes_on_with_the_askers_trace(traces: Collector, role: NewTracing) -> None:
    headers = {"traceparent": SAMPLED}
    with role("headrace-gateway").publish("llm.request.high", headers):
        pass
    await traces.wait_for(lambda seen: seen.spans)
    (span,) = traces.spans
    assert (span.trace_id, span.parent_id) == (FOREIGN_TRACE, FOREIGN_SPAN)


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "nonsense",
        "00-" + "0" * 32 + "-" + FOREIGN_SPAN + "-01",
        "00-" + FOREIGN_TRACE + "-" + "0" * 16 + "-01",
        "ff" + SAMPLED[2:],
        SAMPLED.upper(),
        SAMPLED + "-more",
        "\x00\udcff",
        SAMPLED * 100,
    ],
)
async def test_a_malformed_traceparent_begins_a_trace_and_writes_no_log(
    traces: Collector, role: NewTracing, caplog: pytest.LogCaptureFixture, traceparent: str
) -> None:
    headers = {"traceparent": traceparent, "tracestate": "vendor=stale"}
    mlx = role("headrace-mlx")
    with process(mlx, headers), mlx.publish("llm.ollama.high", headers):
        pass
    await traces.wait_for(lambda seen: len(seen.spans) == 2)
    processed = traces.one("process llm.request.high")
    assert processed.trace_id == f"{ORIGIN.trace_id:032x}"
    assert headers["traceparent"].split("-")[1] == processed.trace_id
    assert "tracestate" not in headers
    assert caplog.records == []


@pytest.mark.parametrize("tracestate", ["=\n\x00 = ,,", "k=v,k=v", "a=" + "b" * 9000, "\udcff=1"])
async def test_a_malformed_tracestate_is_dropped_alone_and_writes_no_log(
    traces: Collector, role: NewTracing, caplog: pytest.LogCaptureFixture, tracestate: str
) -> None:
    with process(role("headrace-mlx"), {"traceparent": SAMPLED, "tracestate": tracestate}):
        pass
    await traces.wait_for(lambda seen: seen.spans)
    (span,) = traces.spans
    assert (span.trace_id, span.trace_state) == (FOREIGN_TRACE, "")
    assert caplog.records == []


async def test_a_publisher_that_does_not_sample_is_respected(traces: Collector, role: NewTracing) -> None:
    mlx = role("headrace-mlx")
    headers = {"traceparent": NOT_SAMPLED}
    with process(mlx, headers) as span:
        assert span.trace_id == FOREIGN_TRACE
        span.queue_wait(ENVELOPE, 1.0)
        with mlx.publish("llm.ollama.high", headers):
            pass
    with mlx.triage():  # sampled, and sent after the others
        pass
    await asyncio.to_thread(mlx.shutdown, PATIENCE_S)
    await traces.wait_for(lambda seen: seen.named("triage"))
    assert [span.name for span in traces.spans] == ["triage"]
    assert headers["traceparent"].startswith(f"00-{FOREIGN_TRACE}-")
    assert headers["traceparent"].endswith("-00")


# ---- on, off, and a collector that is not there ----------------------------------------------------------------------


async def test_spans_come_compressed_where_the_environment_says_so(
    traces: Collector, role: NewTracing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    with role("headrace-mlx").triage():
        pass
    await traces.wait_for(lambda seen: seen.named("triage"))
    assert set(traces.encodings) == {"gzip"}


async def test_shutdown_sends_what_is_left_and_may_be_called_twice(
    traces: Collector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    tracing = Tracing.from_environment(service="headrace-send", instance="1")
    with tracing.publish("llm.request.low"):
        pass
    tracing.shutdown(PATIENCE_S)
    tracing.shutdown(PATIENCE_S)
    await traces.wait_for(lambda seen: seen.named("publish llm.request.low"))
    assert caplog.records == []


_OFF = """
import sys, threading
from pipeline.wire.answers import Usage
from pipeline.wire.requests import ChatRequest
from pipeline.wire.subjects import Move, Priority, Task
from pipeline.core.ending import Failed
from pipeline.core.envelope import Envelope
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.telemetry import Tracing

tracing = Tracing.from_environment(service="headrace-mlx", instance="1")
headers = {"traceparent": "theirs"}
tracing.use_clock(lambda: 0.0)
envelope = Envelope("r", Priority.LOW, Task.SIMPLE, stored_at=1.0, delivered=1)
ended = Failed(HeadraceError(ErrorCode.CANCELLED, "x"))
tracing.withdrawn("llm.request.low", headers, envelope, ended, stored_at_s=1.0)
tracing.ended(headers, envelope, ended)
with tracing.process("llm.request.low", headers, envelope) as span:
    span.queue_wait(envelope, 1.0)
    span.served("x")
    span.ended(ended)
    assert span.parent_context == ""
    span.event("preempted", reason="x")
    span.fail(ValueError())
    assert span.trace_id is None
    with tracing.triage() as triage:
        triage.decision(Task.SIMPLE, "short", move=Move.SPILLED)
    with tracing.publish("llm.ollama.low", headers):
        pass
    with tracing.chat(ChatRequest(prompt="x"), request_id="r", engine="mlx", model="m") as chat:
        chat.first_chunk(1.0)
        chat.finish("stop", Usage(1, 1, 2), model="m")
        chat.cut_short("cancelled", "x", 1)
tracing.shutdown()
assert headers == {"traceparent": "theirs"}, headers
loaded = {name.partition(".")[0] for name in sys.modules} & {"opentelemetry", "google", "requests"}
assert not loaded, loaded
assert threading.active_count() == 1, threading.enumerate()
"""


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "TRUE"},
        {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:9", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_telemetry_that_is_off_imports_and_starts_nothing(environ: dict[str, str]) -> None:
    _run(_OFF, environ)


_DEAD = """
import logging, sys, time
from pipeline.telemetry import Tracing, recording

logging.basicConfig(format="%(message)s", stream=sys.stdout)
tracing = Tracing.from_environment(service="headrace-mlx", instance="1")
for number in range(5000):
    with tracing.triage():
        pass
while not recording._undelivered._made:  # a thread sends them, which has its turn when the machine has time
    time.sleep(0.01)
tracing.shutdown(timeout_s=0.5)
tracing.shutdown(timeout_s=0.5)
with tracing.triage():
    pass
"""


def test_a_dead_collector_costs_one_line_for_each_kind_of_loss() -> None:
    lines = _run(_DEAD, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_BSP_MAX_QUEUE_SIZE": "1024"})
    delivery, overflow = "Traces are not delivered", "Spans are lost"
    assert sum(line.startswith(delivery) for line in lines) == 1
    assert sum(line.startswith(overflow) for line in lines) == 1
    assert len(lines) == 2, lines


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:1", "socks5h://127.0.0.1:1", "nonsense"])
async def test_a_proxy_of_the_environment_is_not_asked_for_a_collector_on_this_machine(
    traces: Collector, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    tracing = Tracing.from_environment(service="headrace-mlx", instance="1")
    with tracing.triage():
        pass
    await asyncio.to_thread(tracing.shutdown, PATIENCE_S)
    await traces.wait_for(lambda seen: seen.named("triage"))


_SILENT = """
import threading
from pipeline.telemetry import Tracing

tracing = Tracing.from_environment(service="headrace-mlx", instance="1")
with tracing.triage():
    pass
tracing.shutdown(timeout_s=0.1)
print([thread.name for thread in threading.enumerate() if "telemetry" in thread.name])
"""


def test_a_collector_that_never_answers_does_not_hold_up_the_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environ = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "3600",
        }
        # The SDK still waits for the collector, half a minute by itself; the program has gone on without it.
        assert _run(_SILENT, environ) == ["['telemetry shutdown']"]


async def test_a_collector_that_comes_back_is_noticed(
    traces: Collector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from pipeline.telemetry import recording

    monkeypatch.setattr(recording._undelivered, "_made", False)
    good = traces.endpoint
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", good + "/elsewhere")  # 404: nothing that one would retry
    lost = Tracing.from_environment(service="headrace-mlx", instance="1")
    with lost.triage():
        pass
    lost.shutdown(PATIENCE_S)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", good)
    found = Tracing.from_environment(service="headrace-mlx", instance="1")
    with found.triage():
        pass
    found.shutdown(PATIENCE_S)
    await traces.wait_for(lambda seen: seen.named("triage"))
    assert not recording._undelivered._made
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "404" in messages[0]
    assert messages[1] == "Traces are delivered again."


def test_a_setting_that_the_sdk_refuses_leaves_tracing_off_and_says_so(
    clean_environment: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "-1")
    with caplog.at_level(logging.ERROR):
        tracing = Tracing.from_environment(service="headrace-mlx", instance="1")
    with tracing.triage() as span:
        assert span.trace_id is None
    (record,) = caplog.records
    assert "max_queue_size" in record.getMessage()


def _run(program: str, environ: dict[str, str]) -> list[str]:
    """Run a Python program in a process of its own, with warnings as errors. Returns the lines that it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=environ,
        cwd=Path(__file__).parents[3],
        timeout=PATIENCE_S,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


# ---- names -----------------------------------------------------------------------------------------------------------

_CONVENTIONS = "opentelemetry.semconv._incubating.attributes"


def _conventions(module: str) -> dict[str, str]:
    """Each attribute of a conventions module with what is said about it."""
    source = importlib.import_module(module).__file__
    assert source is not None
    body = ast.parse(Path(source).read_text()).body
    return {
        name.value.value: text.value.value
        for name, text in itertools.pairwise(body)
        if isinstance(name, ast.AnnAssign | ast.Assign)
        and isinstance(name.value, ast.Constant)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(name.value.value, str)
        and isinstance(text.value.value, str)
    }


def test_every_name_is_a_current_one_of_the_conventions_or_our_own() -> None:
    known = (
        _conventions(f"{_CONVENTIONS}.gen_ai_attributes")
        | _conventions(f"{_CONVENTIONS}.messaging_attributes")
        | _conventions("opentelemetry.semconv.attributes.error_attributes")
        | _conventions("opentelemetry.semconv.attributes.server_attributes")
    )
    ours = {name: value for name, value in vars(names).items() if name.isupper()}
    assert len(ours) > 30
    for constant, value in ours.items():
        if value.startswith(names.HEADRACE):
            continue
        assert value in known, f"{constant}: {value} is in no convention"
        # "Moved" to the repository of the GenAI conventions is not gone; "Replaced" and "Removed" is.
        assert not re.search(r"Deprecated: (Replaced|Removed)", known[value]), f"{constant}: {known[value]}"


def test_the_check_of_names_would_find_a_replaced_one() -> None:
    known = _conventions(f"{_CONVENTIONS}.gen_ai_attributes")
    assert "Replaced" in known["gen_ai.system"]
