"""What the doctor says of the second engine."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from pipeline.broker.jetstream import Bus
from pipeline.broker.peers import Peers
from pipeline.commands import doctor
from pipeline.commands.doctor import Heard, _engines, _monitor, _ollama, _openai, _spilling, _store
from pipeline.config import Config
from pipeline.core.statistics import LaneStatistics, QueueStatistics
from pipeline.up.screen import DEMO_MODEL
from pipeline.wire.messages import Load, PerPriority, PerPriorityCount, Slots, StoreReport, WorkerStatus, encode
from pipeline.wire.subjects import STORE
from tests.consumers.openai_server import openai_server


@pytest.mark.parametrize(
    ("settings", "level", "says"),
    [
        ({"ollama_host": "none"}, "ok", "`headrace up` starts llama.cpp (xllamacpp "),
        ({"ollama_host": "none", "model": DEMO_MODEL}, "ok", "a stand-in with the demo model"),
        ({"ollama_host": "none", "engine": "simulated"}, "ok", "a stand-in with the demo model"),
        ({"ollama_host": "none", "openai": ["http://x"]}, "ok", "requests spill to the servers of OpenAI's API"),
        ({"ollama_host": "none", "ollama_standin": False}, "warn", "none, by --ollama-host"),
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
    ("models", "level", "says"),
    [
        (["m"], "ok", "models: m"),
        (["tinyllama"], "warn", "without a model for users"),
        (None, "warn", "no list of models at http://127.0.0.1:"),
    ],
)
async def test_it_says_what_a_server_of_openais_api_has(models, level, says):
    async with openai_server() as server:
        server.models = [{"id": name} for name in models or []]
        if models is None:
            server.lists = lambda connection: connection.answer({"error": "bad key"}, 401)
        finding = await _openai(Config(openai_key="k"), server.url)
        assert (finding.level, bool(finding.next_step)) == (level, level == "warn")
        assert says in finding.detail
        assert "authorization: bearer k" in server.heads[0].lower()


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
        looking = asyncio.create_task(_store(bus, peers, Heard()))
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
    assert [each.detail for each in await engines_of(nats_server, status)] == ([f"mlx-1: {alone}"] if alone else [])


async def test_it_says_which_model_cannot_be_loaded_and_why(nats_server):
    none = PerPriorityCount()
    status = WorkerStatus("mlx-1", "mlx", "ready", ["m"], Slots(0, 1), none, 0, 0, 0, 0, 0, at=0.0)
    status.cannot_load = {"n": "its file is incomplete."}
    (finding,) = await engines_of(nats_server, status)
    assert (finding.level, finding.what, finding.detail) == (
        "warn",
        "model",
        "n cannot be loaded: its file is incomplete.",
    )


async def engines_of(nats_server, status):
    async with Bus.connect(nats_server.url, name="up") as up, Bus.connect(nats_server.url, name="doctor") as bus:
        peers = Peers(bus)
        await peers.start()
        while not peers.workers("mlx"):
            await up.publish("llm.worker.mlx-1", encode(status))
            await asyncio.sleep(0.01)
        return await _engines(peers, Heard())


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


async def test_without_a_monitor_nothing_is_waited_for(nats_server, monkeypatch):
    async with Bus.connect(nats_server.url, name="doctor") as bus:
        peers = Peers(bus)
        await peers.start()
        finding, heard = await _monitor(bus)
        assert (finding.level, finding.detail) == (
            "warn",
            "none is running on this broker, so no other role was checked",
        )
        assert heard == Heard(runs=False)
        waited = []

        async def wait(_event, seconds: float) -> None:
            waited.append(seconds)

        monkeypatch.setattr(doctor, "wait_set", wait)
        assert (await _store(bus, peers, heard)).level == "ok"
        assert await _engines(peers, heard) == []
        assert waited == []


async def test_what_a_monitor_knows_of_the_store_and_the_models_is_not_waited_for(nats_server, monkeypatch):
    statistics = QueueStatistics(*(LaneStatistics() for _ in range(3)), {}, {}, 0, uptime_s=60.0)
    statistics.cannot_load = {"n": "why"}
    monkeypatch.setattr(doctor, "_WORKER_HEARD_S", 0.0)
    async with Bus.connect(nats_server.url, name="doctor") as bus:
        peers = Peers(bus)
        await peers.start()
        monkeypatch.setattr(doctor, "wait_set", None)
        assert "no process reports" in (await _store(bus, peers, Heard(statistics))).detail
        assert [each.detail for each in await _engines(peers, Heard(statistics))] == ["n cannot be loaded: why"]
        statistics.store = StoreReport("full", "The disk is full.", 0, 1)
        assert (await _store(bus, peers, Heard(statistics))).detail == "The disk is full."
