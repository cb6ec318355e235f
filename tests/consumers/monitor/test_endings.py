"""An ending means the request at one place, and never the next one of the same id."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from consumers.monitor import cancelling
from consumers.monitor.view import QueueView
from pipeline.core.ending import Moved
from pipeline.core.envelope import read_envelope
from pipeline.delivery.held import Held
from pipeline.delivery.lease import LeaseKeeper
from pipeline.delivery.puller import Puller
from pipeline.telemetry import Tracing
from pipeline.wire.answers import ErrorAnswer, ErrorBody, is_last
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import RequestEvent, encode
from pipeline.wire.subjects import MSG_ID, STREAM_REQUESTS, Move, Priority, Task
from tests.consumers.monitor.conftest import cancel
from tests.pipeline.worker.conftest import ScriptedEngine, client, start
from tests.waiting import eventually, taken

__all__ = ["client", "start"]  # fixtures


@pytest.fixture
def config(config):
    return replace(config, lease_s=1.0)


async def seems_to_run(bus, it, request_id):
    """As where a worker has died in the middle of a request."""
    await eventually(lambda: it.view.find(request_id))
    await bus.publish("llm.event.high.started", encode(RequestEvent(request_id, "started", Priority.HIGH, "mlx")))
    await eventually(lambda: it.view.state(it.view.find(request_id)) == "running")


async def test_a_request_is_answered_whose_id_was_cancelled_before_it_was_used(monitor, start, client, bus):
    it = await monitor()
    assert await cancel(bus, "job-7") == "unknown"
    worker = await start(ScriptedEngine(slots=1))
    await client.stream("job-7")
    generation = await worker.engine.generation("job-7")
    generation.say("so far")
    # What is cancelled after it, and has lost its worker, is ended later than `job-7` could be.
    await client.ask("orphan", lane="low")
    await seems_to_run(bus, it, "orphan")
    assert await cancel(bus, "orphan") == "cancelled"
    assert not generation.closed
    generation.finish(", so good")
    assert (await client.answer("job-7")).choices[0].message.content == "so far, so good"


async def test_a_cancel_is_answered_when_a_request_whose_worker_died_has_ended(monitor, start, client, bus):
    it = await monitor()
    await client.ask("r1")
    await seems_to_run(bus, it, "r1")
    assert await cancel(bus, "r1") == "cancelled"
    assert (await client.record("r1"))[-1].error.code == "cancelled"
    await client.none_waits()
    worker = await start()
    await client.ask("r2")
    (await worker.engine.generation("r2")).finish("yes")
    await client.answer("r2")
    assert len(await client.record("r1")) == 1


async def test_an_answer_that_a_dead_worker_has_begun_is_cancelled_too(monitor, start, client, bus):
    it = await monitor()
    dying = await start()
    await client.stream("r1")
    (await dying.engine.generation("r1")).say("so far")
    await client.until("r1", 2)
    await dying.kill()
    assert it.view.state(it.view.find("r1")) == "running"
    assert await cancel(bus, "r1") == "cancelled"
    assert (await client.record("r1"))[-1].error.code == "cancelled"
    alive = await start()
    await client.ask("r2")
    (await alive.engine.generation("r2")).finish("yes")
    assert (await client.answer("r2")).choices[0].message.content == "yes"
    assert [last for last in await client.record("r1") if is_last(last)] == (await client.record("r1"))[-1:]


async def test_a_cancel_is_pending_if_the_monitor_leads_no_more_before_the_request_has_ended(monitor, client, bus):
    it = await monitor()
    await client.ask("r1")
    await seems_to_run(bus, it, "r1")
    leads, once = it.cancelling.leads, iter([True])
    it.cancelling.leads = lambda: next(once, False)
    assert await cancel(bus, "r1") == "pending"
    assert await client.record("r1") == []
    it.cancelling.leads = leads
    assert (await client.answer("r1")).error.code == "cancelled"


async def test_the_next_request_of_an_id_outlives_the_cancel_of_the_one_before(monitor, client, bus):
    it = await monitor()
    await client.ask("job-7")
    await seems_to_run(bus, it, "job-7")
    assert await cancel(bus, "job-7") == "cancelled"
    # Its name is used again; the broker remembers names for two minutes.
    await bus.store(
        "llm.request.high", b'{"prompt":"x"}', headers={MSG_ID: bus.moves.make("job-7", Move.REPLAYED, 1, 1.0)}
    )
    await seems_to_run(bus, it, "job-7")
    await client.ask("later")
    await seems_to_run(bus, it, "later")
    assert await cancel(bus, "later") == "cancelled"
    assert len(await client.record("job-7")) == 1
    assert (await bus.stream_state(STREAM_REQUESTS)).messages == 1


async def test_a_cancelled_request_is_ended_where_it_has_moved_to(monitor, client, bus):
    """Its mover had it in hand when the cancel came."""
    it = await monitor()
    await client.ask("r1")
    await seems_to_run(bus, it, "r1")
    stored = await bus.stored(STREAM_REQUESTS, 1)
    asked = asyncio.create_task(cancel(bus, "r1"))
    await eventually(lambda: it.cancelling._cancels._open)
    headers = {MSG_ID: "r1:spilled:1-1", "Llm-Stored-At": repr(stored.stored_at), "Llm-Task": "simple"}
    await bus.store("llm.ollama.high", stored.data, headers=headers)
    await bus.delete(STREAM_REQUESTS, 1)
    assert await asked == "cancelled"
    assert await client.code("r1") == "cancelled"

    async def gone():
        return (await bus.stream_state("LLM_OLLAMA")).messages == 0

    await eventually(gone)


@pytest.mark.parametrize("pauses_s", [cancelling._ANNOUNCED_AFTER_S, ()], ids=["at once", "later than it takes"])
async def test_a_request_that_is_announced_after_its_cancel_was_heard_is_cancelled(
    monitor, client, bus, monkeypatch, pauses_s
):
    """The broker confirms a request to its publisher a moment before it announces it to the monitor."""
    monkeypatch.setattr(cancelling, "_ANNOUNCED_AFTER_S", pauses_s)
    it = await monitor()
    held = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QueueView, "announced", lambda _, message: held.append(message))
        await client.ask("r1")
        asked = asyncio.create_task(cancel(bus, "r1"))
        await eventually(lambda: held and it.cancelling._waits._tasks)
    it.view.announced(held[0])
    assert await asked == "cancelled"
    assert await client.code("r1") == "cancelled"


async def test_a_request_that_is_stored_after_a_cancel_is_none_of_its(monitor, client, bus, monkeypatch):
    monkeypatch.setattr(cancelling, "_CLOCK_ERROR_S", -1.0)
    it = await monitor()
    asked = asyncio.create_task(cancel(bus, "r1"))
    await eventually(lambda: it.cancelling._waits._tasks)
    await client.ask("r1")
    assert await asked == "unknown"
    assert (await bus.stream_state(STREAM_REQUESTS)).messages == 1


async def nothing(_):
    raise AssertionError


async def test_no_request_escapes_its_cancel_by_moving_at_that_moment(monitor, client, bus):
    """As where the router sorts a burst while its owner cancels it."""
    it = await monitor()
    names = [f"r{number}" for number in range(40)]
    puller, leases = Puller(bus, STREAM_REQUESTS, nothing, 30.0), LeaseKeeper(30.0)
    await puller.start()
    in_hand = []
    for name in names:
        await client.ask(name)
        delivery = await taken(puller, "high")
        envelope = read_envelope(delivery, Priority.HIGH, moves=bus.moves)
        in_hand.append(Held.taken(bus, delivery, envelope, leases, tracing=Tracing()))
    await eventually(lambda: all(it.view.find(name) for name in names))
    there = Moved("llm.request.high.complex", Move.COMPLEX, Task.COMPLEX, "it is complex")
    states, _ = await asyncio.gather(
        asyncio.gather(*(cancel(bus, name) for name in names)),
        asyncio.gather(*(held.end(there) for held in in_hand)),
    )
    assert set(states) == {"cancelled"}
    for name in names:
        assert await client.code(name) == "cancelled"


async def test_a_request_has_one_time_of_storing_however_it_is_read(client, bus):
    """It tells requests of the same id apart. The broker writes nanoseconds, in a different form for each way."""
    puller = Puller(bus, STREAM_REQUESTS, nothing, 30.0)
    await puller.start()
    for number in range(10):
        await client.ask(f"r{number}")
        delivery = await taken(puller, "high")
        stored = await bus.stored(STREAM_REQUESTS, delivery.sequence)
        assert repr(delivery.stored_at) == repr(stored.stored_at)


async def test_a_running_request_that_its_worker_has_ended_by_the_cancel_is_cancelled(monitor, client, bus):
    """The worker receives the cancel as well, and may be the first."""
    it = await monitor()
    await client.ask("r1")
    await seems_to_run(bus, it, "r1")
    error = ErrorBody.of(HeadraceError(ErrorCode.CANCELLED, "Request r1 was cancelled."))
    await bus.store("llm.out.r1", encode(ErrorAnswer("r1", 1, error)), expected_last=0)
    assert await cancel(bus, "r1") == "cancelled"


async def test_a_cancel_that_is_heard_after_what_it_did_is_answered_with_that(monitor, bus):
    """The event of the worker that ended the request can overtake the cancel."""
    await monitor()
    error = ErrorBody.of(HeadraceError(ErrorCode.CANCELLED, "Request r1 was cancelled."))
    await bus.store("llm.out.r1", encode(ErrorAnswer("r1", 1, error)), expected_last=0)
    assert await cancel(bus, "r1") == "cancelled"
