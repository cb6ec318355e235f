"""The checks that every version must pass: requests over HTTP are answered, in their order, whatever happens.

Times are measured and reported, and no check depends on them.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.acceptance.conftest import pids_of, standin
from tests.e2e.conftest import Pipeline, chat, child_of, joined, running, text_of
from tests.waiting import TIMEOUT_S, eventually

Figure = Callable[[str], None]

CHAT = "/v1/chat/completions"
MODEL, MINI = "headrace-demo", "headrace-demo-mini"
PRIORITIES = ("high", "medium", "low")
CAPITALS = {"France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Germany": "Berlin", "Japan": "Tokyo"}
SUMS = [(a, b) for a in range(2, 10) for b in range(2, 10)]
ASYNC = {"Prefer": "respond-async"}


@pytest.fixture
async def web(pipeline: Pipeline) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=pipeline.http, timeout=60, limits=httpx.Limits(max_connections=200)) as web:
        yield web


async def ask(web: httpx.AsyncClient, text: str, priority: str | None = None, **parameters: Any) -> dict[str, Any]:
    """The completion of a chat of one turn."""
    headers = {} if priority is None else {"X-Priority": priority}
    answer = await web.post(CHAT, json=chat(text, temperature=0, **parameters), headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def hand_over(web: httpx.AsyncClient, text: str, priority: str, **parameters: Any) -> str:
    """Ask without waiting; returns where the request is, which is stored by now."""
    body = chat(text, temperature=0, **parameters)
    answer = await web.post(CHAT, json=body, headers={"X-Priority": priority} | ASYNC)
    assert answer.status_code == 202, answer.text
    return answer.json()["url"]


async def collect(web: httpx.AsyncClient, url: str) -> dict[str, Any]:
    """The last message of a request that was handed over."""
    return messages_of((await web.get(f"{url}/events")).text)[-1]


def messages_of(events: str) -> list[dict[str, Any]]:
    """The data of a stream of server-sent events."""
    lines = [line.removeprefix("data: ") for line in events.split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


async def statistics_of(web: httpx.AsyncClient) -> dict[str, Any]:
    answer = await web.get("/queue/stats")
    assert answer.status_code == 200, answer.text
    return answer.json()


async def statistics_until(web: httpx.AsyncClient, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first statistics that meet a condition."""

    async def met() -> dict[str, Any] | None:
        now = await statistics_of(web)
        return now if condition(now) else None

    # The gateway allows one client 20 calls for statistics a second.
    return await eventually(met, every_s=0.1)


async def timed(asking: Any) -> tuple[float, Any]:
    """The milliseconds until the answer, and the answer."""
    began_at = time.perf_counter()
    answer = await asking
    return (time.perf_counter() - began_at) * 1e3, answer


async def flood(web: httpx.AsyncClient, path: str, calls: int, *, at_once: int = 8) -> Counter[int]:
    """Call a path over and over; returns how often there was which status."""
    left = iter(range(calls))
    found: Counter[int] = Counter()

    async def one() -> None:
        for _ in left:
            answer = await web.get(path)
            found[answer.status_code] += 1
            assert answer.status_code != 429 or int(answer.headers["retry-after"]) >= 1

    await asyncio.gather(*(one() for _ in range(at_once)))
    return found


# ---- 1

STATISTICS = pytest.mark.check("queue statistics")


@STATISTICS
async def test_the_statistics_count_what_was_answered(web: httpx.AsyncClient):
    before = await statistics_of(web)
    for priority in PRIORITIES:
        await ask(web, "What is 2 + 3?", priority)

    now = await statistics_until(web, lambda now: all(now[p]["done"] == before[p]["done"] + 1 for p in PRIORITIES))
    assert set(now["engines"]) == {"mlx", "ollama"}
    assert all({"queued", "running", "spilled", "wait_ms", "ttft_ms"} <= set(now[p]) for p in PRIORITIES)


@STATISTICS
async def test_the_statistics_are_given_while_the_lists_are_refused(web: httpx.AsyncClient, figure: Figure):
    flooding = asyncio.ensure_future(asyncio.gather(flood(web, "/api/tags", 400), flood(web, "/v1/models", 200)))
    times_ms = []
    while not flooding.done() and len(times_ms) < 150:
        took_ms, _ = await timed(statistics_of(web))
        times_ms.append(took_ms)
    lists = sum(await flooding, Counter())
    assert set(lists) == {200, 429}
    assert lists[429]
    assert times_ms
    figure(f"{len(times_ms)} of {len(times_ms)} given while {lists[429]} of {lists.total()} lists got 429")
    figure(f"median {statistics.median(times_ms):.0f} ms, slowest {max(times_ms):.0f} ms")


