"""The monitor knows what was stored while it could not listen, and cancels what a dead worker still seems to run."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from consumers.monitor.monitor import Monitor
from pipeline.broker.connection import Unreachable
from pipeline.broker.jetstream import Bus
from pipeline.wire.messages import RequestEvent, encode
from pipeline.wire.subjects import Priority
from tests.consumers.monitor.conftest import ask_service, cancel
from tests.pipeline.worker.conftest import client, start
from tests.waiting import eventually

__all__ = ["client", "start"]  # fixtures


async def test_what_was_stored_while_the_connection_was_away_is_known_afterwards(
    monitor, bus, client, nats_server, monkeypatch
):
    async def deaf(*_):
        """As while the broker is away."""

    monkeypatch.setattr(Monitor, "_on_stored", deaf)
    await monitor()
    await client.ask("r1")
    await bus.nc.flush()
    assert (await ask_service(bus, "llm.queue.position", b"r1"))["state"] == "unknown"
    nats_server.kill()
    nats_server.start()

    async def known():
        try:
            return await _state(bus, "queued")
        except Unreachable:
            return False  # on its way back

    await eventually(known)
    assert await cancel(bus, "r1") == "cancelled"
    assert (await client.answer("r1")).error.code == "cancelled"


@pytest.fixture
def config(config):
    return replace(config, lease_s=1.0)


async def test_a_request_whose_worker_has_died_is_cancelled_all_the_same(monitor, bus: Bus, client):
    await monitor()
    await client.ask("r1")
    await eventually(lambda: _state(bus, "queued"))
    await bus.publish("llm.event.high.started", encode(RequestEvent("r1", "started", Priority.HIGH, "mlx")))
    await eventually(lambda: _state(bus, "running"))
    assert await cancel(bus, "r1") == "cancelled"
    assert (await client.answer("r1")).error.code == "cancelled"
    await client.none_waits()


async def _state(bus, state):
    return (await ask_service(bus, "llm.queue.position", b"r1"))["state"] == state
