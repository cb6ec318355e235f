"""Hundreds of streams at once: each client gets its own answer in bounded memory, and hanging up frees a slot."""

from __future__ import annotations

import asyncio
import json
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Pipeline, asking, chat, running
from tests.waiting import eventually, flushed

STREAMS, HANG_UPS = 500, 200
# Every step of the engine takes a quarter of a second, so a long answer is never complete within a test.
SHORT, LONG = 30, 20_000
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def crowded() -> Iterator[Pipeline]:
    """An engine with a slot for each stream, and a store in memory if possible: the disk is not tested here."""
    engine = ("--engine", "simulated", "--slots", str(STREAMS), "--simulated-tokens-per-s", "2000")
    answers = ("--simulated-answer-tokens", str(LONG), "--simulated-prefill-tokens-per-s", "1e9")
    alone = ("--no-ollama-standin", "--ollama-host", "127.0.0.1:9")
    memory = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(prefix="headrace-", dir=memory if memory.is_dir() else None) as folder,
        running(Path(folder), *engine, *answers, *alone) as pipeline,
    ):
        yield pipeline


def crowd(pipeline: Pipeline) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=pipeline.http, timeout=100, limits=httpx.Limits(max_connections=STREAMS))


def asked(text: str, max_tokens: int) -> dict[str, Any]:
    return chat(text, stream=True, max_tokens=max_tokens)


def memory_of(pipeline: Pipeline) -> dict[str, int]:
    """Resident memory of the processes that a stream passes, in KiB."""
    pids = {role: str(pipeline.pid(f"pipeline.cli run {role}")) for role in ("gateway", "mlx")}
    return {
        role: int(subprocess.run(["ps", "-o", "rss=", "-p", pid], capture_output=True, check=True).stdout)
        for role, pid in pids.items()
    }


async def first_of(lines: AsyncIterator[str]) -> str:
    """The first event of a stream, which is no comment: the first words of its answer."""
    return await anext(line async for line in lines if line.startswith("data: "))


async def test_500_streams_at_once_each_get_their_own_answer_in_bounded_memory(crowded: Pipeline):
    idle = memory_of(crowded)
    all_read = asyncio.Barrier(STREAMS + 1)

    async def ask(web: httpx.AsyncClient, number: int) -> str:
        async with web.stream("POST", PATH, json=asked(f"number {number} of many", SHORT)) as response:
            lines = response.aiter_lines()
            first = await first_of(lines)
            await all_read.wait()
            events = [line[6:] for line in [first, *[line async for line in lines]] if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        return "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1])

    async with crowd(crowded) as web:
        streams = [asyncio.ensure_future(ask(web, number)) for number in range(STREAMS)]
        await all_read.wait()
        busy = memory_of(crowded)
        answers = await asyncio.gather(*streams)
    for number, answer in enumerate(answers):
        assert f"number {number} of many ..." in answer
    assert all(busy[role] < 2 * idle[role] for role in idle), (idle, busy)


async def test_200_of_500_hang_up_their_slots_are_free_and_the_others_notice_nothing(crowded: Pipeline):
    """A client that hangs up has read the first words of an answer that would go on for long."""
    leaving = [f"leaving-{number}" for number in range(HANG_UPS)]
    staying = [f"staying-{number}" for number in range(STREAMS - HANG_UPS)]
    async with asking(crowded.url) as asker, crowd(crowded) as web:
        cancelled: list[str] = []

        async def on_cancelled(message: Any) -> None:
            cancelled.append(json.loads(message.data)["id"])

        await asker.nc.subscribe("llm.event.*.cancelled", cb=on_cancelled)
        await flushed(asker.nc)
        all_read = asyncio.Barrier(STREAMS)

        async def stream(request_id: str) -> str:
            headers = {"Idempotency-Key": request_id}
            body = asked("on and on", LONG if request_id in leaving else SHORT)
            async with web.stream("POST", PATH, json=body, headers=headers) as response:
                lines = response.aiter_lines()
                await first_of(lines)
                await all_read.wait()
                if request_id in leaving:
                    return ""
                return [line async for line in lines if line][-1]

        ends = await asyncio.gather(*(stream(request_id) for request_id in leaving + staying))
        assert set(ends[HANG_UPS:]) == {"data: [DONE]"}
        lasts = dict(zip(leaving, await asker.answers(leaving), strict=True))
        assert {last["error"]["code"] for last in lasts.values() if last["object"] == "error"} == {"cancelled"}
        assert all(last["object"] == "error" for last in lasts.values())
        await eventually(
            lambda: set(cancelled) == set(leaving), what="each cancelled request, and no other, is counted"
        )
        assert all(asker.lasts(request_id) == 1 for request_id in leaving)

        async def free() -> bool:
            slots = (await web.get("/queue/stats")).json()["engines"]["mlx"]["slots"]
            return slots == {"used": 0, "total": STREAMS}

        await eventually(free, what="no slot is used")
