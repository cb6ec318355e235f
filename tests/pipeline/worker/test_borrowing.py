"""MLX's worker takes from Ollama's lanes what it begins or continues sooner, in its turn, and leaves the rest there."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from pipeline.delivery.lanes import OLLAMA_SOURCE
from pipeline.wire.messages import Load, PerPriority, PerPriorityCount, Slots, encode
from pipeline.wire.subjects import STREAM_OLLAMA, Move
from tests.pipeline.worker.conftest import ScriptedEngine
from tests.waiting import eventually

STREAMED = b'{"prompt":"x","stream":true}'


@pytest.fixture
async def spill(bus):
    """Spills a request, as the router does."""

    async def spill(request_id: str, body: bytes = STREAMED, lane: str = "high") -> None:
        headers = {
            "Nats-Msg-Id": bus.moves.make(request_id, Move.SPILLED, 1, 0.0),
            "Llm-Stored-At": repr(time.time()),
            "Llm-Reason": "mlx is saturated",
            "Llm-Task": "simple",
        }
        await bus.store(f"llm.ollama.{lane}", body, headers=headers)

    return spill


@pytest.fixture
async def loads(bus):
    """Says again and again how loaded the engines are; the test changes it."""
    none = PerPriorityCount()
    told = {
        "mlx": Load("mlx", "normal", 0.0, PerPriority(), none, Slots(0, 1), 100.0, "", at=0.0),
        "ollama": Load("ollama", "normal", 0.0, PerPriority(), none, Slots(1, 1), 10.0, "", at=0.0),
    }

    async def go_on() -> None:
        while True:
            for engine, load in told.items():
                await bus.publish(f"llm.load.{engine}", encode(load))
            await asyncio.sleep(0.05)

    task = asyncio.create_task(go_on())
    yield told
    task.cancel()


def ollama(**reports) -> ScriptedEngine:
    return ScriptedEngine(slots=1, name="ollama", model="small", reports=reports)


async def both(start, mlx_slots: int = 1, **reports):
    """MLX's worker and Ollama's, which have heard each other."""
    mlx = await start(ScriptedEngine(slots=mlx_slots))
    other = await start(ollama(**reports), OLLAMA_SOURCE)
    await eventually(lambda: mlx.worker.me.peers.models("ollama") and other.worker.me.peers.workers("mlx"))
    await eventually(lambda: any(status.borrows for status in other.worker.me.peers.workers("mlx")))
    return mlx.engine, other.engine


async def test_a_half_read_answer_goes_on_at_once_beyond_the_slots_and_names_both_models(
    start, client, spill, loads
) -> None:
    mlx, other = await both(start)
    await client.stream("busy", lane="low.complex")
    await mlx.generation("busy")
    await client.stream("waits", lane="high.complex")
    await spill("half")
    begun = await other.generation("half")
    begun.say("one ")
    await client.until("half", 3)
    begun.misbehave()
    there = await mlx.generation("half")
    assert there.work.resume_text == "one "
    assert [run.work.id for run in mlx.submitted] == ["busy", "half"], "it waits for no slot"
    there.finish("two")
    answer = await client.answer("half")
    assert answer.choices[0].message.content == "one two"
    assert answer.headrace.models == ["small", "scripted"]
    assert answer.headrace.spilled
    assert answer.headrace.engine == "mlx"
    assert "ollama" in answer.headrace.reason


async def test_a_half_read_answer_goes_on_at_once_where_the_only_free_slot_awaits_a_request(
    start, client, spill, loads
) -> None:
    mlx, other = await both(start)
    await spill("half")
    begun = await other.generation("half")
    begun.say("one ")
    await client.until("half", 3)
    begun.misbehave()
    (await mlx.generation("half")).finish("two")
    assert (await client.answer("half")).choices[0].message.content == "one two"
    assert len(other.submitted) == 1


async def test_a_queued_request_is_taken_back_once_mlx_has_a_free_slot(start, client, spill, loads) -> None:
    mlx, other = await both(start)
    await spill("first")
    first = await other.generation("first")
    await spill("second")
    loads["ollama"].queued = PerPriorityCount(high=1)
    (await mlx.generation("second")).finish("x")
    answer = await client.answer("second")
    assert answer.headrace.spilled
    assert answer.headrace.engine == "mlx"
    first.finish("y")
    assert (await client.answer("first")).headrace.engine == "ollama"
    assert len(other.submitted) == 1


async def test_what_only_ollama_can_answer_stays_for_it(start, client, spill, loads) -> None:
    mlx, other = await both(start)
    await spill("first")
    first = await other.generation("first")
    await spill("theirs", b'{"prompt":"x","model":"small"}')
    await spill("ours")
    loads["ollama"].queued = PerPriorityCount(high=2)

    async def returned() -> bool:
        return (await client.bus.js.consumer_info(STREAM_OLLAMA, "ollama_high")).num_redelivered > 0

    await eventually(returned)
    first.finish("y")
    (await other.generation("theirs")).finish("z")
    assert (await client.answer("theirs")).headrace.engine == "ollama"
    assert "theirs" not in [run.work.id for run in mlx.submitted]


async def test_a_running_answer_is_given_back_where_mlx_ends_it_sooner(start, client, spill, loads) -> None:
    measured = {"tokens_per_s": 10.0, "tokens_per_request": 50.0, "answer_tokens_per_s": 10.0}
    mlx, other = await both(start, rests={}, **measured)
    mlx.reports = {"tokens_per_s": 100.0, "tokens_per_request": 50.0}
    mlx.changed()
    await spill("long")
    begun = await other.generation("long")
    begun.say("one ")
    await client.until("long", 3)
    other.reports["rests"] = {"long": 30.0}
    there = await mlx.generation("long")
    assert there.work.resume_text == "one "
    assert begun.closed
    there.finish("two")
    answer = await client.answer("long")
    assert answer.choices[0].message.content == "one two"
    assert answer.headrace.models == ["small", "scripted"]


async def test_a_worker_that_returns_an_answer_takes_no_other_request_before_mlx_has_it(
    start, client, spill, loads
) -> None:
    mlx, other = await both(start)
    deliveries = {}

    async def on_started(message) -> None:
        event = json.loads(message.data)
        deliveries[event["id"]] = event["deliveries"]

    await client.bus.subscribe("llm.event.*.started", on_started)
    await spill("half")
    begun = await other.generation("half")
    begun.say("one ")
    await client.until("half", 3)
    await spill("next", b'{"prompt":"x","model":"small"}')
    begun.misbehave()
    (await mlx.generation("half")).finish("two")
    await client.answer("half")
    (await other.generation("next")).finish("x")
    await client.answer("next")
    assert deliveries == {"half": 2, "next": 1}


async def test_a_running_answer_stays_where_it_ends_sooner(start, client, spill, loads) -> None:
    measured = {"tokens_per_s": 10.0, "tokens_per_request": 50.0, "answer_tokens_per_s": 10.0}
    mlx, other = await both(start, rests={"short": 0.5, "long": 30.0}, **measured)
    mlx.reports = {"tokens_per_s": 100.0, "tokens_per_request": 50.0}
    mlx.changed()
    await spill("short")
    begun = await other.generation("short")
    begun.say("one ")
    await client.until("short", 3)
    begun.finish("two")
    assert (await client.answer("short")).headrace.engine == "ollama"
    await spill("long")
    await mlx.generation("long")
    assert [run.work.id for run in mlx.submitted] == ["long"]
