"""Requests on Ollama's lanes move back to MLX while no Ollama worker is ready, and only then."""

from __future__ import annotations

import asyncio
import time

import pytest

from consumers.router.evacuation import Evacuation
from pipeline.process.role import role
from pipeline.wire.messages import PerPriorityCount, Slots, WorkerStatus, encode
from pipeline.wire.subjects import STREAM_OLLAMA, STREAM_REQUESTS, Move
from tests.waiting import eventually

BODY = b'{"prompt": "What is the capital of France?"}'


def status(engine: str, state: str, *models: str, **more: bool) -> bytes:
    running = PerPriorityCount()
    slots = Slots(0, 4)
    told = WorkerStatus(f"{engine}-1", engine, state, list(models), slots, running, 0, 0, 0, 0, 0, time.time(), **more)
    return encode(told)


class Told(dict):
    """The state and models of each engine's worker; `more` has other fields of its status."""

    def __init__(self, *given) -> None:
        super().__init__(*given)
        self.more: dict[str, dict[str, bool]] = {}


@pytest.fixture
async def say(bus):
    """Says again and again what MLX and Ollama are; the test changes it."""
    told = Told({"mlx": ("ready", "big"), "ollama": ("ready", "small")})
    more = told.more

    async def go_on():
        while True:
            for engine, words in told.items():
                await bus.publish(f"llm.worker.{engine}-1", status(engine, *words, **more.get(engine, {})))
            await asyncio.sleep(0.1)

    task = asyncio.create_task(go_on())
    yield told
    task.cancel()


@pytest.fixture
async def evacuation(config):
    async with role("router", config) as me:
        task = asyncio.create_task(Evacuation(me, config).run())
        yield me
        task.cancel()
        await asyncio.wait([task])


async def subjects(bus, stream):
    return [message.headers["Nats-Subject"] async for message in bus.scan(stream, ">")]


async def left(bus, stream, wanted):
    """Until these are the subjects in a stream. A move stores a request before it deletes the old one."""

    async def they_are():
        return await subjects(bus, stream) == wanted

    await eventually(they_are)


async def spill(bus, request_id, body=BODY):
    headers = {
        "Nats-Msg-Id": bus.moves.make(request_id, Move.SPILLED, 1, 0.0),
        "Llm-Stored-At": repr(time.time()),
        "Llm-Task": "simple",
    }
    await bus.store("llm.ollama.high", body, headers=headers)


async def test_requests_go_back_when_ollama_goes_down_and_what_only_ollama_has_stays(bus, say, evacuation):
    say["ollama"] = ("down",)
    await spill(bus, "auto")
    await spill(bus, "theirs", b'{"prompt": "x", "model": "small"}')
    await left(bus, STREAM_REQUESTS, ["llm.request.high.complex"])
    [moved] = [message async for message in bus.scan(STREAM_REQUESTS, ">")]
    assert moved.headers["Nats-Msg-Id"].startswith("auto:returned")
    assert moved.headers["Llm-Reason"] == "back from ollama: ollama is away"
    await left(bus, STREAM_OLLAMA, ["llm.ollama.high"])


async def test_a_consumer_that_is_not_there_at_all_counts_as_away(bus, say, evacuation):
    del say["ollama"]
    await spill(bus, "auto")
    await left(bus, STREAM_OLLAMA, [])
    assert await subjects(bus, STREAM_REQUESTS) == ["llm.request.high.complex"]


async def test_nothing_is_taken_back_while_ollama_works(bus, say, evacuation):
    await spill(bus, "auto")

    async def heard():
        return evacuation.peers.models("ollama") == ["small"]

    await eventually(heard)
    [consumer] = [c for c in await bus.consumers(STREAM_OLLAMA) if c.name == "ollama_high"]
    assert (consumer.num_pending, consumer.num_ack_pending) == (1, 0)


async def test_a_request_for_a_model_that_ollama_has_no_more_ends_where_it_has_no_other(bus, say, evacuation):
    say["ollama"] = ("down",)
    say.more["ollama"] = {"empty": True}
    await spill(bus, "theirs", b'{"prompt": "x", "model": "small"}')
    await spill(bus, "auto")

    async def ended():
        return [message for _, message in await bus.read_answers("llm.reply.theirs")]

    [last] = await eventually(ended)
    assert last.error.code == "model_not_found"
    assert "small" in last.error.message
    await left(bus, STREAM_REQUESTS, ["llm.request.high.complex"])
    await left(bus, STREAM_OLLAMA, [])


async def test_what_mlx_workers_leave_in_the_lanes_is_moved_all_the_same(bus, say, evacuation):
    say["ollama"] = ("down",)
    say.more["mlx"] = {"borrows": True}
    await eventually(lambda: any(worker.borrows for worker in evacuation.peers.workers("mlx")))
    await spill(bus, "auto")
    await left(bus, STREAM_REQUESTS, ["llm.request.high.complex"])
