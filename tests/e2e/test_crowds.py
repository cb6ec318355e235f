"""Hundreds of streams at once: each client gets its own answer in bounded memory, and hanging up frees a slot."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

import httpx
import pytest

from pipeline.broker.connection import Message
from pipeline.broker.jetstream import Bus
from pipeline.wire.answers import Answer, is_last
from tests.e2e.conftest import Pipeline, chat, running
from tests.support import quick_folder
from tests.waiting import eventually, flushed

STREAMS, HANG_UPS = 500, 200
# Every step of the engine takes a quarter of a second, so a long answer is never complete within a test.
SHORT, LONG = 30, 20_000
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def crowded() -> Iterator[Pipeline]:
    """An engine with a slot for each stream, and a store in memory if there is room."""
    engine = ("--engine", "simulated", "--slots", str(STREAMS), "--simulated-tokens-per-s", "2000")
    answers = ("--simulated-answer-tokens", str(LONG), "--simulated-prefill-tokens-per-s", "1e9")
    alone = ("--no-ollama-standin", "--ollama-host", "127.0.0.1:9")
    with quick_folder() as folder, running(folder, *engine, *answers, *alone) as pipeline:
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


async def test_of_500_streams_200_hang_up_and_the_others_get_their_own_answers_in_bounded_memory(crowded: Pipeline):
    """A client that hangs up has read the first words of an answer that would go on for long."""
    leaving = [f"leaving-{number}" for number in range(HANG_UPS)]
    staying = [f"staying-{number}" for number in range(STREAMS - HANG_UPS)]
    idle = memory_of(crowded)
    # The records are read when all is over: beside 500 streams, this process is too slow for a subscription to all.
    async with Bus.connect(crowded.url, name="test") as bus, crowd(crowded) as web:
        cancelled: list[str] = []

        async def on_cancelled(message: Message) -> None:
            cancelled.append(json.loads(message.data)["id"])

        await bus.subscribe("llm.event.*.cancelled", on_cancelled)
        await flushed(bus.nc)
        all_read, all_may_go_on = asyncio.Barrier(STREAMS + 1), asyncio.Event()

        async def stream(request_id: str) -> list[str]:
            headers = {"Idempotency-Key": request_id}
            body = asked(f"{request_id} of many", LONG if request_id in leaving else SHORT)
            async with web.stream("POST", PATH, json=body, headers=headers) as response:
                lines = response.aiter_lines()
                first = await first_of(lines)
                await all_read.wait()
                await all_may_go_on.wait()
                if request_id in leaving:
                    return []
                return [line[6:] for line in [first, *[line async for line in lines]] if line.startswith("data: ")]

        streams = [asyncio.ensure_future(stream(request_id)) for request_id in leaving + staying]
        await all_read.wait()
        busy = memory_of(crowded)
        all_may_go_on.set()
        for request_id, events in zip(staying, (await asyncio.gather(*streams))[HANG_UPS:], strict=True):
            assert events[-1] == "[DONE]"
            deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
            assert f"{request_id} of many ..." in "".join(delta.get("content") or "" for delta in deltas)
        assert all(busy[role] < 2 * idle[role] for role in idle), (idle, busy)

        async def lasts(request_id: str) -> list[Answer]:
            record = [message for _, message in await bus.read_answers(f"llm.reply.{request_id}")]
            return [message for message in record if is_last(message)]

        await eventually(
            lambda: set(cancelled) == set(leaving), what="each cancelled request, and no other, is counted"
        )
        for request_id in leaving:
            (last,) = await eventually(partial(lasts, request_id), what=f"the end of {request_id}")
            assert last.error.code == "cancelled"

        async def free() -> bool:
            slots = (await web.get("/queue/stats")).json()["engines"]["mlx"]["slots"]
            return slots == {"used": 0, "total": STREAMS}

        # The gateway allows one client 20 calls for statistics a second.
        await eventually(free, what="no slot is used", every_s=0.1)
