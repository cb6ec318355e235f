"""An operator pauses and resumes lanes and tenants, and changes the priority of what is queued."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import msgspec
import pytest

from consumers.monitor import moving
from consumers.monitor.monitor import Monitor
from consumers.monitor.view import QueueView
from pipeline.broker.connection import NoResponders
from pipeline.delivery.lanes import OLLAMA_SOURCE
from pipeline.wire.messages import Load
from pipeline.wire.pauses import MoveReport, PausedState
from pipeline.wire.subjects import MOVED_BY, MSG_ID, STREAM_REQUESTS, Move
from tests.consumers.monitor.conftest import ask_service, cancel, position
from tests.pipeline.worker.conftest import Client, ScriptedEngine
from tests.pipeline.worker.conftest import start as start  # noqa: PLC0414 - a fixture
from tests.waiting import TIMEOUT_S, eventually


@pytest.fixture
async def client(bus):
    return Client(bus)


@dataclass
class Operator:
    """Calls the services."""

    bus: object
    monitor: Monitor | None = None

    async def call(self, subject, **fields):
        body = msgspec.json.encode({"by": "ada"} | fields)
        return (await self.bus.request(f"llm.queue.{subject}", body, timeout_s=20.0)).data

    async def pause(self, **scope):
        return msgspec.json.decode(await self.call("pause", **scope), type=PausedState)

    async def resume(self, **scope):
        return msgspec.json.decode(await self.call("resume", **scope), type=PausedState)

    async def move(self, priority, **which):
        return msgspec.json.decode(await self.call("move", priority=priority, **which), type=MoveReport)

    async def stands_in(self, priority, name):
        """Wait until the monitor knows the request in a lane of that priority."""

        def known():
            place = self.monitor.view.find(name)
            return place is not None and place.priority == priority

        await eventually(known, what=f"{name} stands in {priority}")

    async def refused(self, subject, **fields):
        answer = msgspec.json.decode(await self.call(subject, **fields))
        assert answer["object"] == "headrace.refused"
        return answer["message"]


@pytest.fixture
async def operator(bus, monitor):
    return Operator(bus, await monitor())


async def heard(*workers):
    """Every worker knows what is stored."""
    for worker in workers:
        board, stored = worker.worker.me.peers.pauses, await ask_service(worker.bus, "llm.queue.paused")
        await eventually(lambda board=board, stored=stored: msgspec.to_builtins(board.state) == stored, what="heard")


def begun(*workers):
    return [run.work.id for worker in workers for run in worker.engine.submitted]


async def serve_all(worker):
    """Answer what the engine has, as it comes, for as long as the test runs."""
    served = 0
    while True:
        if served < len(worker.engine.submitted):
            worker.engine.submitted[served].finish("ok")
            served += 1
        else:
            await asyncio.sleep(0.002)


async def test_nothing_of_a_paused_lane_begins_and_all_of_it_after_the_resume(client, operator, start):
    worker = await start(ScriptedEngine(slots=8))
    await operator.pause(priority="low", reason="the demo")
    await heard(worker)
    for number in range(3):
        await client.ask(f"low-{number}", lane="low")
    for number in range(3):
        await client.ask(f"high-{number}", lane="high")
        (await worker.engine.generation(f"high-{number}")).finish("ok")
        await client.answer(f"high-{number}")
    assert begun(worker) == ["high-0", "high-1", "high-2"]
    await operator.resume(priority="low")
    for number in range(3):
        (await worker.engine.generation(f"low-{number}")).finish("ok")
        await client.answer(f"low-{number}")
    await client.none_waits()


async def test_nothing_of_a_paused_tenant_begins_and_another_tenant_s_requests_do(client, operator, start):
    worker = await start(ScriptedEngine(slots=8))
    await operator.pause(tenant="acme")
    await heard(worker)
    for number in range(3):
        await client.ask(f"t.acme.a{number}", lane="medium.t.acme")
        await client.ask(f"t.bolt.b{number}", lane="medium.t.bolt")
    for number in range(3):
        (await worker.engine.generation(f"t.bolt.b{number}")).finish("ok")
        await client.answer(f"t.bolt.b{number}")
    assert not [name for name in begun(worker) if "acme" in name]
    await operator.resume(tenant="acme")
    for number in range(3):
        (await worker.engine.generation(f"t.acme.a{number}")).finish("ok")
        assert (await client.answer(f"t.acme.a{number}")).headrace.attempts == 1
    await client.none_waits()


async def test_a_pause_holds_for_a_worker_and_a_monitor_that_start_later(client, bus, monitor, start):
    first = await monitor.start()
    operator = Operator(bus)
    await operator.pause(priority="low")
    await first.kill()
    await monitor()
    worker = await start()
    await client.ask("low", lane="low")
    await client.ask("high", lane="high")
    (await worker.engine.generation("high")).finish("ok")
    await client.answer("high")
    assert begun(worker) == ["high"]
    stored = await eventually(lambda: paused(bus), what="the second monitor answers")
    assert [pause["by"] for pause in stored["pauses"]] == ["ada"]
    await operator.resume(priority="low")
    (await worker.engine.generation("low")).finish("ok")
    await client.answer("low")


async def paused(bus):
    """What is paused; None while no monitor answers."""
    try:
        return await ask_service(bus, "llm.queue.paused")
    except NoResponders:
        return None


async def test_what_runs_goes_on_also_where_its_worker_dies(client, operator, start):
    first = await start()
    await client.stream("mine", lane="low")
    run = await first.engine.generation("mine")
    run.say("half ")
    await client.until("mine", 2)
    await operator.pause(priority="low")
    await heard(first)
    second = await start()
    await first.kill()
    again = await second.engine.generation("mine")
    assert again.work.resume_text == "half "
    again.finish("whole")
    assert (await client.answer("mine")).choices[0].message.content == "half whole"


async def test_a_paused_request_says_so_and_does_not_saturate(client, bus, operator, start):
    await operator.pause(priority="low", reason="later")
    await start(ScriptedEngine(slots=1))
    loads = []

    async def on_load(message):
        loads.append(msgspec.json.decode(message.data, type=Load))

    for number in range(20):
        await client.ask(f"low-{number}", lane="low")
    await bus.subscribe("llm.load.mlx", on_load)

    async def shown():
        statistics = await ask_service(bus, "llm.queue.stats")
        return statistics if statistics["low"]["queued"] == 20 else None

    statistics = await eventually(shown, what="all are queued")
    assert [(pause["priority"], pause["reason"]) for pause in statistics["paused"]] == [("low", "later")]
    assert "by" not in statistics["paused"][0]
    place = await position(bus, "low-7")
    assert (place["state"], place["position"], place["eta_ms"], place["paused"]) == ("queued", 7, None, True)
    await eventually(lambda: loads, what="a load")
    assert {load.level for load in loads} == {"normal"}
    assert {load.queued.low for load in loads} == {0}


async def test_a_deadline_runs_while_the_request_is_paused(client, operator):
    await operator.pause(priority="low")
    await client.ask("late", lane="low", Llm_Timeout="0.3")
    assert await client.code("late") == "deadline_exceeded"


async def test_a_paused_request_can_be_cancelled(client, bus, operator):
    await operator.pause(priority="low")
    await client.ask("gone", lane="low")
    assert await cancel(bus, "gone") == "cancelled"


async def test_a_refused_call_says_why(operator):
    assert "Name a lane" in await operator.refused("pause")
    assert "not paused" in await operator.refused("resume", priority="low")
    assert '`priority` must be "high"' in await operator.refused("pause", priority="urgent")
    assert "No queued request" in await operator.refused("move", priority="high", id="nobody")
    assert "Name a request" in await operator.refused("move", priority="high")


@pytest.mark.parametrize(
    ("subject", "fields", "message"),
    [
        ("pause", {"lane": "low", "tenant": "acme"}, "`lane` is not a known field."),
        ("resume", {"lane": "low", "tenant": "acme"}, "`lane` is not a known field."),
        ("move", {"priority": "high", "request": "a", "tenant": "acme"}, "`request` is not a known field."),
        ("move", {"priority": "high", "id": "", "tenant": "acme"}, "`id` must be a non-empty string"),
        ("move", {"priority": "high", "batch": "", "tenant": "acme"}, "`batch` must be a non-empty string"),
    ],
)
async def test_a_misspelt_or_empty_field_does_not_make_a_call_concern_more(operator, subject, fields, message):
    await operator.pause(tenant="acme", priority="high")
    assert message in await operator.refused(subject, **fields)
    assert len((await operator.pause(tenant="acme", priority="high")).pauses) == 1


async def test_a_moved_request_waits_at_the_end_of_its_new_lane_and_is_answered_once(client, bus, operator, start):
    await client.ask("mine", lane="low")
    await client.ask("other", lane="high")
    await eventually(lambda: position_is(bus, "mine", 0), what="it is known")
    assert await operator.move("high", id="mine") == MoveReport("high", 1, {})
    assert (await bus.stream_state(STREAM_REQUESTS)).messages == 2
    await eventually(lambda: position_is(bus, "mine", 1), what="it waits behind the other")
    await client.ask("mine", lane="low")  # sent again within two minutes: the same request
    assert (await bus.stream_state(STREAM_REQUESTS)).messages == 2
    moved = [message async for message in bus.scan(STREAM_REQUESTS, "llm.request.high")][-1]
    assert moved.headers[MOVED_BY] == "ada"
    worker = await start(ScriptedEngine(slots=1))
    (await worker.engine.generation("other")).finish("ok")
    (await worker.engine.generation("mine")).finish("ok")
    answer = await client.answer("mine")
    assert (answer.headrace.priority, answer.headrace.attempts) == ("high", 1)
    assert answer.headrace.reason == "moved from low to high by ada"
    await client.none_waits()
    assert begun(worker) == ["other", "mine"]


async def position_is(bus, name, wanted):
    found = await position(bus, name)
    return found["state"] == "queued" and found["position"] == wanted


async def is_running(bus, name):
    return (await position(bus, name))["state"] == "running"


async def test_a_request_can_be_moved_twice_and_cancelled_then(client, bus, operator):
    await client.ask("mine", lane="low")
    await eventually(lambda: position_is(bus, "mine", 0), what="it is known")
    assert (await operator.move("high", id="mine")).moved == 1
    await operator.stands_in("high", "mine")
    assert (await operator.move("medium", id="mine")).moved == 1
    await operator.stands_in("medium", "mine")
    assert (await operator.move("medium", id="mine")).left == {"there": 1}
    assert (await bus.stream_state(STREAM_REQUESTS)).messages == 1
    assert await cancel(bus, "mine") == "cancelled"
    await client.none_waits()


async def test_a_request_that_is_announced_after_a_call_to_move_it_was_heard_is_moved(
    client, operator, monkeypatch: pytest.MonkeyPatch
):
    """The broker confirms a request to its publisher a moment before it announces it to the monitor."""
    monkeypatch.setattr(moving, "_REPORTED_S", TIMEOUT_S)
    held = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QueueView, "announced", lambda _, message: held.append(message))
        await client.ask("mine", lane="low")
        moved = asyncio.create_task(operator.move("high", id="mine"))
        await eventually(lambda: held and operator.monitor.operating.moving._lock.locked())
    operator.monitor.view.announced(held[0])
    assert await moved == MoveReport("high", 1, {})


async def test_all_of_a_batch_or_of_a_tenant_is_moved_and_nothing_else(client, bus, operator):
    for number in range(70):
        await client.ask(f"line-{number}", lane="low", Llm_Batch="batch_1")
    await client.ask("t.acme.a", lane="low.t.acme.simple")
    await client.ask("t.bolt.b", lane="low.t.bolt")
    await client.ask("plain", lane="low")
    await eventually(lambda: position_is(bus, "plain", 72), what="all are known")
    assert (await operator.move("high", batch="batch_1")).moved == 70
    assert (await operator.move("medium", tenant="acme")).moved == 1
    subjects = [message.headers["Nats-Subject"] async for message in bus.scan(STREAM_REQUESTS, ">")]
    assert sorted(set(subjects)) == [
        "llm.request.high",
        "llm.request.low",
        "llm.request.low.t.bolt",
        "llm.request.medium.t.acme.simple",
    ]
    assert subjects.count("llm.request.high") == 70


async def test_a_move_leaves_what_runs(client, bus, operator, start):
    worker = await start()
    await client.ask("mine", lane="low")
    run = await worker.engine.generation("mine")
    # The event follows the moment in which the engine has it.
    await eventually(lambda: is_running(bus, "mine"), what="it is known to run")
    assert (await operator.move("high", id="mine")).left == {"running": 1}
    run.finish("ok")
    assert (await client.answer("mine")).headrace.priority == "low"


async def test_a_move_to_a_full_lane_leaves_the_request(client, bus, monitor, config):
    await monitor(lane_max_messages=2)
    operator = Operator(bus)
    for name in ("a", "b"):
        await client.ask(name, lane="high")
    await client.ask("mine", lane="low")
    await eventually(lambda: position_is(bus, "mine", 0), what="it is known")
    assert (await operator.move("high", id="mine")).left == {"full": 1}
    assert await position_is(bus, "mine", 0)


async def test_a_request_without_room_for_the_headers_of_a_move_waits_on(client, bus, operator):
    await bus.store("llm.request.low", b"x" * (bus.max_payload - 100), headers={MSG_ID: "mine"})
    await eventually(lambda: position_is(bus, "mine", 0), what="it is known")
    assert (await operator.move("high", id="mine")).left == {"too_large": 1}
    assert await client.record("mine") == []
    assert await position_is(bus, "mine", 0)


async def test_requests_that_are_moved_while_workers_pull_are_each_begun_once(client, bus, operator, start):
    workers = [await start(ScriptedEngine(slots=2)) for _ in range(2)]
    serving = [asyncio.create_task(serve_all(worker)) for worker in workers]
    names = [f"r{number}" for number in range(60)]
    try:
        for name in names:
            await client.ask(name, lane="low", Llm_Batch="batch_1")
        for priority in ("high", "medium", "high"):
            await operator.move(priority, batch="batch_1")
        for name in names:
            await client.answer(name)
    finally:
        for task in serving:
            task.cancel()
    assert sorted(begun(*workers)) == sorted(names)
    await client.none_waits()


async def test_ollama_s_worker_begins_nothing_of_a_paused_tenant_nor_of_a_paused_lane(client, bus, operator, start):
    """The requests of all tenants share Ollama's lanes."""
    await operator.pause(tenant="acme")
    await operator.pause(priority="low")
    worker = await start(ScriptedEngine(slots=8, name="ollama"), OLLAMA_SOURCE)
    spilled = [("high", "t.acme.a"), ("low", "b"), ("high", "c")]
    for number, (priority, name) in enumerate(spilled, start=1):
        headers = {MSG_ID: bus.moves.make(name, Move.SPILLED, number, 1.0)}
        await bus.store(f"llm.ollama.{priority}", b'{"prompt":"x"}', headers=headers)
    (await worker.engine.generation("c")).finish("ok")
    await client.answer("c")
    assert begun(worker) == ["c"]
    await operator.resume(tenant="acme")
    await operator.resume(priority="low")
    for _, name in spilled[:2]:
        (await worker.engine.generation(name)).finish("ok")
        await client.answer(name)


async def test_the_paused_requests_of_a_tenant_are_not_asked_for(client, bus, operator, start):
    worker = await start(ScriptedEngine(slots=1))
    await operator.pause(tenant="acme")
    await heard(worker)
    for number in range(5):
        await client.ask(f"t.acme.a{number}", lane="high.t.acme")
    await client.ask("plain", lane="low")
    (await worker.engine.generation("plain")).finish("ok")
    await client.answer("plain")

    async def wait_there():
        consumer = await bus.consumer(STREAM_REQUESTS, "high_t_acme")
        return consumer is not None and (consumer.num_pending, consumer.num_ack_pending) == (5, 0)

    await eventually(wait_there)
    assert begun(worker) == ["plain"]
