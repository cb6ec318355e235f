"""What the trace says of an answer that was cut short."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from pipeline.wire.errors import ErrorCode
from tests.otlp import Collector, collector
from tests.pipeline.worker.conftest import Client, StartWorker


@pytest.fixture
async def traces(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Collector]:
    async with collector() as running:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", running.endpoint)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        yield running


async def test_a_cancelled_answer_says_so_and_what_it_has_cost(traces: Collector, start: StartWorker, client: Client):
    worker = await start()
    await client.stream("r1")
    (await worker.engine.generation("r1")).say("abc")
    await client.until("r1", 2)
    await client.bus.publish("llm.cancel.r1", b"")
    error = (await client.answer("r1")).error
    # The span of the delivery ends after that of the request, and may be sent after it.
    await traces.wait_for(lambda seen: seen.named("request") and seen.named("process llm.request.high"))
    chat, process = traces.one("chat scripted"), traces.one("process llm.request.high")
    for span in (chat, process, traces.one("request")):
        assert (span.attributes["error.type"], span.status_message) == ("cancelled", error.message)
    assert chat.attributes["gen_ai.response.finish_reasons"] == ["error"]
    assert chat.attributes["gen_ai.usage.output_tokens"] == 3
    assert process.attributes["headrace.outcome.reason"] == error.message


async def test_an_answer_that_a_draining_worker_returns_is_cut_short_and_its_trace_goes_on(
    traces: Collector, start: StartWorker, client: Client
):
    first = await start()
    await client.stream("r1")
    (await first.engine.generation("r1")).say("abc")
    await client.until("r1", 2)
    await first.drain(0.0)
    second = await start()
    (await second.engine.generation("r1")).finish("d")
    await client.answer("r1")
    await traces.wait_for(lambda seen: seen.named("request"))
    # Each worker sends its own spans.
    for name in ("chat scripted", "process llm.request.high", "queue wait"):
        await traces.wait_for(lambda seen, name=name: len(seen.named(name)) == 2)
    before, after = traces.named("chat scripted")
    assert before.attributes["error.type"] == "returned"
    assert "error.type" not in after.attributes
    assert len({span.trace_id for span in traces.spans}) == 1
    returned, answered = traces.named("process llm.request.high")
    assert returned.attributes["headrace.outcome"] == "returned"
    assert answered.attributes["headrace.outcome"] == "answered"
    waits = sorted(traces.named("queue wait"), key=lambda span: span.end_ns)
    assert waits[1].attributes["headrace.reason"] == "1 of its deliveries returned it"


async def test_an_engines_error_is_in_the_trace(traces: Collector, start: StartWorker, client: Client):
    worker = await start()
    await client.ask("r1")
    (await worker.engine.generation("r1")).fail(ErrorCode.CONTEXT_LENGTH_EXCEEDED, "too long")
    await client.answer("r1")
    await traces.wait_for(lambda seen: seen.named("request"))
    chat = traces.one("chat scripted")
    assert (chat.attributes["error.type"], chat.status_message) == ("context_length_exceeded", "too long")
    assert chat.attributes["gen_ai.response.finish_reasons"] == ["error"]
