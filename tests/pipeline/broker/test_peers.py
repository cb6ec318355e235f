"""What the others said last, as long as it is fresh."""

from __future__ import annotations

import time

import pytest

from pipeline.broker.peers import REMEMBERED_S, Peers
from pipeline.wire.messages import Load, PerPriority, PerPriorityCount, Slots, WorkerStatus, encode
from tests.waiting import eventually


@pytest.fixture
async def peers(bus):
    peers = Peers(bus)
    await peers.start()
    await bus.nc.flush()
    return peers


async def say(bus, worker="w1", *, engine="mlx", state="ready", models=("m",), age_s=0.0):
    status = WorkerStatus(
        worker=worker,
        engine=engine,
        state=state,
        models=list(models),
        slots=Slots(0, 1),
        running=PerPriorityCount(),
        pending_tokens=0,
        tokens_per_s=0,
        tokens_per_request=0,
        kv_bytes=0,
        kv_bytes_limit=0,
        at=time.time() - age_s,
    )
    await bus.publish(f"llm.worker.{worker}", encode(status))


async def load(bus, level="busy", age_s=0.0):
    waits = PerPriority()
    event = Load("mlx", level, 0.8, waits, PerPriorityCount(), Slots(1, 1), 1.0, "", time.time() - age_s)
    await bus.publish("llm.load.mlx", encode(event))


async def test_workers_are_known_by_engine_until_they_are_gone(bus, peers):
    changes = []
    peers.on_change = lambda: changes.append(1)
    await say(bus, "w1", models=("m", "n"))
    await say(bus, "w2", models=("n", "o"))
    await say(bus, "w3", engine="ollama")
    await eventually(lambda: len(changes) == 3)
    assert [status.worker for status in peers.workers("mlx")] == ["w1", "w2"]
    assert peers.models("mlx") == ["m", "n", "o"]
    assert [status.worker for status in peers.workers("ollama")] == ["w3"]
    await say(bus, "w1", state="gone")
    await eventually(lambda: len(changes) == 4)
    assert [status.worker for status in peers.workers("mlx")] == ["w2"]


async def test_a_model_is_known_for_as_long_as_its_worker_takes_to_come_back(bus, peers):
    await say(bus, "crashed", models=("a",), age_s=REMEMBERED_S - 5)
    await say(bus, "long-gone", models=("b",), age_s=REMEMBERED_S + 5)
    await say(bus, "stopped", models=("c",), state="gone")
    await say(bus, "other", engine="ollama", models=("d",))
    await eventually(lambda: peers.workers("ollama"))
    assert peers.workers("mlx") == []
    assert peers.models("mlx") == ["a", "c"]
    await say(bus, "stopped", models=("e",))
    await eventually(lambda: peers.workers("mlx"))
    assert peers.models("mlx") == ["a", "e"]


async def test_old_words_say_nothing(bus, peers):
    await say(bus, "old", age_s=10)
    await load(bus, age_s=10)
    await say(bus, "new")
    await eventually(lambda: peers.workers("mlx"))
    assert [status.worker for status in peers.workers("mlx")] == ["new"]
    assert peers.load("mlx") is None
    await load(bus)
    await eventually(lambda: peers.load("mlx"))
    assert peers.load("mlx").level == "busy"
    assert peers.load("ollama") is None


async def test_nonsense_is_ignored(bus, peers):
    for data in (b"", b"{}", b"\xff", b'{"object":"headrace.worker"}'):
        await bus.publish("llm.worker.evil", data)
        await bus.publish("llm.load.evil", data)
    await say(bus, "w1")
    await eventually(lambda: peers.workers("mlx"))
