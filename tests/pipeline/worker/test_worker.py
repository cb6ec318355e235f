"""A worker takes what it has room for, says how it is, and leaves without a trace."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial
from itertools import pairwise

import msgspec
import pytest

from pipeline.broker.connection import NoResponders
from pipeline.wire.answers import Completion
from pipeline.wire.messages import StoreReport, WorkerStatus, encode
from pipeline.wire.subjects import LANES, STORE, STREAM_REQUESTS, Priority
from tests.pipeline.worker.conftest import ScriptedCounter, ScriptedEngine
from tests.waiting import TIMEOUT_S, eventually


async def statuses_of(bus):
    seen = []

    async def on_status(message):
        seen.append(msgspec.json.decode(message.data, type=WorkerStatus))

    await bus.subscribe("llm.worker.>", on_status)
    await bus.nc.flush()
    return seen


async def counts(bus):
    states = await bus.consumers(STREAM_REQUESTS)
    return sum(state.num_ack_pending for state in states), sum(state.num_pending for state in states)


async def test_no_more_runs_than_there_are_slots_and_no_more_is_taken(start, client):
    for number in range(12):
        await client.ask(f"r{number}", lane=LANES[number % len(LANES)].subject.removeprefix("llm.request."))
    engine = (await start(ScriptedEngine(slots=3), lease_s=60.0)).engine
    served = []
    while len(served) < 12:
        expected = min(3, 12 - len(served))
        await eventually(lambda expected=expected: len(engine.running) == expected)
        waiting = 12 - len(served) - expected
        await eventually(lambda held=expected, waiting=waiting: _counts_are(client.bus, held, waiting))
        run = engine.running[0]
        served.append(run.work.id)
        run.finish("x")
        await client.answer(run.work.id)
    assert engine.most_running == 3
    assert sorted(served) == sorted(f"r{number}" for number in range(12))
    await client.none_waits()


async def _counts_are(bus, held, waiting):
    return await counts(bus) == (held, waiting)


@pytest.mark.parametrize("slots", [1, 2])
async def test_requests_that_come_to_all_lanes_at_once_never_take_more_than_the_slots(start, client, slots):
    # A long lease: what one round returned is not taken for begun by a worker that died, and run beyond the slots.
    engine = (await start(ScriptedEngine(slots=slots), lease_s=60.0)).engine
    for round_number in range(10):
        await eventually(lambda: _is_waiting(client.bus), what="the worker waits on all lanes")
        for lane in LANES:
            await client.bus.publish(
                lane.subject, b'{"prompt":"x"}', headers={"Nats-Msg-Id": f"{lane.consumer}-{round_number}"}
            )
        for _ in LANES:
            run = await eventually(lambda: engine.running and engine.running[0])
            run.finish("x")
            await eventually(lambda run=run: run.closed)
        for lane in LANES:
            answer = await client.answer(f"{lane.consumer}-{round_number}")
            assert isinstance(answer, Completion)
    assert engine.most_running <= slots
    await client.none_waits()
    assert len(engine.submitted) == 10 * len(LANES)


async def _is_waiting(bus):
    return (await bus.js.consumer_info(STREAM_REQUESTS, "low_complex")).num_waiting


async def _waits_on_nothing(bus):
    return not await _is_waiting(bus)


async def open_pulls(bus):
    """How often each consumer has been asked for its next request, by pulls that stay open."""
    prefix, asked = f"$JS.API.CONSUMER.MSG.NEXT.{STREAM_REQUESTS}.", Counter()

    async def on_pull(message):
        if b"expires" in message.data:
            asked[message.subject.removeprefix(prefix)] += 1

    await bus.subscribe(f"{prefix}>", on_pull)
    await bus.nc.flush()
    return asked


@pytest.mark.parametrize(("slots", "stay"), [(4, True), (3, True), (2, False)])
async def test_pulls_stay_open_while_slots_are_free_for_two_more_requests(start, client, slots, stay):
    asked = await open_pulls(client.bus)
    worker = await start(ScriptedEngine(slots=slots), lease_s=60.0)
    await eventually(lambda: _is_waiting(client.bus), what="the worker waits on all lanes")
    await eventually(lambda: asked["low_complex"] == 1)
    await client.ask("r1", lane="high")
    await worker.engine.generation("r1")
    await eventually(lambda: asked["high"] == 2, what="the answered lane is asked again")
    await eventually(lambda: _is_waiting(client.bus), what="the worker waits on all lanes")
    assert asked["low_complex"] == (1 if stay else 2)


async def test_the_engine_is_told_of_requests_that_are_on_their_way_and_of_none_for_a_lone_one(start, client):
    engine = (await start(ScriptedEngine(slots=4))).engine
    for number in range(5):
        await client.ask(f"alone-{number}")
        run = await engine.generation(f"alone-{number}")
        assert run.work.coming == 0
        run.finish("x")
        await client.answer(run.work.id)
    for burst in range(20):
        ids = [f"burst-{burst}-{number}" for number in range(4)]
        await asyncio.gather(*map(client.ask, ids))
        runs = [await engine.generation(each) for each in ids]
        for run in runs:
            run.finish("x")
            await client.answer(run.work.id)
        assert runs[-1].work.coming <= 3
        if any(run.work.coming for run in runs):
            return
    raise AssertionError("the engine is never told")


# ---- preemption


async def pulls_for_high(client):
    return (await client.bus.js.consumer_info(STREAM_REQUESTS, "high")).num_waiting


async def full_of_low(start, client, *, slots=2, **options):
    """A worker whose slots are all taken by LOW, with more of it waiting."""
    engine = ScriptedEngine(slots=slots, suspends=True)
    worker = await start(engine, **options)
    for number in range(slots + 2):
        await client.ask(f"low-{number}", lane="low")
    await eventually(lambda: len(engine.running) == slots)
    return worker


async def test_a_full_worker_takes_high_and_passes_its_priority_on(start, client):
    worker = await full_of_low(start, client)
    seen = await statuses_of(client.bus)
    await client.ask("high-1", lane="high.simple")
    run = await worker.engine.generation("high-1")
    assert (run.work.priority, run.work.extra) == (Priority.HIGH, False)
    await eventually(lambda: seen and (seen[-1].running.high, seen[-1].running.low) == (1, 2))
    assert (seen[-1].slots.used, seen[-1].slots.total) == (2, 2)
    run.finish("x")
    await client.answer("high-1")
    assert len(worker.engine.submitted) == 3, "no further LOW was taken"


async def test_medium_takes_a_place_from_low_and_not_from_its_own(start, client):
    worker = await full_of_low(start, client)
    for number in range(3):
        await client.ask(f"medium-{number}", lane="medium")
    await eventually(lambda: len(worker.engine.running) == 4)
    await client.ask("high-1", lane="high")
    assert [run.work.id[:3] for run in worker.engine.running] == ["low", "low", "med", "med"]
    worker.engine.running[0].finish("x")
    (await worker.engine.generation("high-1")).finish("x")
    await client.answer("high-1")


async def test_low_takes_no_place_and_a_slot_that_falls_free_is_for_all_lanes(start, client):
    worker = await full_of_low(start, client)
    await client.ask("high-1", lane="high")
    await worker.engine.generation("high-1")
    for _ in range(2):
        worker.engine.running[0].finish("x")
        await eventually(lambda: any(run.closed for run in worker.engine.submitted))
    await worker.engine.generation("low-2")
    assert len(worker.engine.running) <= 3


async def test_an_engine_that_cannot_suspend_gets_nothing_beyond_its_slots(start, client):
    worker = await full_of_low(start, client)
    await eventually(partial(pulls_for_high, client))
    worker.engine.suspends = False
    worker.engine.changed()

    async def none_pulls():
        return await pulls_for_high(client) == 0

    await eventually(none_pulls)
    await client.ask("high-1", lane="high")
    other = await start()
    await other.engine.generation("high-1")
    assert len(worker.engine.submitted) == 2


async def test_another_worker_with_a_free_slot_comes_before_a_preemption(start, client):
    worker = await full_of_low(start, client, slots=2)
    other = await start(ScriptedEngine(slots=8, suspends=True))
    await eventually(lambda: len(other.engine.running) == 2)
    await eventually(worker.worker._others_have_room)

    async def one_waits_for_high():
        return await pulls_for_high(client) == 1

    await eventually(one_waits_for_high)
    for number in range(4):
        await client.ask(f"high-{number}", lane="high")
        await other.engine.generation(f"high-{number}")
    assert len(worker.engine.submitted) == 2


async def test_an_endless_row_of_high_preempts_up_to_its_share(start, client):
    worker = await full_of_low(start, client, slots=2, weights={"high": 6.0, "medium": 3.0, "low": 1.0})
    begun = 0
    for number in range(40):
        await client.ask(f"high-{number}", lane="high")
    high = LANES[0]

    def high_runs():
        return any(run.work.priority is Priority.HIGH for run in worker.engine.running)

    while high in worker.worker._preempting(mine=1) or high_runs():
        run = await eventually(lambda: next((r for r in worker.engine.running if r.work.id[:4] == "high"), None))
        run.finish("x" * 64)
        await client.answer(run.work.id)
        begun += 1
        assert begun < 40, "HIGH does not stop"
    assert 5 <= begun <= 16
    assert sum(run.work.priority is Priority.LOW for run in worker.engine.running) == 2


async def test_an_engine_that_is_not_ready_gets_nothing(start, client):
    worker = await start(ScriptedEngine(state="loading"))
    await client.ask("r1")
    other = await start()
    (await other.engine.generation("r1")).finish("x")
    await client.answer("r1")
    assert worker.engine.submitted == []
    await other.drain()
    await client.ask("r2")
    worker.engine.set_state("ready")
    (await worker.engine.generation("r2")).finish("x")
    await client.answer("r2")


async def test_an_engine_that_goes_away_leaves_what_comes_to_others(start, client):
    worker = await start()
    await eventually(lambda: _is_waiting(client.bus))
    worker.engine.set_state("down")

    async def nobody_waits():
        return not await _is_waiting(client.bus)

    await eventually(nobody_waits)
    await client.ask("r1")
    other = await start()
    (await other.engine.generation("r1")).finish("x")
    await client.answer("r1")
    assert worker.engine.submitted == []


async def test_while_the_broker_stores_nothing_no_request_is_taken(start, client):
    """Its answer could not be written."""
    worker = await start()
    await eventually(lambda: _is_waiting(client.bus))

    async def nobody_waits():
        await client.bus.publish(STORE, encode(StoreReport("failed", "The disk is full.")))
        return not await _is_waiting(client.bus)

    await eventually(nobody_waits)
    await client.ask("r1")
    assert not await worker_takes(client.bus)
    await client.bus.publish(STORE, encode(StoreReport("ok", "")))
    (await worker.engine.generation("r1")).finish("x")
    await client.answer("r1")


async def test_while_many_answers_are_not_stored_yet_no_further_request_is_taken(start, client, monkeypatch):
    """Requests leave their slots before their answers are stored, so free slots alone do not hold the worker back."""
    monkeypatch.setattr("pipeline.worker.worker._UNSTORED_MOST", 3)
    worker = await start(ScriptedEngine(slots=1), lease_s=60.0)
    await eventually(lambda: _is_waiting(client.bus))
    worker.bus.meets("freezes", at=lambda operation: operation.subject.startswith("llm.out."))
    for number in range(6):
        await client.ask(f"r{number}")
    for number in range(3):
        run = await eventually(
            lambda number=number: len(worker.engine.submitted) > number and worker.engine.submitted[-1]
        )
        run.finish("x")
    await eventually(lambda: worker.worker._jobs.unstored == 3)
    await eventually(lambda: _counts_are(client.bus, 3, 3))
    await eventually(lambda: _waits_on_nothing(client.bus))
    assert len(worker.engine.submitted) == 3
    worker.bus.thaw()
    for number in range(3, 6):
        (await worker.engine.generation(f"r{number}")).finish("x")
    for number in range(6):
        await client.answer(f"r{number}")
    await client.none_waits()


async def worker_takes(bus):
    """Whether a request is in the hands of a worker."""
    return (await counts(bus))[0] > 0


async def test_the_status_follows_every_change(start, client):
    seen = await statuses_of(client.bus)
    worker = await start(ScriptedEngine(state="loading"))
    await eventually(lambda: seen and seen[-1].state == "loading")
    worker.engine.set_state("ready")
    await eventually(lambda: seen[-1].state == "ready")
    assert (seen[-1].engine, seen[-1].models, seen[-1].slots.total) == ("mlx", ["scripted"], 2)
    await client.ask("r1", lane="low")
    run = await worker.engine.generation("r1")
    await eventually(lambda: (seen[-1].slots.used, seen[-1].running.low) == (1, 1))
    run.finish("x")
    await eventually(lambda: (seen[-1].slots.used, seen[-1].running.low) == (0, 0))
    worker.engine.set_state("down")
    await eventually(lambda: seen[-1].state == "down")
    worker.lifecycle.stop(drain_s=5)
    await eventually(lambda: seen[-1].state == "gone")


async def test_a_status_comes_every_second_without_a_change(start, client):
    seen = await statuses_of(client.bus)
    await start()

    def a_second_later():
        # The first ones come of changes. One of the others may be late on a busy machine, and not each of them.
        return any(0.5 <= later.at - earlier.at <= 2.0 for earlier, later in pairwise(seen))

    await eventually(a_second_later)
    assert {(status.state, status.slots.used) for status in seen[1:]} == {("ready", 0)}


async def test_draining_finishes_what_runs_and_takes_nothing_new(start, client):
    seen = await statuses_of(client.bus)
    worker = await start()
    await client.stream("r1")
    run = await worker.engine.generation("r1")
    worker.lifecycle.stop(drain_s=10)
    await eventually(lambda: seen[-1].state == "draining")
    await client.ask("r2")
    run.finish("x")
    await asyncio.wait_for(worker.task, TIMEOUT_S)
    assert isinstance(await client.answer("r1"), Completion)
    assert [run.work.id for run in worker.engine.submitted] == ["r1"]
    await eventually(lambda: _counts_are(client.bus, 0, 1), what="one is acknowledged and the other one waits")
    other = await start()
    (await other.engine.generation("r2")).finish("x")
    assert (await client.answer("r2")).headrace.attempts == 1


async def test_what_is_not_done_at_the_drain_deadline_is_handed_back_without_an_attempt(start, client):
    # A lease long enough that only a hand-back can bring the request to another worker in this test.
    worker = await start(lease_s=60.0, max_attempts=1)
    await client.stream("r1")
    await client.ask("r2")
    run = await worker.engine.generation("r1")
    await worker.engine.generation("r2")
    run.say("The capital ")
    await client.until("r1", 2)
    await worker.drain(drain_s=0.2)
    assert worker.engine.running == []
    other = await start(lease_s=60.0, max_attempts=1)
    (await other.engine.generation("r1")).finish("is Paris")
    (await other.engine.generation("r2")).finish("x")
    answer = await client.answer("r1")
    assert answer.choices[0].message.content == "The capital is Paris"
    assert (await client.answer("r2")).headrace.attempts == 1
    await client.none_waits()


@pytest.mark.parametrize("burst", range(5))
async def test_a_worker_that_drains_as_requests_come_leaves_none_behind(start, client, burst):
    worker = await start(lease_s=60.0)
    await eventually(lambda: _is_waiting(client.bus))
    for lane in LANES:
        await client.bus.publish(lane.subject, b"x", headers={"Nats-Msg-Id": lane.consumer})
    for _ in range(burst * 3):
        await asyncio.sleep(0)
    await worker.drain(drain_s=0.0)
    # To the server what was given back is delivered until somebody pulls again. Nothing is in hands that are gone:
    # whoever pulls gets all of it, long before a lease could run out.
    other = await start(ScriptedEngine(slots=9), lease_s=60.0)
    for lane in LANES:
        (await other.engine.generation(lane.consumer)).finish("x")
    for lane in LANES:
        assert isinstance(await client.answer(lane.consumer), Completion)
    await client.none_waits()


async def test_a_worker_goes_on_after_the_broker_was_killed(start, client, nats_server):
    worker = await start()
    await client.ask("r1")
    run = await worker.engine.generation("r1")
    nats_server.kill()
    nats_server.start()
    run.finish("Paris")
    await eventually(lambda: client.bus.nc.is_connected)
    assert isinstance(await client.answer("r1"), Completion)
    await client.ask("r2")
    (await worker.engine.generation("r2")).finish("x")
    assert isinstance(await client.answer("r2"), Completion)
    await client.none_waits()


async def test_an_idle_worker_takes_what_comes_after_the_broker_was_killed(start, client, nats_server):
    worker = await start()
    await eventually(lambda: _is_waiting(client.bus))
    nats_server.kill()
    nats_server.start()
    await eventually(lambda: client.bus.nc.is_connected)
    await client.ask("r1")
    (await worker.engine.generation("r1")).finish("x")
    assert isinstance(await client.answer("r1"), Completion)


async def test_whatever_one_request_does_the_others_go_on(start, client, caplog):
    engine = (await start(max_attempts=2, lease_s=1.0)).engine
    await client.ask("bad")
    run = await engine.generation("bad")
    await client.ask("good")
    run._pieces.put_nowait(RuntimeError("a defect"))
    (await engine.generation("good")).finish("x")
    assert isinstance(await client.answer("good"), Completion)
    (await engine.generation("bad", 2))._pieces.put_nowait(RuntimeError("a defect"))
    assert await client.code("bad") == "engine_failed"
    await client.none_waits()
    assert "could not be served" in caplog.text


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b'{"prompt": "four"}', 4),
        (b'{"prompt": "four", "model": "other"}', "model_not_found"),
        (b'{"prompt": "poison"}', "engine_failed"),
        (b"{", "invalid_request"),
    ],
)
async def test_a_worker_whose_engine_counts_tokens_tells_them(start, client, body, told):
    seen = await statuses_of(client.bus)
    await start(ScriptedEngine(counter=ScriptedCounter()))
    await eventually(lambda: seen)
    reply = msgspec.json.decode((await client.bus.request(f"llm.tokens.{seen[0].worker}", body)).data)
    assert (reply.get("prompt_tokens") or reply["error"]["code"]) == told


async def test_a_worker_whose_engine_counts_none_is_not_asked(start, client):
    seen = await statuses_of(client.bus)
    await start(ScriptedEngine())
    await eventually(lambda: seen)
    with pytest.raises(NoResponders):
        await client.bus.request(f"llm.tokens.{seen[0].worker}", b"x")


# ---- several at once


async def test_half_of_the_free_slots_are_filled_at_once_and_the_other_half_is_left(start, client):
    """The other half is for other workers, and for what arrives meanwhile."""
    for number in range(20):
        await client.ask(f"r{number}", lane="high")
    asked = []

    async def on_pull(message):
        if b"no_wait" in message.data:
            asked.append(msgspec.json.decode(message.data)["batch"])

    await client.bus.subscribe(f"$JS.API.CONSUMER.MSG.NEXT.{STREAM_REQUESTS}.high", on_pull)
    await client.bus.nc.flush()
    engine = (await start(ScriptedEngine(slots=8), lease_s=60.0)).engine
    await eventually(lambda: len(engine.running) == 8)
    await eventually(lambda: _counts_are(client.bus, 8, 12))
    assert 1 < max(asked) <= 4
    for _ in range(20):
        run = await eventually(lambda: engine.running and engine.running[0])
        run.finish("x")
        await client.answer(run.work.id)
    assert engine.most_running == 8
    await client.none_waits()
