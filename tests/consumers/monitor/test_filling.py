"""A monitor that starts on a long queue is of use at once, and tells what it does not know yet."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from consumers.monitor import cancelling
from consumers.monitor.monitor import Monitor
from consumers.monitor.view import QueueView
from pipeline.delivery.puller import Puller
from pipeline.wire.messages import Load, RequestEvent, encode
from pipeline.wire.subjects import MSG_ID, STREAM_REQUESTS, Move
from tests.consumers.monitor.conftest import GatedRead, ask_service, cancel, position
from tests.pipeline.worker.conftest import Client, client
from tests.waiting import eventually, taken

__all__ = ["client"]  # fixture


@pytest.fixture
def gate():
    return GatedRead()


@pytest.fixture
def reads_at(gate):
    """Makes a monitor read the queue once the gate is open."""

    def prepare(it: Monitor) -> None:
        it.view.read = gate

    return prepare


async def filled(bus):
    async def whole():
        return (await ask_service(bus, "llm.queue.stats"))["filled"] == 1.0

    await eventually(whole, what="the queue is known")


async def queued(client: Client, count: int, lane: str = "high") -> list[str]:
    ids = [f"old-{number}" for number in range(count)]
    for request_id in ids:
        await client.ask(request_id, lane=lane)
    return ids


async def test_loads_and_depths_are_told_before_the_queue_was_read(monitor, bus, client, gate, reads_at):
    heard = []

    async def on_load(message):
        heard.append(msgspec.json.decode(message.data, type=Load))

    await bus.subscribe("llm.load.mlx", on_load)
    await queued(client, 25)
    await monitor(reads_at)
    assert (await eventually(lambda: heard))[0].queued.high == 25
    statistics = await ask_service(bus, "llm.queue.stats")
    assert statistics["high"]["queued"] == 25
    assert "positions" in statistics["unknown"]
    assert statistics["filled"] < 1.0
    gate.open.set()
    await filled(bus)
    assert "positions" not in (await ask_service(bus, "llm.queue.stats"))["unknown"]


async def test_the_position_of_a_request_that_was_not_read_is_no_number(monitor, bus, client, gate, reads_at):
    await queued(client, 25)
    await monitor(reads_at)
    assert await position(bus, "old-7") == {"id": "old-7", "state": "filling"}
    assert (await position(bus, "* evil >"))["state"] == "unknown"
    gate.open.set()
    await filled(bus)
    assert (await position(bus, "old-7"))["position"] == 7
    assert (await position(bus, "nobody"))["state"] == "unknown"


async def test_the_position_of_a_request_that_came_since_is_estimated_from_the_brokers_count(
    monitor, bus, client, gate, reads_at
):
    await queued(client, 25)
    await monitor(reads_at)
    await client.ask("new-0")
    await client.ask("new-1")

    async def estimated():
        found = [await position(bus, request_id) for request_id in ("new-0", "new-1")]
        return found if [one.get("position") for one in found] == [25, 26] else None

    assert [one["estimated"] for one in await eventually(estimated)] == [True, True]
    gate.open.set()
    await filled(bus)
    assert (await position(bus, "new-0"))["position"] == 25
    assert "estimated" not in await position(bus, "new-0")


async def test_fifty_cancels_that_come_while_the_queue_is_read_are_all_carried_out(
    monitor, bus, client, gate, reads_at
):
    ids = await queued(client, 120)
    await monitor(reads_at)
    asked, published = ids[10:60:2], ids[11:60:2]
    states = await asyncio.gather(*(cancel(bus, request_id) for request_id in asked))
    assert set(states) == {"pending"}
    for request_id in published:
        await bus.publish(f"llm.cancel.{request_id}", b"")
    await bus.nc.flush()
    gate.open.set()
    await client.none_waits(but=70)
    for request_id in (*asked, *published):
        assert await client.code(request_id) == "cancelled"
    assert await client.record(ids[0]) == []


async def test_a_cancel_that_overtakes_the_announcement_of_its_request_is_carried_out(
    monitor, bus, client, gate, reads_at
):
    await queued(client, 1)
    it = await monitor(reads_at)
    held = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QueueView, "announced", lambda _, message: held.append(message))
        await client.ask("r1")
        await eventually(lambda: held)
        assert await cancel(bus, "r1") == "pending"
    it.view.announced(held[0])
    assert await client.code("r1") == "cancelled"


async def test_a_cancel_that_came_before_its_id_was_used_means_no_request(
    monitor, bus, client, gate, reads_at, monkeypatch
):
    monkeypatch.setattr(cancelling, "_CLOCK_ERROR_S", -1.0)
    await queued(client, 25)
    it = await monitor(reads_at)
    assert await cancel(bus, "job-7") == "pending"
    await client.ask("job-7")
    await eventually(lambda: it.view.find("job-7"))
    gate.open.set()
    await filled(bus)
    assert await cancel(bus, "old-3") == "cancelled", "which went the whole way behind it"
    assert (await position(bus, "job-7"))["state"] == "queued"
    assert await client.record("job-7") == []


async def test_a_cancelled_request_that_moves_before_it_is_read_is_cancelled_where_it_stands_next(
    monitor, bus, client, gate, reads_at
):
    await client.ask("r1")
    stored = await bus.stored(STREAM_REQUESTS, 1)
    await monitor(reads_at)
    assert await cancel(bus, "r1") == "pending"
    moved_id = bus.moves.make("r1", Move.COMPLEX, 1, stored.stored_at)
    headers = {MSG_ID: moved_id, "Llm-Stored-At": repr(stored.stored_at), "Llm-Task": "complex"}
    await bus.store("llm.request.high.complex", stored.data, headers=headers)
    await bus.delete(STREAM_REQUESTS, 1)
    assert await client.code("r1") == "cancelled"
    await client.none_waits()


async def test_what_happens_to_a_request_before_it_is_read_is_known_when_it_is(monitor, bus, client, gate, reads_at):
    await queued(client, 4)
    await monitor(reads_at)
    for request_id, kind in (("old-0", "started"), ("old-1", "done")):
        await bus.publish(f"llm.event.high.{kind}", encode(RequestEvent(request_id, kind, "high", "mlx")))
    await bus.nc.flush()
    await ask_service(bus, "llm.queue.stats")
    gate.open.set()
    await filled(bus)
    found = [await position(bus, f"old-{number}") for number in range(4)]
    assert [one["state"] for one in found] == ["running", "unknown", "queued", "queued"]
    assert [one["position"] for one in found[2:]] == [0, 1]


async def test_what_was_handed_to_a_worker_before_runs(monitor, bus, client):
    async def surplus(_):
        raise AssertionError

    for number in range(3):
        await client.ask(f"r{number}", lane="medium.simple")
    puller = Puller(bus, STREAM_REQUESTS, surplus, 30.0)
    await puller.start()
    await taken(puller, "medium_simple")
    await monitor()
    await filled(bus)
    found = [await position(bus, f"r{number}") for number in range(3)]
    assert [(one["state"], one["position"]) for one in found] == [("running", 0), ("queued", 0), ("queued", 1)]


async def test_what_no_event_told_is_forgotten_once_the_stream_has_passed_it(monitor, bus, client):
    """An event is sent once: a request can end and the monitor does not hear of it."""

    def often(it: Monitor) -> None:
        it.view.forget_every_s = 0.02

    await monitor(often)
    await queued(client, 3)

    async def placed(expected):
        found = await position(bus, "old-2")
        return (found["state"], found["position"]) == ("queued", expected)

    await eventually(lambda: placed(2))
    await bus.delete(STREAM_REQUESTS, 1)
    await eventually(lambda: placed(1), what="the request that has ended is before none")


class Deaf(Monitor):
    """Misses what is announced of some requests."""

    async def _on_stored(self, message):
        if not message.headers.get(MSG_ID, "").startswith("lost"):
            await super()._on_stored(message)


async def test_an_announcement_that_was_missed_is_noticed_by_the_next_one(monitor, bus, client):
    it = await monitor(kind=Deaf)
    await filled(bus)
    await client.ask("r1")
    await eventually(lambda: it.view.find("r1"))
    await client.ask("lost-1")
    await client.ask("r2")
    await eventually(lambda: it.view.find("r2"))
    assert await eventually(lambda: it.view.find("lost-1"))
    await filled(bus)
    assert (await position(bus, "r2"))["position"] == 2
