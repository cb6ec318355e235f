"""Requests with a deadline, while they wait: refused at once where it is hopeless, answered when it has passed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial

import msgspec
import pytest

from consumers.monitor.endings import _MOST_EXPIRED, Endings
from consumers.monitor.monitor import Monitor
from consumers.monitor.view import QueueView
from pipeline.broker.jetstream import Bus
from pipeline.core.index import Place
from pipeline.delivery.lanes import Source
from pipeline.telemetry import Tracing
from pipeline.wire.answers import Chunk, ChunkChoice, Delta, decode_answer, is_last
from pipeline.wire.messages import PerPriorityCount, Slots, WorkerStatus, encode
from pipeline.wire.subjects import EVENT, LANES, MSG_ID, STREAM_REQUESTS, WORKER, Lane, Priority, Task
from tests.pipeline.worker.conftest import client, start
from tests.waiting import TIMEOUT_S, eventually

__all__ = ["client", "start"]  # fixtures

HIGH = Lane(Priority.HIGH, Task.COMPLEX).subject
SOURCE = Source(STREAM_REQUESTS, {lane: lane.consumer for lane in LANES})


@pytest.fixture
async def busy_worker(bus: Bus) -> AsyncIterator[None]:
    """Says what a worker says that is full and ends two requests a second."""

    async def say() -> None:
        while True:
            status = WorkerStatus(
                worker="w",
                engine="mlx",
                state="ready",
                models=["m"],
                slots=Slots(4, 4),
                running=PerPriorityCount(),
                pending_tokens=0.0,
                tokens_per_s=100.0,
                tokens_per_request=50.0,
                kv_bytes=0,
                kv_bytes_limit=0,
                at=time.time(),
            )
            await bus.publish(f"{WORKER}.w", encode(status))
            await asyncio.sleep(0.1)

    task = asyncio.create_task(say())
    yield
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def knows_the_worker(monitor: Monitor) -> None:
    await eventually(lambda: monitor.load.loads["mlx"].slots.total == 4, what="the worker is known")


async def test_a_hopeless_request_is_refused_at_once_and_the_others_wait_on(monitor, busy_worker, client):
    it = await monitor()
    await knows_the_worker(it)
    for number in range(60):
        await client.ask(f"w{number}", lane="high.complex")
    await client.ask("patient", lane="high.complex", Llm_Timeout="1000")
    await client.ask("hopeless", lane="high.complex", Llm_Timeout="3")
    error = (await client.answer("hopeless")).error
    assert error.code == "deadline_exceeded"
    assert "the expected wait is" in error.message, "refused, and not ended by its deadline"
    await client.none_waits(but=61)
    assert await client.record("patient") == []


async def test_a_tenant_is_not_refused_for_the_requests_of_another_one(monitor, busy_worker, client):
    it = await monitor()
    await knows_the_worker(it)
    for number in range(60):
        await client.ask(f"t.acme.w{number}", lane="high.t.acme.complex")
    await eventually(lambda: it.load.tenants[Priority.HIGH]["acme"] == 60, what="they are counted")
    await client.ask("t.bolt.first", lane="high.t.bolt.complex", Llm_Timeout="3")
    await client.ask("t.acme.last", lane="high.t.acme.complex", Llm_Timeout="3")
    error = (await client.answer("t.acme.last")).error
    assert "the expected wait is" in error.message
    assert it.view.find("t.bolt.first") or (await client.answer("t.bolt.first")).error.message != error.message


async def test_what_is_refused_makes_room_in_the_prediction_for_those_behind_it(monitor, busy_worker, client):
    it = await monitor()
    await knows_the_worker(it)
    # Together they would keep the last one waiting beyond its deadline; the hopeless ones do not count.
    await asyncio.gather(*(client.ask(f"h{n}", lane="high.complex", Llm_Timeout="0.8") for n in range(300)))
    await client.ask("last", lane="high.complex", Llm_Timeout="20")
    # Place 300 would mean 37 s even for an engine four times as fast.
    await eventually(lambda: it.view.find("h299") is None and it.view.find("last"), what="h299 was refused")
    await client.none_waits(but=1)
    assert await client.record("last") == []


async def test_a_burst_of_hopeless_requests_is_refused_whole_each_once(monitor, busy_worker, client, bus):
    it = await monitor()
    await knows_the_worker(it)
    for number in range(100):
        await client.ask(f"w{number}", lane="high.complex")
    seen: dict[str, int] = {}

    async def on_answer(message):
        assert is_last(decode_answer(message.data))
        seen[message.subject] = seen.get(message.subject, 0) + 1

    await bus.subscribe("llm.reply.>", on_answer)
    await bus.nc.flush()
    ids = [f"h{number}" for number in range(1500)]
    for first in range(0, len(ids), 100):
        batch = ids[first : first + 100]
        await asyncio.gather(*(client.ask(i, lane="high.complex", Llm_Timeout="0.5") for i in batch))
    await eventually(lambda: len(seen) == len(ids), what="all are answered", timeout_s=60)
    await client.none_waits(but=100)
    assert set(seen.values()) == {1}


async def test_without_a_worker_a_request_is_answered_at_its_deadline_and_not_before(monitor, client):
    await monitor()
    before = time.time()
    await client.ask("r1", Llm_Timeout="0.7")
    await client.ask("r2")
    error = (await client.answer("r1")).error
    assert time.time() >= before + 0.7
    assert (error.code, error.message) == ("deadline_exceeded", "The deadline passed while the request was queued.")
    await client.none_waits(but=1)
    assert await client.record("r2") == []


async def test_the_earliest_deadline_is_kept_whatever_came_before_it(monitor, client):
    it = await monitor()
    order: list[str] = []
    event_subject = f"{EVENT}.high.expired"

    async def on_expired(message):
        order.append(msgspec.json.decode(message.data)["id"])

    await client.bus.subscribe(event_subject, on_expired)
    await client.ask("far", Llm_Timeout="1000")
    await client.ask("third", Llm_Timeout="1.5")
    await client.ask("second", Llm_Timeout="1.0")
    await client.ask("first", Llm_Timeout="0.5")
    await eventually(lambda: len(order) == 3)
    assert order == ["first", "second", "third"]
    assert it.view.next_deadline() > time.time() + 900
    await client.none_waits(but=1)


async def test_what_was_stored_before_the_monitor_began_has_its_deadline_too(monitor, client):
    await client.ask("r1", Llm_Timeout="0.3")
    await monitor()
    assert await client.code("r1") == "deadline_exceeded"
    await client.none_waits()


async def test_the_configured_timeout_holds_where_a_request_names_none(monitor, client):
    await monitor(default_timeout_s=0.3)
    await client.ask("r1")
    assert await client.code("r1") == "deadline_exceeded"
    await client.none_waits()


async def test_a_custom_inbox_hears_that_the_deadline_has_passed(monitor, client):
    await monitor()
    heard = await client.listen("_INBOX.mine")
    await client.ask("r1", Llm_Timeout="0.3", Reply_To="_INBOX.mine")
    await eventually(lambda: heard)
    assert [answer.error.code for answer in heard] == ["deadline_exceeded"]


async def test_a_running_request_is_left_to_its_worker_and_ends_once(monitor, start, client):
    await monitor()
    worker = await start()
    heard = await client.listen("llm.reply.r1")
    await client.stream("r1", Llm_Timeout="2")
    (await worker.engine.generation("r1")).say("so far")
    assert await client.code("r1") == "deadline_exceeded"
    await client.none_waits()
    assert [is_last(message) for message in heard] == [False, False, True]


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_a_request_that_was_given_back_after_it_began_is_ended_behind_what_it_said(monitor, client, bus, how):
    it = await monitor()
    await client.ask("r1", **({"Llm_Timeout": "1"} if how == "deadline" else {}))
    stored = await bus.stored(STREAM_REQUESTS, 1)
    # What a worker wrote that was told to stop, and gave the request back.
    chunk = Chunk("r1", int(stored.stored_at), "m", [ChunkChoice(Delta(content="so far"))], 0, 1)
    await bus.store("llm.out.r1", encode(chunk), headers={MSG_ID: "c"})
    await eventually(lambda: it.view.find("r1"))
    if how == "cancel":
        answer = await bus.request("llm.cancel.r1")
        assert msgspec.json.decode(answer.data)["state"] == "cancelled"
    expected = {"cancel": "cancelled", "deadline": "deadline_exceeded"}[how]
    assert await client.code("r1") == expected
    assert len(await client.record("r1")) == 2
    await client.none_waits()


async def test_many_cancels_at_once_are_each_carried_out(monitor, client, bus):
    await monitor()
    await asyncio.gather(*(client.ask(f"r{number}") for number in range(300)))
    answers = await asyncio.gather(*(bus.request(f"llm.cancel.r{number}", timeout_s=20) for number in range(0, 300, 2)))
    assert {msgspec.json.decode(answer.data)["state"] for answer in answers} == {"cancelled"}
    await client.none_waits(but=150)


@pytest.mark.parametrize("streams", [False, True])
async def test_a_request_that_begins_while_its_cancel_is_underway_is_stopped(monitor, start, client, bus, streams):
    it = await monitor()
    freed = asyncio.Event()
    for _ in range(16):
        it.endings.soon(freed.wait)
    await eventually(it.endings._jobs.empty, what="each worker is busy")
    await (client.stream if streams else client.ask)("r1")
    await eventually(lambda: it.view.find("r1"))
    answer = asyncio.create_task(bus.request("llm.cancel.r1", timeout_s=20))
    await eventually(lambda: not it.endings._jobs.empty(), what="the cancel was heard")
    worker = await start()
    generation = await worker.engine.generation("r1")
    freed.set()
    assert msgspec.json.decode((await answer).data)["state"] == "cancelled"
    assert await client.code("r1") == "cancelled"
    await eventually(lambda: generation.closed, what="the engine is free of it")
    await client.none_waits()


async def test_a_cancel_goes_before_a_flood_of_other_endings(monitor, client, bus):
    it = await monitor()
    freed = asyncio.Event()
    for _ in range(16):
        it.endings.soon(freed.wait)
    await eventually(it.endings._jobs.empty, what="each worker is busy")
    order: list[str] = []

    async def note(name: str) -> None:
        order.append(name)

    for name in ("first", "second"):
        it.endings.soon(partial(note, name))
    it.endings.soon(partial(note, "urgent"), urgent=True)
    freed.set()
    await eventually(lambda: len(order) == 3)
    assert order == ["urgent", "first", "second"]


async def test_an_expired_request_is_counted_as_such(monitor, client, bus):
    await monitor()
    await client.ask("r1", Llm_Timeout="0.3")
    await client.answer("r1")

    async def counted():
        return msgspec.json.decode((await bus.request("llm.queue.stats")).data)["high"]["expired"]

    assert await eventually(counted) == 1


async def test_a_monitor_that_leads_no_more_leaves_what_has_expired_to_the_one_that_does(bus):
    """However much it is: it would find the same requests again and again."""
    view = QueueView(bus, None, ignore, ignore, lambda: None)
    for number in range(2 * _MOST_EXPIRED):
        view._index.stored(f"r{number}", Place(STREAM_REQUESTS, Priority.HIGH, 1 + number), 1.0)
    endings = Endings(bus, view, partial(next, iter([True]), False), Tracing())
    work = asyncio.create_task(endings._work())
    async with asyncio.timeout(TIMEOUT_S):
        await endings._expire()
        await endings._jobs.join()
    work.cancel()
    assert len(view._index) == 2 * _MOST_EXPIRED


def ignore(*_):
    pass
