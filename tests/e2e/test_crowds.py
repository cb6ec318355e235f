"""Hundreds of clients that stream at once: each gets its own answer, memory is bounded, who hangs up frees a slot."""

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
from tests.waiting import eventually

STREAMS, HANG_UPS = 500, 200
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def crowded() -> Iterator[Pipeline]:
    """An engine with a slot for each of them, and a store in memory where there is one: the disk is not tested here."""
    engine = ("--engine", "simulated", "--slots", str(STREAMS), "--simulated-tokens-per-s", "2000")
    answers = ("--simulated-answer-tokens", "30", "--simulated-prefill-tokens-per-s", "1e9")
    alone = ("--no-ollama-standin", "--ollama-host", "127.0.0.1:9")
    memory = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(prefix="headrace-", dir=memory if memory.is_dir() else None) as folder,
        running(Path(folder), *engine, *answers, *alone) as pipeline,
    ):
        yield pipeline


def crowd(pipeline: Pipeline) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=pipeline.http, timeout=100, limits=httpx.Limits(max_connections=STREAMS))


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
        async with web.stream("POST", PATH, json=chat(f"number {number} of many", stream=True)) as response:
            lines = response.aiter_lines()
            first = await first_of(lines)
            await all_read.wait()
            events = [line[6:] for line in [first, *[line async for line in lines]] if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        return "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1])

    async with crowd(crowded) as web:
        asked = [asyncio.ensure_future(ask(web, number)) for number in range(STREAMS)]
        await all_read.wait()
        busy = memory_of(crowded)
        answers = await asyncio.gather(*asked)
    for number, answer in enumerate(answers):
        assert f"number {number} of many ..." in answer
    assert all(busy[role] < 2 * idle[role] for role in idle), (idle, busy)


async def test_200_of_500_hang_up_their_slots_are_free_and_the_others_notice_nothing(crowded: Pipeline):
    """Of those who hang up each has read its first words; their requests are cancelled, and others take their slots."""
    leaving = [f"leaving-{number}" for number in range(HANG_UPS)]
    staying = [f"staying-{number}" for number in range(STREAMS - HANG_UPS)]
    async with asking(crowded.url) as asker, crowd(crowded) as web:
        cancelled: list[str] = []

        async def on_cancelled(message: Any) -> None:
            cancelled.append(json.loads(message.data)["id"])

        await asker.nc.subscribe("llm.event.*.cancelled", cb=on_cancelled)
        await asker.nc.flush()
        all_read = asyncio.Barrier(STREAMS)

        async def stream(request_id: str) -> str:
            headers = {"Idempotency-Key": request_id}
            async with web.stream("POST", PATH, json=chat("on and on", stream=True), headers=headers) as response:
                lines = response.aiter_lines()
                await first_of(lines)
                await all_read.wait()
                if request_id in leaving:
                    return ""
                return [line async for line in lines if line][-1]

        ends = await asyncio.gather(*(stream(request_id) for request_id in leaving + staying))
        assert set(ends[HANG_UPS:]) == {"data: [DONE]"}
        lasts = dict(zip(leaving, await asker.answers(leaving), strict=True))
        broken_off = {request_id for request_id, last in lasts.items() if last["object"] == "error"}
        assert {lasts[request_id]["error"]["code"] for request_id in broken_off} == {"cancelled"}
        # Those that were faster than the hanging up are whole.
        assert len(broken_off) > HANG_UPS / 2
        await eventually(lambda: set(cancelled) == broken_off, what="what was cancelled, and nothing else, is counted")
        assert all(asker.lasts(request_id) == 1 for request_id in leaving)

        async def free() -> bool:
            slots = (await web.get("/queue/stats")).json()["engines"]["mlx"]["slots"]
            return slots == {"used": 0, "total": STREAMS}

        await eventually(free, what="no slot is used")