# ---- 2


@pytest.mark.check("HIGH answers: chat")
async def test_high_is_answered_whole_and_as_a_stream(web: httpx.AsyncClient, figure: Figure):
    took_ms, whole = await timed(ask(web, "What is the capital of France?", "high"))
    assert text_of(whole) == "The capital of France is Paris."
    assert (whole["headrace"]["priority"], whole["headrace"]["engine"], whole["model"]) == ("high", "mlx", MODEL)

    body = chat("What is the capital of France?", temperature=0, stream=True)
    began_at = time.perf_counter()
    async with web.stream("POST", CHAT, json=body, headers={"X-Priority": "high"}) as response:
        lines, first_ms = [], 0.0
        async for line in response.aiter_lines():
            first_ms = first_ms or (time.perf_counter() - began_at) * 1e3
            lines.append(line)
    assert lines[-2] == "data: [DONE]"
    deltas = [message["choices"][0]["delta"] for message in messages_of("\n".join(lines))]
    assert "".join(delta.get("content") or "" for delta in deltas) == text_of(whole)
    figure(f"whole after {took_ms:.0f} ms; a stream's first word after {first_ms:.0f} ms")


# ---- 3

TASKS = pytest.mark.check("MEDIUM answers: tasks; LOW too")


@TASKS
async def test_tasks_that_are_handed_over_at_medium_are_all_done(web: httpx.AsyncClient, figure: Figure):
    began_at = time.perf_counter()
    urls = await asyncio.gather(*(hand_over(web, f"What is {a} plus {b}?", "medium") for a, b in SUMS[:32]))
    answers = await asyncio.gather(*(collect(web, url) for url in urls))
    for (a, b), answer in zip(SUMS, answers, strict=False):
        assert text_of(answer) == f"{a} + {b} = {a + b}"
        assert answer["headrace"]["priority"] == "medium"
    engines = Counter(answer["headrace"]["engine"] for answer in answers)
    shared = ", ".join(f"{count} by {engine}" for engine, count in engines.most_common())
    figure(f"{len(answers)} MEDIUM tasks done in {time.perf_counter() - began_at:.2f} s: {shared}")


@TASKS
async def test_what_says_nothing_of_its_urgency_is_medium(web: httpx.AsyncClient):
    assert (await ask(web, "What is 2 + 3?"))["headrace"]["priority"] == "medium"


@TASKS
async def test_low_is_answered(web: httpx.AsyncClient, figure: Figure):
    took_ms, answer = await timed(ask(web, "What is 4 plus 5?", "low"))
    assert text_of(answer) == "4 + 5 = 9"
    assert answer["headrace"]["priority"] == "low"
    body = {"model": MODEL, "prompt": "What is 4 plus 5?", "stream": False, "options": {"temperature": 0}}
    generated = await web.post("/api/generate", json=body, headers={"X-Priority": "low"})
    assert generated.json()["response"] == "4 + 5 = 9"
    figure(f"LOW after {took_ms:.0f} ms")


# ---- 4


@pytest.mark.check("parallel requests of every priority")
async def test_under_load_all_are_answered_none_mixed_up_and_high_before_low(web: httpx.AsyncClient, figure: Figure):
    # They name their model, so that none leaves the queue for the other engine.
    counts = await asyncio.gather(
        *(hand_over(web, f"Count from {start} to 99.", "low", model=MODEL, max_tokens=60) for start in range(1, 49))
    )
    finished: list[str] = []

    async def wait_for(url: str) -> dict[str, Any]:
        answer = await collect(web, url)
        finished.append("low")
        return answer

    async def urgent(priority: str, a: int, b: int) -> dict[str, Any]:
        answer = await ask(web, f"What is {a} plus {b}?", priority, model=MODEL)
        finished.append(priority)
        return answer

    lows = asyncio.gather(*(wait_for(url) for url in counts))
    asked = [("high" if number % 2 else "medium", a, b) for number, (a, b) in enumerate(SUMS[:24])]
    answers = await asyncio.gather(*(urgent(*each) for each in asked))
    done_before = finished[: max(i for i, priority in enumerate(finished) if priority == "high")].count("low")
    for (priority, a, b), answer in zip(asked, answers, strict=True):
        assert text_of(answer) == f"{a} + {b} = {a + b}"
        assert answer["headrace"]["priority"] == priority
    for start, answer in enumerate(await lows, 1):
        assert text_of(answer).startswith(f"{start}, {start + 1}, ")
    waits_ms = {
        priority: statistics.mean(a["headrace"]["queue_ms"] for a in (*answers, *await lows) if of(a) == priority)
        for priority in PRIORITIES
    }
    # HIGH came last. If the machine was slow to send it, it found an emptier queue and waited less still.
    assert waits_ms["high"] < waits_ms["low"]
    figure(f"{len(answers) + len(counts)} of {len(answers) + len(counts)} answered, each its own answer")
    figure(f"{done_before} of {len(counts)} LOW answered before the last HIGH, which came after all of them")
    figure("mean wait " + ", ".join(f"{priority.upper()} {wait_ms:.0f} ms" for priority, wait_ms in waits_ms.items()))


