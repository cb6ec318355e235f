"""A request that kills the engine's process: found out, answered, kept as a dead letter; its neighbours are served."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import msgspec
import pytest

from consumers import mlx, monitor
from pipeline import cli
from pipeline.broker.connection import Unreachable
from pipeline.broker.jetstream import Bus
from pipeline.config import Config
from pipeline.process.lifecycle import Lifecycle
from pipeline.wire.answers import Completion
from pipeline.wire.subjects import STREAM_DEAD
from tests.pipeline.worker.conftest import Client
from tests.waiting import eventually

POISON = b'{"prompt":"[[fault:segfault@3]]","stream":true,"max_tokens":20}'
ANSWER_TOKENS = 40
GOOD = b'{"prompt":"hello","stream":true,"max_tokens":60}'


@pytest.fixture
async def client(config: Config, bus: Bus) -> AsyncIterator[Client]:
    """A client of a running MLX consumer, with the simulated engine in its own process, and a monitor."""
    settings = msgspec.structs.replace(
        config,
        engine="simulated",
        engine_faults=True,
        slots=4,
        simulated_tokens_per_s=200.0,
        simulated_answer_tokens=ANSWER_TOKENS,
        lease_s=2.0,
    )
    async with AsyncExitStack() as stack:
        for role in (mlx.main, monitor.main):
            lifecycle = Lifecycle(role.__module__, drain_timeout_s=5)
            task = asyncio.create_task(role(settings, lifecycle))
            stack.push_async_callback(_end, lifecycle, task)
        await eventually(lambda: answers(bus), what="the monitor answers")
        yield Client(bus)


async def _end(lifecycle: Lifecycle, task: asyncio.Task[None]) -> None:
    lifecycle.stop(drain_s=0.0)
    await asyncio.wait_for(task, 20)


async def answers(bus: Bus) -> bool:
    """Whether the monitor answers."""
    with contextlib.suppress(Unreachable):
        return bool(await bus.request("llm.queue.stats"))
    return False


async def dead(client: Client) -> int:
    """As the statistics say."""
    return msgspec.json.decode((await client.bus.request("llm.queue.stats")).data)["dead"]


async def test_poison_is_found_out_and_takes_its_neighbours_with_it_no_more_than_once(client):
    neighbours = [f"n{number}" for number in range(3)]
    for request_id in neighbours:
        await client.ask(request_id, GOOD)
    await client.ask("poison", POISON)
    error = (await client.answer("poison", timeout_s=60)).error
    assert error.code == "engine_failed"
    for request_id in neighbours:
        answer = await client.answer(request_id, timeout_s=60)
        assert isinstance(answer, Completion)
        assert answer.headrace.attempts <= 2
        assert answer.usage.completion_tokens == ANSWER_TOKENS
    await client.none_waits()
    assert await dead(client) == 1
    letter = await client.bus.stored(STREAM_DEAD, 1)
    assert (letter.headers["Llm-Id"], letter.data) == ("poison", POISON)


async def test_poison_that_is_replayed_dies_again_and_others_go_on(client, config):
    await client.ask("poison", POISON)
    await client.answer("poison", timeout_s=60)
    await eventually(lambda: dead(client))
    code = await asyncio.to_thread(cli.main, ["dead", "replay", "poison", "--nats-url", config.nats_url])
    assert code == 0
    await client.ask("good", GOOD)
    assert isinstance(await client.answer("good", timeout_s=60), Completion)

    async def buried_again():
        letter = await client.bus.stored(STREAM_DEAD, 2)
        return letter is not None and letter.headers["Llm-Id"] == "poison"

    await eventually(buried_again, what="a second letter", timeout_s=60)
    await client.none_waits()
    assert await dead(client) == 1
    assert (await client.code("poison")) == "engine_failed"


@pytest.mark.parametrize("body", [b'{"messages": [', b"\xff\xfe", b'{"prompt":"x","n":3}'])
async def test_what_cannot_be_read_is_refused_and_is_no_dead_letter(client, body):
    await client.ask("bad", body)
    assert await client.code("bad") in ("invalid_request", "unsupported_parameter")
    await client.none_waits()
    assert await eventually(lambda: _stats_answer(client)) == {"dead": 0}


async def _stats_answer(client: Client) -> dict[str, int]:
    return {"dead": await dead(client)}
