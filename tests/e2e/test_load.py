"""Three lanes at once: service shares, overload, spilling, and who answers what."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

from pipeline.broker.jetstream import Bus
from tests.e2e.conftest import Asker, Pipeline, asking, chat, joined, running
from tests.otlp import collector
from tests.support import NatsServer
from tests.waiting import eventually

SHARES = {"high": 0.6, "medium": 0.3, "low": 0.1}
SIMPLE = ("What is the capital of France?", "Hello!", "What is 2 + 3?", "Какая столица Италии?")
COMPLEX = (
    "Explain step by step why the square root of two is irrational, and write a Python function that checks it.",
    "Докажи пошагово, что корень из двух иррационален, и напиши функцию на Python, которая это проверяет.",
)


async def publish_all(asker: Asker, bodies: dict[str, dict[str, Any]]) -> None:
    """Publish requests by id, `<priority>-...`, side by side."""
    await asyncio.gather(
        *(asker.ask(f"llm.request.{i.split('-')[0]}", body, Nats_Msg_Id=i) for i, body in bodies.items())
    )


def levels(asker: Asker) -> list[str]:
    """MLX's levels in order, each as long as it lasted."""
    heard = [load["level"] for load in asker.loads if load["engine"] == "mlx"]
    return [level for level, before in zip(heard, [None, *heard], strict=False) if level != before]


async def test_300_requests_are_answered_once_each_in_the_shares_of_the_weights(
    nats_server: NatsServer, bus: Bus, tmp_path: Path
):
    bodies = {
        f"{priority}-{number}": chat("Count from 1 to 60.", max_tokens=10, temperature=0)
        for number in range(100)
        for priority in SHARES
    }
    async with asking(nats_server.url) as asker:
        # All of them wait before there is an engine, so that the order does not depend on how fast they are published.
        await publish_all(asker, bodies)
        # One engine and no other: a request leaves its lane only to be answered.
        alone = ("--no-ollama-standin", "--ollama-host", "127.0.0.1:9")
        with running(tmp_path, "--nats-url", nats_server.url, *alone):
            answers = dict(zip(bodies, await asker.answers(list(bodies)), strict=True))
    assert all(answer["object"] == "chat.completion" for answer in answers.values())
    assert all(asker.lasts(request_id) == 1 for request_id in bodies)

    # As long as every lane has requests: the heaviest one is empty first.
    window = asker.started[: max(index for index, i in enumerate(asker.started) if i.startswith("high"))]
    assert len(window) > 100
    service: Counter[str] = Counter()
    for request_id in window:
        usage = answers[request_id]["usage"]
        service[request_id.split("-")[0]] += usage["completion_tokens"] + 0.1 * usage["prompt_tokens"]
    got = {priority: service[priority] / service.total() for priority in SHARES}
    assert all(abs(got[priority] - SHARES[priority]) <= 0.02 for priority in SHARES), got