def of(answer: dict[str, Any]) -> str:
    """The priority of a request, by its answer."""
    return answer["headrace"]["priority"]


# ---- 5


@pytest.mark.check("switch to Ollama under overload")
async def test_what_is_simple_goes_to_ollama_while_mlx_is_saturated(web: httpx.AsyncClient, figure: Figure):
    """The switch takes from the load event `saturated` of MLX to the first word of an answer by Ollama."""
    calm, moved, saturated_at = asyncio.Event(), asyncio.Event(), asyncio.get_running_loop().create_future()
    first_words: list[float] = []
    ended: Counter[str] = Counter()

    async def watch() -> None:
        async with web.stream("GET", "/load") as events:
            assert events.status_code == 200
            async for line in events.aiter_lines():
                for load in messages_of(line):
                    if load["engine"] == "mlx" and load["level"] == "normal":
                        calm.set()
                    elif load["engine"] == "mlx" and load["level"] == "saturated" and calm.is_set():
                        saturated_at.set_result(time.perf_counter())
                        return

    async def stream(country: str) -> None:
        body = chat(f"What is the capital of {country}?", temperature=0, stream=True)
        answer = ""
        async with web.stream("POST", CHAT, json=body, headers={"X-Priority": "low"}) as response:
            model = ""
            async for line in response.aiter_lines():
                for chunk in messages_of(line):
                    if not model and (model := chunk["model"].removesuffix(":latest")) == MINI:
                        first_words.append(time.perf_counter())
                        moved.set()
                    answer += chunk["choices"][0]["delta"].get("content") or ""
        assert CAPITALS[country] in answer
        ended[model] += 1

    watching = asyncio.ensure_future(watch())
    await asyncio.wait_for(calm.wait(), TIMEOUT_S)
    # All slots but one are taken: the next requests saturate MLX, and simple ones are waiting when it says so.
    stories = [await hand_over(web, "Tell me a story.", "high", model=MODEL) for _ in range(7)]
    switched = asyncio.ensure_future(asyncio.wait_for(asyncio.gather(watching, moved.wait()), TIMEOUT_S))
    rounds: list[asyncio.Future[list[None]]] = []
    # On a busy machine, MLX may answer these as fast as they arrive. Then more follow.
    while not switched.done():
        rounds.append(asyncio.gather(*(stream(country) for country in [*CAPITALS] * 6)))
        more = [hand_over(web, "Tell me a story.", "high", model=MODEL, max_tokens=100) for _ in range(20)]
        stories += await asyncio.gather(*more)
        await asyncio.wait((switched, rounds[-1]), return_when=asyncio.FIRST_COMPLETED)
        if not switched.done():
            await rounds[-1]
    await switched
    await asyncio.gather(*rounds)
    assert set(ended) <= {MODEL, MINI}
    answers = [await collect(web, url) for url in stories]
    assert {(answer["headrace"]["engine"], answer["model"]) for answer in answers} == {("mlx", MODEL)}
    switch_s = min(first_words) - saturated_at.result()
    figure(f"{switch_s:.3f} s from the event `saturated` to Ollama's first word")
    figure(f"{ended[MINI]} of {ended.total()} simple ones went there, none of {len(stories)} that name MLX's model")


# ---- 6

INTERNAL = pytest.mark.check("tinyllama answers no user")
LISTS = ("/v1/models", "/api/tags", "/api/ps", "/queue/stats", "/metrics", "/openapi.json")


