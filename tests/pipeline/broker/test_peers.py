"""Workers and loads are heard on the connection, and go by when that was."""

from __future__ import annotations

import pytest

from pipeline.broker.clock import Clock
from pipeline.broker.peers import Peers
from pipeline.core.roster import REMEMBERED_S
from pipeline.wire.messages import Load, PerPriority, PerPriorityCount, Slots, WorkerStatus, encode
from tests.waiting import eventually


class Hands:
    """The hands of a clock, moved by the test."""

    now = 1000.0


@pytest.fixture
def hands():
    return Hands()


@pytest.fixture
async def peers(bus, hands):
    bus.clock = Clock(lambda: hands.now)
    peers = Peers(bus)
    await peers.start()
    await bus.nc.flush()
    return peers


@pytest.fixture
def changes(peers):
    heard = []
    peers.on_change = lambda: heard.append(1)
    return heard


async def say(bus, worker="w1", *, engine="mlx", state="ready", models=("m",), **more):
    none = PerPriorityCount()
    status = WorkerStatus(worker, engine, state, list(models), Slots(0, 1), none, 0, 0, 0, 0, 0, at=0.0, **more)
    await bus.publish(f"llm.worker.{worker}", encode(status))


async def test_workers_are_known_by_engine_until_they_are_gone(bus, peers, changes):
    await say(bus, "w1", models=("m", "n"))
    await say(bus, "w2", models=("n", "o"), tool_models=["o"])
    await say(bus, "w3", engine="ollama", models=("p",), embedding_models=["e"], tool_models=["p"])
    await eventually(lambda: len(changes) == 3)
    assert [status.worker for status in peers.workers("mlx")] == ["w1", "w2"]
    assert peers.models("mlx") == ["m", "n", "o"]
    assert [status.worker for status in peers.workers("ollama")] == ["w3"]
    assert peers.embedding_models() == ["e"]
    assert peers.tool_models() == {"o", "p"}
    await say(bus, "w1", state="gone")
    await eventually(lambda: len(changes) == 4)
    assert [status.worker for status in peers.workers("mlx")] == ["w2"]
    assert peers.models("mlx") == ["m", "n", "o"], "it may be back in a moment"


async def test_silence_makes_workers_and_loads_stale_and_models_last_longer(bus, peers, changes, hands):
    await say(bus, "w1")
    await bus.publish(
        "llm.load.mlx",
        encode(Load("mlx", "busy", 0.8, PerPriority(), PerPriorityCount(), Slots(1, 1), 1.0, "", at=4e9)),
    )
    await eventually(lambda: len(changes) == 2)
    assert peers.load("mlx").level == "busy"
    hands.now += 4
    assert peers.workers("mlx") == []
    assert peers.load("mlx") is None
    assert peers.models("mlx") == ["m"]
    hands.now += REMEMBERED_S
    assert peers.models("mlx") == []
    await say(bus, "w1")
    await eventually(lambda: peers.workers("mlx"))


async def test_nonsense_is_ignored(bus, peers):
    for data in (b"", b"{}", b"\xff", b'{"object":"headrace.worker"}'):
        await bus.publish("llm.worker.evil", data)
        await bus.publish("llm.load.evil", data)
    await say(bus, "w1")
    await eventually(lambda: peers.workers("mlx"))


async def test_the_status_of_an_older_version_is_understood(bus, peers):
    """As version 0.9.0 without its later fields wrote it; its clock is an hour behind."""
    await bus.publish(
        "llm.worker.old",
        b'{"object":"headrace.worker","worker":"old","engine":"mlx","state":"ready","models":["m"],'
        b'"slots":{"used":0,"total":4},"running":{"high":0,"medium":0,"low":0},"pending_tokens":0.0,'
        b'"tokens_per_s":0.0,"tokens_per_request":0.0,"kv_bytes":0,"kv_bytes_limit":0,"at":1700000000.0}',
    )
    (status,) = await eventually(lambda: peers.workers("mlx"))
    assert status.slots == Slots(0, 4)


async def test_a_model_cannot_be_loaded_if_no_worker_can(bus, peers, config):
    await say(bus, "w1", models=("m",), cannot_load={"n": "why", "o": "that is why"})
    await say(bus, "w2", models=("m", "n"))
    await say(bus, "w3", models=("o",), cannot_load={"o": "the last try failed"})
    await eventually(lambda: len(peers.workers("mlx")) == 3)
    assert peers.cannot_load() == {"o": "the last try failed"}
    assert peers.catalogue(config).listed() == ["m", "n"]
    assert peers.catalogue(config).engines_for("o") == {"mlx"}, "it may be tried again"