async def test_overload_spills_what_is_simple_and_nothing_is_lost(embedded: Pipeline, asker: Asker):
    bodies: dict[str, dict[str, Any]] = {}
    for number in range(50):
        for priority in SHARES:
            key = f"{priority}-over-{number}"
            bodies[f"{key}-simple"] = chat(SIMPLE[number % 4], stream=number % 2 == 0)
            bodies[f"{key}-complex"] = chat(COMPLEX[number % 2], max_tokens=40, stream=number % 2 == 0)
            if number % 5 == 0:
                bodies[f"{key}-named"] = chat(SIMPLE[number % 4], model="headrace-demo")
                bodies[f"{key}-mini"] = chat(SIMPLE[number % 4], model="headrace-demo-mini")
    await publish_all(asker, bodies)
    answers = dict(zip(bodies, await asker.answers(list(bodies)), strict=True))
    assert all(asker.lasts(request_id) == 1 for request_id in bodies)
    assert [a for a in answers.values() if a["object"] == "error"] == []

    by_kind = {
        kind: [a for i, a in answers.items() if i.endswith(kind)] for kind in ("simple", "complex", "named", "mini")
    }
    spilled = [a for a in by_kind["simple"] if a["headrace"]["engine"] == "ollama"]
    # How many is a matter of the two engines' speed; `make demo` shows it. On a machine that others use as well, two
    # engines can be no quicker than one. The load says so.
    assert spilled or any(word in load.get("keeps", "") for load in asker.loads for word in ("no quicker", "slows mlx"))
    assert all(a["headrace"]["spilled"] and "saturated" in a["headrace"]["reason"] for a in spilled)
    assert {a["headrace"]["engine"] for a in by_kind["complex"]} == {"mlx"}
    # A request that names a model is answered by that model and no other.
    assert {(a["headrace"]["engine"], a["model"]) for a in by_kind["named"]} == {("mlx", "headrace-demo")}
    assert {a["headrace"]["engine"] for a in by_kind["mini"]} == {"ollama"}
    assert {a["model"].removesuffix(":latest") for a in by_kind["mini"]} == {"headrace-demo-mini"}
    for request_id, body in bodies.items():
        if body.get("stream"):
            assert joined(asker.messages[request_id]) == answers[request_id]["choices"][0]["message"]["content"]

    await asker.until(lambda: levels(asker)[-1] == "normal")
    seen = levels(asker)
    assert seen[seen.index("saturated") - 1] == "busy"

    async def counted() -> bool:
        statistics = await asker.request("llm.queue.stats")
        return sum(statistics[p]["spilled"] for p in SHARES) >= len(spilled) and not any(
            statistics[p]["queued"] for p in SHARES
        )

    await eventually(counted, what="the statistics count every spilled request, and none is queued")


async def test_a_spilled_request_is_one_connected_trace(tmp_path):
    async with collector() as received:
        telemetry = {"OTEL_EXPORTER_OTLP_ENDPOINT": received.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        # One slot, so that few requests saturate it.
        with running(tmp_path, "--slots", "1", "--step-timeout-s", "600", environ=telemetry) as pipeline:
            async with asking(pipeline.url) as asker:
                trace_id, publisher = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
                # Ollama answers: a request that is spilled before it does comes back to MLX.
                warm = await asker.ask("llm.request.high", chat("Hello!", model="headrace-demo-mini"))
                assert (await asker.answer(warm))["object"] == "chat.completion"
                # While MLX's engine is frozen, its lanes stay full and the request waits for the router, however slow
                # the machine is. Ollama has nothing else to do.
                with pipeline.frozen_engine():
                    for _ in range(12):
                        await asker.ask("llm.request.low.complex", chat("Count from 1 to 90.", max_tokens=200))
                    await asker.until(lambda: "saturated" in levels(asker))
                    request_id = await asker.ask(
                        "llm.request.low", chat("What is the capital of France?"),
                        Nats_Msg_Id="traced", traceparent=f"00-{trace_id}-{publisher}-01",
                    )  # fmt: skip
                    answer = await asker.answer(request_id)
                assert answer["headrace"]["spilled"]
                await received.wait_for(lambda c: any(s.name.startswith("publish llm.reply") for s in _of(c, trace_id)))
                # One tree, under the publisher's span: each process sends its part in its own time.
                await received.wait_for(lambda c: _roots(_of(c, trace_id)) == {publisher})
        spans = _of(received, trace_id)
        assert _roots(spans) == {publisher}
        by_name = {span.name: span for span in spans}
        assert {"queue wait", "triage", "publish llm.ollama.low", "process llm.ollama.low"} <= set(by_name)
        triage = by_name["triage"]
        assert triage.attributes["headrace.triage.move"] == "spilled"
        assert "factual" in triage.attributes["headrace.triage.reason"]
        [chat_span] = [span for span in spans if span.name.startswith("chat ")]
        assert chat_span.kind == "CLIENT"
        assert chat_span.attributes["gen_ai.provider.name"] == "ollama"
        assert chat_span.attributes["gen_ai.usage.output_tokens"] == answer["usage"]["completion_tokens"]
        assert chat_span.attributes["gen_ai.response.finish_reasons"] == ["stop"]


def _roots(spans: list[Any]) -> set[str]:
    return {span.parent_id for span in spans} - {span.span_id for span in spans}


def _of(received: Any, trace_id: str) -> list[Any]:
    return [span for span in received.spans if span.trace_id == trace_id]