@INTERNAL
async def test_no_list_and_no_answer_names_it_and_no_call_reaches_it(tmp_path: Path, figure: Figure):
    """Ollama has no other model and MLX is saturated: MLX answers every request all the same."""
    options = ("--engine", "simulated", "--slots", "2", "--simulated-tokens-per-s", "300")
    with (
        standin(tmp_path, "tinyllama") as ollama,
        running(tmp_path, *options, "--ollama-host", ollama) as pipeline,
    ):
        async with httpx.AsyncClient(base_url=pipeline.http, timeout=60) as web:
            answers = [await web.get(path) for path in LISTS]
            asked = [
                web.post(path, json={**asked_at(path), "stream": stream}, headers={"X-Priority": p})
                for path in (CHAT, "/v1/completions", "/api/chat", "/api/generate")
                for stream in (False, True)
                for p in PRIORITIES
            ]
            answers += await asyncio.gather(*asked)
            answers += [await web.get(path) for path in LISTS]
            assert await refusals(web) == {404}
            # A request is counted a moment after its answer.
            counted = await statistics_until(web, lambda now: sum(now[p]["done"] for p in PRIORITIES) >= len(asked))
    assert {answer.status_code for answer in answers} == {200}
    assert not [answer.url for answer in answers if "tinyllama" in answer.text.lower()]
    assert sum(counted[priority]["done"] for priority in PRIORITIES) == len(asked)
    assert {counted[priority]["spilled"] for priority in PRIORITIES} == {0}
    figure(f"in none of {len(answers)} answers and lists, though Ollama has no other model")


@INTERNAL
async def test_asking_for_it_by_name_is_refused_in_each_dialect(web: httpx.AsyncClient, figure: Figure):
    assert await refusals(web) == {404}
    figure("asked for by name: 404 in both dialects")


def asked_at(path: str) -> dict[str, Any]:
    """A request as each of the endpoints takes it."""
    return chat("Hello!") if path in (CHAT, "/api/chat") else {"prompt": "Hello!"}


async def refusals(web: httpx.AsyncClient) -> set[int]:
    """The statuses of all ways of asking for it by name."""
    found = set()
    for name in ("tinyllama", "TinyLlama:1.1b", "library/tinyllama:latest"):
        for path in (CHAT, "/v1/completions", "/api/chat", "/api/generate", "/api/show"):
            answer = await web.post(path, json={**asked_at(path), "model": name})
            said = answer.json()
            assert (said if path.startswith("/api/") else said["error"])["code"] == "model_internal"
            found.add(answer.status_code)
        found.add((await web.get(f"/v1/models/{name}")).status_code)
    return found


# ---- 7


@pytest.mark.check("mean response time")
async def test_response_times_are_known(web: httpx.AsyncClient, figure: Figure):
    countries = [*CAPITALS] * 6
    one_by_one = [(await timed(ask(web, f"What is the capital of {c}?", "high", model=MODEL)))[0] for c in countries]
    began_at = time.perf_counter()
    at_once = await asyncio.gather(
        *(timed(ask(web, f"What is the capital of {country}?", "high", model=MODEL)) for country in countries)
    )
    took_s = time.perf_counter() - began_at
    assert [CAPITALS[c] in text_of(answer) for c, (_, answer) in zip(countries, at_once, strict=True)] == [True] * 30
    cut = statistics.quantiles(one_by_one, n=20)
    figure(f"mean {statistics.mean(one_by_one):.0f} ms one by one (median {cut[9]:.0f}, p95 {cut[18]:.0f})")
    figure(f"mean {statistics.mean(t for t, _ in at_once):.0f} ms of {len(at_once)} at once, in {took_s:.2f} s")


# ---- 8

ERRORS = pytest.mark.check("errors bring nothing down")
BAD = {
    "no JSON": (CHAT, b"{", 400),
    "no object": ("/api/chat", b"[]", 400),
    "no messages": (CHAT, b"{}", 400),
    "a number for a text": ("/api/generate", b'{"prompt": 7}', 400),
    "what no engine can do": (CHAT, b'{"messages": [{"role": "user", "content": "x"}], "audio": {}}', 400),
    "a temperature out of range": (CHAT, b'{"messages": [{"role": "user", "content": "x"}], "temperature": 900}', 400),
    "not UTF-8": ("/v1/completions", b'{"prompt": "\xff"}', 400),
    "an unknown model": ("/api/chat", b'{"model": "nobody", "messages": [{"role": "user", "content": "x"}]}', 404),
    "too large": (CHAT, b" " * (1 << 20) + b"{}", 413),
    "nothing to embed": ("/v1/embeddings", b"{}", 400),
    "no such path": ("/v1/nothing", b"{}", 404),
}


