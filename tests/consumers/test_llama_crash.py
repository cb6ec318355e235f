"""llama.cpp crashes in the middle of an answer: its process is restarted, and the request is answered."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest

from consumers import mlx, monitor, ollama
from pipeline.broker.jetstream import Bus
from pipeline.config import Config
from pipeline.process.lifecycle import Lifecycle
from pipeline.wire.answers import Completion
from tests.consumers.conftest import Launch, StandIn
from tests.pipeline.worker.conftest import Client
from tests.waiting import eventually

LONG = {"prompt": "Tell me everything.", "max_tokens": 1900, "temperature": 0}


@pytest.fixture
def second(launch: Launch, tiny: Path) -> StandIn:
    with launch("--gguf", str(tiny), "--name", "tiny", "--threads", "1") as standin:
        yield standin


@pytest.fixture
async def client(config: Config, bus: Bus, second: StandIn) -> AsyncIterator[Client]:
    """A client of a simulated MLX engine that serves `big`, and of llama.cpp that serves `tiny`."""
    settings = msgspec.structs.replace(
        config, engine="simulated", model="big", ollama_host=second.url, default_max_tokens=1900, lease_s=2.0
    )
    async with AsyncExitStack() as stack:
        for role in (mlx.main, ollama.main, monitor.main):
            lifecycle = Lifecycle(role.__module__, drain_timeout_s=5)
            task = asyncio.create_task(role(settings, lifecycle))
            stack.push_async_callback(_end, lifecycle, task)
        yield Client(bus)


async def _end(lifecycle: Lifecycle, task: asyncio.Task[None]) -> None:
    lifecycle.stop(drain_s=0.0)
    await asyncio.wait_for(task, 20)


async def test_a_crash_in_mid_answer_costs_an_attempt_and_no_answer(
    client: Client, second: StandIn, launch: Launch, tiny: Path
) -> None:
    body = json.dumps(LONG | {"model": "tiny:latest"}).encode()
    await client.ask("whole", body)
    whole = await client.answer("whole")
    assert isinstance(whole, Completion), whole
    assert whole.headrace.engine == "ollama"
    started: list[str] = []

    async def note(message) -> None:
        started.append(json.loads(message.data)["id"])

    await client.bus.subscribe("llm.event.*.started", note)
    await client.ask("crashed", body)
    await eventually(lambda: "crashed" in started)
    os.kill(second.pid, signal.SIGSEGV)
    await asyncio.to_thread(second.process.wait, 20)
    with launch("--port", str(second.port), "--gguf", str(tiny), "--name", "tiny", "--threads", "1"):
        answer = await client.answer("crashed", timeout_s=60)
    assert isinstance(answer, Completion), answer
    assert (answer.headrace.engine, answer.headrace.attempts) == ("ollama", 2)
    assert answer.choices[0].message.content == whole.choices[0].message.content
