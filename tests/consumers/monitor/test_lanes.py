"""The lanes of tenants have consumers while they hold requests, through every change of who acts and who asks."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from consumers.monitor import lanes as keeping
from consumers.monitor.lanes import LaneKeeper
from pipeline.broker import topology
from pipeline.broker.jetstream import Bus, Fenced
from pipeline.broker.lanes import read_lanes, write_lanes
from pipeline.core import tenantlanes
from pipeline.wire.answers import is_last
from pipeline.wire.messages import Load
from pipeline.wire.subjects import MSG_ID, STREAM_REQUESTS, Lane, Priority, Task, lane_of_consumer
from tests.consumers.monitor.conftest import ask_service
from tests.pipeline.worker.conftest import ScriptedEngine, client, start
from tests.waiting import eventually

__all__ = ["client", "start"]  # fixtures

ANN, BOB = (Lane(Priority.LOW, Task.UNTRIAGED, tenant) for tenant in ("ann", "Bob"))
STREAMED = b'{"prompt":"x","stream":true}'


@pytest.fixture
def hasty(monkeypatch):
    """Lanes without requests lose their consumer at once."""
    for name in ("IDLE_S", "IDLE_CROWDED_S", "LEAVES_S"):
        monkeypatch.setattr(tenantlanes, name, 0.0)
    monkeypatch.setattr("consumers.monitor.lanes._PAUSE_S", 0.01)
    monkeypatch.setattr("consumers.monitor.lanes._LOOK_EVERY_S", 0.05)
    monkeypatch.setattr("consumers.monitor.lanes._LOOK_CROWDED_S", 0.05)


@pytest.fixture
def bare_lanes(bus, config):
    """A keeper that does nothing by itself, and what it leads while it is not empty."""
    leads = {"it"}
    return LaneKeeper(bus, config, lambda: bool(leads), lambda *_: None), leads


async def consumers(bus):
    found = {lane_of_consumer(state.name) for state in await bus.consumers(STREAM_REQUESTS)}
    return {lane for lane in found if lane.tenant and lane.tenant != "="}


async def has(bus, *lanes):
    async def there():
        _, listed = await read_lanes(bus)
        return await consumers(bus) == set(lanes) == listed

    await eventually(there, what=f"consumers of {len(lanes)} lanes")


async def publish(bus, lane, request_id, body=b'{"prompt":"x"}'):
    name = f"t.{lane.tenant}.{request_id}"
    await bus.store(lane.subject, body, headers={MSG_ID: name})
    return name


async def test_a_lane_has_a_consumer_from_its_first_request_on(monitor, bus):
    await monitor()
    assert await consumers(bus) == set()
    await publish(bus, ANN, "r1")
    await has(bus, ANN)
    await publish(bus, BOB, "r1")
    await has(bus, ANN, BOB)


async def test_it_is_removed_when_no_request_is_left_and_made_again(monitor, bus, client, start, hasty):
    await monitor()
    worker = await start(ScriptedEngine(slots=4))
    for number in range(3):
        name = await publish(bus, ANN, f"r{number}")
        generation = await worker.engine.generation(name)
        await asyncio.sleep(0)
        assert await consumers(bus) == {ANN}, "a request is in a worker's hands"
        generation.finish("ok")
        await client.answer(name)
        await has(bus)


async def serve_all(worker):
    """Answer what the engine has, as it comes, for as long as the test runs."""
    while True:
        for run in worker.engine.submitted:
            if run in worker.engine.running:
                run.finish("ok")
        await asyncio.sleep(0.001)


async def test_each_request_is_answered_once_while_consumers_come_and_go(monitor, bus, client, start, hasty):
    await monitor()
    workers = [await start(ScriptedEngine(slots=4)) for _ in range(2)]
    serving = [asyncio.create_task(serve_all(worker)) for worker in workers]
    lanes = [ANN, BOB, ANN._replace(priority=Priority.HIGH), BOB._replace(task=Task.COMPLEX)]
    names = []
    try:
        for turn in range(6):
            for number in range(10):
                names += [await publish(bus, lane, f"r{turn}-{number}-{place}") for place, lane in enumerate(lanes)]
            # Now and then all are gone when the next request comes, now and then one is about to go.
            await client.answer(names[-1])
            if turn % 2:
                await has(bus)
        for name in names:
            await client.answer(name)
        await client.none_waits()
    finally:
        for task in serving:
            task.cancel()
    for name in names:
        # Begun twice, if its consumer was removed while it was on its way: workers have no time here to hear of that.
        assert sum(map(is_last, await client.record(name))) == 1


async def test_a_monitor_that_takes_over_puts_list_and_consumers_in_line(monitor, bus):
    first, second = await monitor.start(), await monitor.start()
    await publish(bus, ANN, "r1")
    await has(bus, ANN)
    leader, other = (first, second) if first.it.candidate.leads() else (second, first)
    await leader.kill()
    await publish(bus, BOB, "r1")
    sequence, _ = await read_lanes(bus)
    await write_lanes(bus, [], expected_last=sequence)
    await eventually(other.it.candidate.leads)
    await has(bus, ANN, BOB)


async def test_a_consumer_of_a_tenant_that_was_deleted_is_made_again(monitor, bus, monkeypatch):
    monkeypatch.setattr("consumers.monitor.lanes._LOOK_EVERY_S", 0.2)
    await monitor()
    await publish(bus, ANN, "r1")
    await has(bus, ANN)
    await bus.js.delete_consumer(STREAM_REQUESTS, ANN.consumer)
    await has(bus, ANN)


async def test_a_request_of_which_the_monitor_did_not_hear_gets_a_consumer(monitor, bus, monkeypatch):
    monkeypatch.setattr("consumers.monitor.lanes._LOOK_EVERY_S", 0.2)

    monkeypatch.setattr(LaneKeeper, "heard", lambda *_: None)
    await monitor()
    await publish(bus, ANN, "r1")
    await has(bus, ANN)


async def test_beyond_the_most_lanes_wait_until_one_is_empty(monitor, bus, client, start, hasty):
    await monitor(tenants_max_lanes=1)
    worker = await start(ScriptedEngine(slots=4))
    name = await publish(bus, ANN, "r1")
    generation = await worker.engine.generation(name)
    other = await publish(bus, BOB, "r1")
    await has(bus, ANN)
    generation.finish("ok")
    (await worker.engine.generation(other)).finish("ok")
    await client.answer(other)


@pytest.mark.parametrize("tenant", ["*", ">", "=", "a/b", "ünï", "x" * 65])
async def test_a_request_of_no_valid_tenant_is_refused_under_an_id_of_the_broker(
    monitor, bus, client, tenant, monkeypatch
):
    # The broker does not announce a message on a wildcard.
    monkeypatch.setattr("consumers.monitor.lanes._LOOK_EVERY_S", 0.2)
    await publish(bus, ANN, "other")
    await monitor()
    sequence = await bus.store(f"llm.request.low.t.{tenant}", b"x", headers={MSG_ID: "odd"})
    assert (await client.answer(f"LLM-{sequence}")).error.param == "tenant"
    await client.none_waits(but=1)


async def test_what_waits_in_lanes_of_tenants_counts(monitor, bus):
    loads = []

    async def on_load(message):
        loads.append(msgspec.json.decode(message.data, type=Load))

    await bus.subscribe("llm.load.mlx", on_load)
    await monitor(tenants_max_lanes=1)
    await publish(bus, ANN, "r1")
    await publish(bus, ANN, "r2")
    await publish(bus, BOB, "r1")
    await bus.store("llm.request.low", b"x", headers={MSG_ID: "plain"})
    await eventually(lambda: loads and (loads[-1].queued.low, loads[-1].queued_tenants.low) == (4, 3))


async def test_the_position_of_a_newcomer_is_that_of_its_turn(monitor, bus):
    it = await monitor()
    for number in range(30):
        await publish(bus, ANN, f"r{number}")
    await publish(bus, BOB, "r1")

    async def positions():
        newcomer = await ask_service(bus, "llm.queue.position.t.Bob", b"r1")
        last = await ask_service(bus, "llm.queue.position.t.ann", b"r29")
        return it.load.tenants[Priority.LOW]["Bob"] and (newcomer["position"], last["position"])

    await eventually(lambda: it.load.tenants[Priority.LOW].total() == 31)
    assert await eventually(positions) == (0, 30)


async def test_a_new_tenant_is_served_before_the_flood_of_another(monitor, bus, client, start):
    await monitor()
    worker = await start(ScriptedEngine(slots=1))
    flood = [await publish(bus, ANN, f"r{number}") for number in range(12)]
    (await worker.engine.generation(flood[0])).finish("x" * 20)
    await worker.engine.generation(flood[1])
    name = await publish(bus, BOB, "r1")
    await eventually(lambda: BOB in worker.worker._taking.consumers)
    for number in range(1, 3):
        (await worker.engine.generation(flood[number])).finish("x" * 20)
        if await one_of_two(worker.engine, name, flood[number + 1]) == name:
            break
    (await worker.engine.generation(name)).finish("x")
    await client.answer(name)
    assert len(worker.engine.submitted) <= 5


async def one_of_two(engine, first, second):
    """Which of them runs."""
    runs = await eventually(lambda: [run.work.id for run in engine.submitted if run.work.id in (first, second)])
    return runs[0]


# ---- what can go wrong in between


async def test_a_consumer_whose_monitor_died_before_it_said_so_is_listed_by_the_next_one(monitor, bus, config):
    name = await publish(bus, ANN, "r1")
    await topology.keep_consumer(bus.js, topology.lane_consumer(ANN, config))
    assert await read_lanes(bus) == (0, frozenset())
    await monitor()
    await has(bus, ANN)
    assert (await bus.consumer(STREAM_REQUESTS, ANN.consumer)).num_pending == 1, name


async def test_a_lane_on_the_list_whose_consumer_was_not_made_gets_one(monitor, bus):
    await publish(bus, ANN, "r1")
    await write_lanes(bus, [ANN, BOB], expected_last=0)
    await monitor()
    await has(bus, ANN)


async def test_a_consumer_that_is_removed_under_a_workers_hands_costs_no_answer(monitor, bus, client, start):
    running = await monitor()
    first = await start(ScriptedEngine(slots=1))
    name = await publish(bus, ANN, "r1", STREAMED)
    generation = await first.engine.generation(name)
    second = await start(ScriptedEngine(slots=1))
    generation.say("once ")
    await client.until(name, 2)  # that it began, and the text
    await bus.js.delete_consumer(STREAM_REQUESTS, ANN.consumer)
    running.lanes.begin()
    again = await second.engine.generation(name)
    again.finish("upon another time")
    # The record is the first one's, unless the broker delivered the request to the first worker again before the second
    # one got it: then the second one has read what was said, and goes on from there.
    await eventually(lambda: again.closed)
    generation.finish("upon a time")
    answer = await client.answer(name)
    await client.none_waits()
    assert answer.choices[0].message.content in {"once upon a time", "once upon another time"}
    assert [one for one in await client.record(name) if is_last(one)] == [answer]


async def test_a_tenants_request_goes_on_when_its_worker_is_killed(monitor, bus, client, start):
    await monitor()
    doomed = await start(ScriptedEngine(slots=2))
    begun, taken = await publish(bus, ANN, "r1", STREAMED), await publish(bus, BOB, "r1")
    (await doomed.engine.generation(begun)).say("once ")
    await doomed.engine.generation(taken)
    await client.until(begun, 2)
    await doomed.kill()
    survivor = await start(ScriptedEngine(slots=1))
    for name, text in ((begun, "once upon a time"), (taken, "upon a time")):
        (await survivor.engine.generation(name)).finish("upon a time")
        assert (await client.answer(name)).choices[0].message.content == text
    await client.none_waits()
    assert len(survivor.engine.submitted) == 2


@pytest.mark.parametrize("meanwhile", ["another monitor leads", "a request comes", "the connection is lost"])
async def test_a_consumer_is_not_removed_if_that_changes_after_it_was_found_idle(
    bare_lanes, bus, config, hasty, monkeypatch, meanwhile
):
    keeper, leads = bare_lanes
    found_idle = Bus.consumer

    async def look(of, stream, name):
        state = await found_idle(of, stream, name)
        if meanwhile == "another monitor leads":
            leads.clear()
        elif meanwhile == "a request comes":
            await publish(bus, ANN, "r1")
            keeper.heard(ANN)
        else:
            keeper.begin()
        return state

    monkeypatch.setattr(Bus, "consumer", look)
    await topology.keep_consumer(bus.js, topology.lane_consumer(ANN, config))
    await keeper._step()
    await asyncio.sleep(0)
    keeper._look_at = 0.0
    await keeper._step()
    assert await consumers(bus) == {ANN}


@pytest.mark.parametrize("during", ["read_lanes", "topology.keep_consumer"], ids=["the look", "the making"])
async def test_no_lane_leaves_the_list_because_the_connection_was_lost(bare_lanes, bus, monkeypatch, during):
    """The keeper then knows nothing, and has to look before it writes the list."""
    keeper, _ = bare_lanes
    await publish(bus, ANN, "r1")
    await keeper._step()
    await publish(bus, BOB, "r1")
    before = topology.keep_consumer if "." in during else read_lanes

    async def reconnected(*arguments):
        found = await before(*arguments)
        keeper.begin()
        return found

    listed = []

    async def write(bus, wanted, *, expected_last):
        listed.append(set(wanted))
        return await write_lanes(bus, wanted, expected_last=expected_last)

    monkeypatch.setattr(keeping, "write_lanes", write)
    with monkeypatch.context() as patch:
        patch.setattr(f"consumers.monitor.lanes.{during}", reconnected)
        keeper._look_at = 0.0
        await keeper._step()
    await keeper._step()
    assert listed == [{ANN, BOB}]


async def test_no_consumer_is_removed_before_the_list_without_it_is_stored(bare_lanes, bus, config, hasty, monkeypatch):
    keeper, _ = bare_lanes
    await topology.keep_consumer(bus.js, topology.lane_consumer(ANN, config))
    await keeper._step()

    async def fails(*_, **__):
        raise Fenced("llm.lanes")

    with monkeypatch.context() as patch:
        patch.setattr("consumers.monitor.lanes.write_lanes", fails)
        for _ in range(3):
            keeper._look_at = 0.0
            await keeper._step()
    assert await consumers(bus) == {ANN}
    await eventually(lambda: no_consumers(keeper, bus))


async def no_consumers(keeper, bus):
    keeper._look_at = 0.0
    await keeper._step()
    return not await consumers(bus)
