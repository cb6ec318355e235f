"""What the doctor says of the second engine."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from pipeline.broker.jetstream import Bus
from pipeline.broker.peers import Peers
from pipeline.commands.doctor import _alone, _ollama, _spilling, _store
from pipeline.config import Config
from pipeline.up.screen import DEMO_MODEL
from pipeline.wire.messages import Load, PerPriority, PerPriorityCount, Slots, StoreReport, WorkerStatus, encode
from pipeline.wire.subjects import STORE


@pytest.mark.parametrize(
    ("settings", "level", "says"),
    [
        ({"ollama_host": "none"}, "ok", "`headrace up` starts llama.cpp (xllamacpp "),
        ({"ollama_host": "none", "model": DEMO_MODEL}, "ok", "a stand-in with the demo model"),
        ({"ollama_host": "none", "engine": "simulated"}, "ok", "a stand-in with the demo model"),
        ({"ollama_host": "none", "ollama_standin": False}, "warn", "no Ollama server is looked for"),
        (
            {"ollama_host": "127.0.0.1:9"},
            "warn",
            "no Ollama at http://127.0.0.1:9; until it answers, no request spills",
        ),
    ],
)
async def test_it_says_which_second_engine_up_starts(settings, level, says):
    finding = await _ollama(Config(**{"model": "smollm2"} | settings))
    assert finding.level == level
    assert says in finding.detail
    assert bool(finding.next_step) is (level == "warn")


@pytest.mark.parametrize(
    ("report", "level", "says"),
    [
        (StoreReport("ok", "", 20 << 30, 100 << 30), "ok", "20 GiB of 100 GiB free"),
        (StoreReport("low", "The disk has 1 GiB free.", 1 << 30, 100 << 30), "warn", "The disk has 1 GiB free."),
        (StoreReport("failed", "The broker cannot write.", 0, 100 << 30), "fail", "The broker cannot write."),
    ],
)
async def test_it_says_what_the_process_of_the_broker_reports_on_its_store(nats_server, report, level, says):
    async with Bus.connect(nats_server.url, name="up") as up, Bus.connect(nats_server.url, name="doctor") as bus:
        peers = Peers(bus)
        await peers.start()
        looking = asyncio.create_task(_store(bus, peers))
        while not looking.done():
            await up.publish(STORE, encode(report))
            await asyncio.sleep(0.01)
        finding = await looking
    assert (finding.level, finding.detail) == (level, says)
    assert bool(finding.next_step) is (level != "ok")


@pytest.mark.parametrize("alone", ["", "one request at a time (no mask)"])
async def test_it_says_which_worker_runs_one_request_at_a_time(nats_server, alone):
    status = WorkerStatus(
        "mlx-1", "mlx", "ready", ["m"], Slots(0, 1), PerPriorityCount(), 0, 0, 0, 0, 0, at=0.0, alone=alone
    )
    async with Bus.connect(nats_server.url, name="up") as up, Bus.connect(nats_server.url, name="doctor") as bus:
        peers = Peers(bus)
        await peers.start()
        while not peers.workers("mlx"):
            await up.publish("llm.worker.mlx-1", encode(status))
            await asyncio.sleep(0.01)
        findings = await _alone(peers)
    assert [finding.detail for finding in findings] == ([f"mlx-1: {alone}"] if alone else [])


async def test_it_says_that_nothing_spills_on_a_shared_machine_as_long_as_that_is_so(bus):
    keeps = "ollama shares this machine: both together are no quicker"
    none = PerPriorityCount()
    load = Load("mlx", "normal", 0.0, PerPriority(), none, Slots(0, 8), 48.0, "", at=bus.clock.wall())
    assert await _spilling(bus) == []
    for changes, found in (
        ({"keeps": "mlx is measured alone"}, 0),
        ({"keeps": keeps, "takes_back": True}, 1),
        ({"keeps": keeps, "takes_back": True, "at": load.at - 60}, 0),
    ):
        await bus.js.publish("llm.load.mlx", encode(msgspec.structs.replace(load, **changes)))
        findings = await _spilling(bus)
        assert len(findings) == found
        assert all(keeps in finding.detail and finding.level == "warn" for finding in findings)
