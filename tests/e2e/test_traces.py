"""The traces of requests from each way in and with each end, as a collector receives them from a whole pipeline."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.conftest import Asker, Pipeline, asking, chat, running
from tests.otlp import Collector, Span, collector

QUESTION = "What is the capital of France?"
LONG = chat("Count from 1 to 90.", max_tokens=200)


async def test_every_request_is_one_tree_from_each_way_in_to_each_end(tmp_path: Path) -> None:
    async with traced(tmp_path) as (pipeline, asker, traces):
        await plain(asker, traces)
        await failed_over(pipeline, asker, traces)
        with pipeline.frozen_engine():
            await asker.ask("llm.request.low.complex", LONG, Nats_Msg_Id="in-the-slot")
            await asker.until(lambda: "in-the-slot" in asker.started)
            await expired(asker, traces)
            for _ in range(12):
                await asker.ask("llm.request.low.complex", LONG)
            await asker.until(lambda: asker.loads and "saturated" in {load["level"] for load in asker.loads[-4:]})
            await cancelled(asker, traces)
            await refused(asker, traces)
            await spilled(pipeline, traces)


async def plain(asker: Asker, traces: Collector) -> None:
    """`nats pub`: no trace context, no id, no headers at all."""
    request_id = await asker.ask("llm.request.high", QUESTION.encode())
    answer = await asker.answer(request_id)
    request, *rest = await tree(traces, request_id, "request", "process llm.request.high")
    assert names(rest) == ["chat headrace-demo", "process llm.request.high", "publish llm.reply", "queue wait"]
    assert request.attributes["headrace.outcome"] == "answered"
    process, inference = named(rest, "process llm.request.high"), named(rest, "chat headrace-demo")
    # On a slow machine the request is taken before the slot is known to be free.
    assert answer["headrace"]["reason"] in ("mlx had a free slot", "mlx, in its turn")
    assert process.attributes["headrace.reason"] == answer["headrace"]["reason"]
    assert {"gen_ai.request.stream", "gen_ai.output.type", "gen_ai.response.time_to_first_chunk"}.isdisjoint(
        inference.attributes
    )
    assert inference.attributes["gen_ai.response.finish_reasons"] == ["stop"]


async def failed_over(pipeline: Pipeline, asker: Asker, traces: Collector) -> None:
    """The worker is killed as it answers. What it said by then is in the trace of the attempt that ends the request."""
    with pipeline.frozen_engine():
        # In this lane it waits for an MLX worker: the router moves none of it.
        await asker.ask("llm.request.high.complex", LONG, Nats_Msg_Id="killed")
        await asker.until(lambda: "killed" in asker.started)
        await traces.wait_for(lambda seen: of(seen, "killed"))
        pipeline.kill("mlx")
    assert (await asker.answer("killed"))["headrace"]["attempts"] == 2
    _, *rest = await tree(traces, "killed", "request", "attempt lost")
    first, second = sorted((s for s in rest if s.name == "queue wait"), key=lambda span: span.end_ns)
    assert first.attributes == {"messaging.message.id": "killed", "headrace.attempt": 1, "headrace.deliveries": 1}
    assert second.attributes == {
        "messaging.message.id": "killed",
        "headrace.attempt": 2,
        "headrace.deliveries": 2,
        "headrace.reason": "1 of its deliveries ended without an answer",
    }
    assert first.resource["service.instance.id"] != second.resource["service.instance.id"]
    lost = named(rest, "attempt lost")
    assert lost.attributes["headrace.attempt"] == 1
    assert lost.attributes["headrace.worker"] == first.resource["service.instance.id"]
    assert lost.attributes["headrace.outcome.reason"] == "another attempt began"
    assert lost.start_ns >= first.start_ns


async def expired(asker: Asker, traces: Collector) -> None:
    await asker.ask("llm.request.low.complex", LONG, Nats_Msg_Id="late", Llm_Timeout="1.5")
    await withdrawn(asker, traces, "late", outcome="expired", code="deadline_exceeded")


async def cancelled(asker: Asker, traces: Collector) -> None:
    await asker.ask("llm.request.low.complex", LONG, Nats_Msg_Id="unwanted")
    assert (await asker.request("llm.cancel.unwanted"))["state"] == "cancelled"
    await withdrawn(asker, traces, "unwanted", outcome="cancelled", code="cancelled")


async def refused(asker: Asker, traces: Collector) -> None:
    """The queue is longer than the request can wait."""
    # The monitor has this time to refuse it: a request whose time has passed by then has expired, and is not refused.
    await asker.ask("llm.request.low.complex", LONG, Nats_Msg_Id="hopeless", Llm_Timeout="1")
    await withdrawn(asker, traces, "hopeless", outcome="expired", code="deadline_exceeded")
    assert asker.last("hopeless")["error"]["message"].startswith("Rejected: ")


async def withdrawn(asker: Asker, traces: Collector, request_id: str, *, outcome: str, code: str) -> None:
    """A request that ended in its queue: the monitor says why."""
    error = (await asker.answer(request_id))["error"]
    request, *rest = await tree(traces, request_id, "request")
    [withdrawal] = [span for span in rest if span.name.startswith("withdraw llm.request.")]
    assert names(rest) == ["queue wait", withdrawal.name]
    assert withdrawal.resource["service.name"] == "headrace-monitor"
    for span in (request, withdrawal):
        assert span.attributes["headrace.outcome"] == outcome
        assert span.attributes["headrace.outcome.reason"] == span.status_message == error["message"]
        assert span.attributes["error.type"] == error["code"] == code


async def spilled(pipeline: Pipeline, traces: Collector) -> None:
    """Over HTTP; the gateway sees that MLX is saturated, and the request is simple."""
    async with httpx.AsyncClient(base_url=pipeline.http, timeout=60) as web:
        response = await web.post("/v1/chat/completions", json=chat(QUESTION), headers={"X-Priority": "low"})
    answer = response.json()
    assert answer["headrace"]["spilled"], answer
    published, *rest = await tree(traces, answer["id"], "publish llm.request.low.simple", "process llm.ollama.low")
    assert published.attributes["headrace.triage.task"] == "simple"
    assert "factual" in published.attributes["headrace.triage.reason"]
    assert names(rest) == [
        f"chat {answer['model']}", "process llm.ollama.low", "process llm.request.low.simple", "publish llm.ollama.low",
        "publish llm.reply", "queue wait", "queue wait", "triage",
    ]  # fmt: skip
    routed, served = named(rest, "process llm.request.low.simple"), named(rest, "process llm.ollama.low")
    assert routed.attributes["headrace.outcome"] == "moved"
    assert "saturated" in routed.attributes["headrace.outcome.reason"]
    assert served.attributes["headrace.reason"] == answer["headrace"]["reason"]
    first, second = sorted((s for s in rest if s.name == "queue wait"), key=lambda span: span.start_ns)
    assert second.start_ns >= first.end_ns, "the wait for Ollama begins when the request is stored there"
    assert named(rest, f"chat {answer['model']}").attributes["server.address"] == "127.0.0.1"


# ---- what a collector has of one request


@asynccontextmanager
async def traced(folder: Path) -> AsyncIterator[tuple[Pipeline, Asker, Collector]]:
    async with collector() as traces:
        telemetry = {"OTEL_EXPORTER_OTLP_ENDPOINT": traces.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        with running(folder, "--slots", "1", "--step-timeout-s", "600", environ=telemetry) as pipeline:
            async with asking(pipeline.url) as asker:
                # Ollama answers: a request that is spilled before it does comes back to MLX.
                warm = await asker.ask("llm.request.high", chat("Hello!", model="headrace-demo-mini"))
                assert (await asker.answer(warm))["object"] == "chat.completion"
                yield pipeline, asker, traces


def of(traces: Collector, request_id: str) -> list[Span]:
    """All spans of the traces in which the request is named."""
    ids = ("messaging.message.id", "gen_ai.response.id")
    found = {s.trace_id for s in traces.spans if request_id in [s.attributes.get(name) for name in ids]}
    return [span for span in traces.spans if span.trace_id in found]


async def tree(traces: Collector, request_id: str, *expected: str) -> list[Span]:
    """The spans of a request once these and their parents are there, the first one of these at the top: one trace, each
    span after its parent."""
    root, *_ = expected
    await traces.wait_for(lambda seen: {*expected} <= {span.name for span in of(seen, request_id)})
    await traces.wait_for(lambda seen: parents(of(seen, request_id)) == {None})
    spans = sorted(of(traces, request_id), key=lambda span: (span.parent_id is not None, span.start_ns))
    assert len({span.trace_id for span in spans}) == 1
    assert [span.name for span in spans if span.parent_id is None] == [root]
    by_id = {span.span_id: span for span in spans}
    assert len(by_id) == len(spans)
    for span in spans:
        assert span.start_ns <= span.end_ns, span
        assert span.parent_id is None or by_id[span.parent_id].start_ns <= span.start_ns, span
    return spans


def parents(spans: list[Span]) -> set[str | None]:
    """The parents that are not there; a complete tree lacks none but that of its first span."""
    return {span.parent_id for span in spans} - {span.span_id for span in spans}


def names(spans: list[Span]) -> list[str]:
    return sorted(span.name for span in spans)


def named(spans: list[Span], name: str) -> Any:
    (span,) = [span for span in spans if span.name == name]
    return span