@ERRORS
async def test_bad_input_is_refused_and_the_next_request_is_answered(
    web: httpx.AsyncClient, pids: dict[str, int], figure: Figure
):
    for what, (path, body, status) in BAD.items():
        answer = await web.post(path, content=body)
        assert answer.status_code == status, what
        error = answer.json()["error"]
        assert error if path.startswith("/api/") else error["message"], what
        assert text_of(await ask(web, "What is 2 + 3?")) == "2 + 3 = 5"
    assert (await web.post(CHAT, json=chat("x"), headers={"X-Priority": "urgent"})).status_code == 400
    assert (await web.post(CHAT, json=chat("x"), headers={"X-Request-Timeout": "soon"})).status_code == 400
    figure(f"{len(BAD) + 2} kinds of bad input refused with their own status")


@ERRORS
async def test_a_request_whose_deadline_passes_is_answered_with_504(web: httpx.AsyncClient):
    stories = [await hand_over(web, "Tell me a story.", "high", model=MODEL, max_tokens=100) for _ in range(16)]
    late = await web.post(CHAT, json=chat("x", model=MODEL), headers={"X-Priority": "low", "X-Request-Timeout": "0.01"})
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert all([(await collect(web, url))["object"] == "chat.completion" for url in stories])


@ERRORS
async def test_an_ollama_that_is_killed_costs_no_answer(web: httpx.AsyncClient, pipeline: Pipeline, figure: Figure):
    stories = [await hand_over(web, "Tell me a story.", "high", model=MODEL, max_tokens=100) for _ in range(16)]
    simple = [await hand_over(web, f"What is {a} plus {b}?", "low") for a, b in SUMS]
    os.kill(pipeline.pid("consumers.standin"), signal.SIGKILL)
    answers = await asyncio.gather(*(collect(web, url) for url in simple))
    assert [text_of(answer) for answer in answers] == [f"{a} + {b} = {a + b}" for a, b in SUMS]
    assert all([(await collect(web, url))["object"] == "chat.completion" for url in stories])
    engines = Counter(answer["headrace"]["engine"] for answer in answers)
    figure(f"Ollama killed under load: {len(answers)} of {len(answers)} answered, {engines['mlx']} of them by MLX")


@ERRORS
async def test_an_engine_that_is_killed_goes_on_with_its_answers(
    web: httpx.AsyncClient, pipeline: Pipeline, figure: Figure
):
    asked = {"text": "Tell me a story.", "priority": "high", "model": MODEL, "seed": 7}
    undisturbed = text_of(await ask(web, **asked))
    messages: list[dict[str, Any]] = []
    # On a slow machine the answer may be whole before its reader has killed anything.
    while "restarted" not in [message.get("state") for message in messages]:
        others = await asyncio.gather(*(hand_over(web, **asked) for _ in range(7)))
        messages, again_s = await _killed_in_mid_answer(web, pipeline, await hand_over(web, **asked, stream=True))
        assert joined(messages) == text_of(messages[-1]) == undisturbed
        assert [text_of(await collect(web, other)) for other in others] == [undisturbed] * len(others)
    figure(f"MLX's process killed in mid-answer: the same text, whole {again_s:.1f} s on")


async def _killed_in_mid_answer(
    web: httpx.AsyncClient, pipeline: Pipeline, url: str
) -> tuple[list[dict[str, Any]], float]:
    """Kill the engine's process at the second chunk of an answer; the answer's messages, and how long it took then."""
    child = child_of(pipeline.pid("pipeline.cli run mlx"), "consumers.engines.local.child")
    lines, killed_at = [], 0.0
    async with web.stream("GET", f"{url}/events") as response:
        async for line in response.aiter_lines():
            lines.append(line)
            if not killed_at and '"seq":1' in line:
                killed_at = time.perf_counter()
                os.kill(child, signal.SIGKILL)
    return messages_of("\n".join(lines)), time.perf_counter() - killed_at


@ERRORS
async def test_after_all_that_everything_is_up(
    web: httpx.AsyncClient, pipeline: Pipeline, pids: dict[str, int], figure: Figure
):
    await statistics_until(web, lambda now: all(load["slots"]["total"] > 0 for load in now["engines"].values()))

    async def usable() -> bool:
        return (await web.get("/readyz")).status_code == 200

    # The gateway hears of the workers on its own, perhaps after the monitor.
    await eventually(usable, what="the gateway's engine", every_s=0.1)
    for model in (MODEL, MINI):
        assert text_of(await ask(web, "What is 2 + 3?", "high", model=model)) == "2 + 3 = 5"
    assert pids_of(pipeline) == pids, "nothing died but what was killed"
    figure("afterwards both engines answer, and no other process has died")
