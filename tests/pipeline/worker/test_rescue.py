"""Who has read half an answer waits for no slot: what a dead worker had begun is gone on with beyond the slots."""

from __future__ import annotations

import asyncio

from pipeline.wire.answers import Completion
from pipeline.wire.subjects import STREAM_REQUESTS
from tests.pipeline.worker.conftest import ScriptedEngine
from tests.pipeline.worker.test_worker import statuses_of
from tests.waiting import eventually

LEASE_S = 1.0
LANES = ("high", "medium.complex", "low")


async def begin(client, engine, names, lane="high"):
    """Requests that have begun to say something."""
    for name in names:
        await client.ask(name, b'{"prompt":"x","stream":true}', lane)
        (await engine.generation(name)).say("one ")
        await client.until(name, 2)


async def finish_all(client, engine):
    """Finish every request that runs, until none is left in the queue."""

    async def next_run():
        return engine.running[:1] or ["none"] * (not (await client.bus.stream_state(STREAM_REQUESTS)).messages)

    while (run := (await eventually(next_run))[0]) != "none":
        run.finish("two")
        await eventually(lambda run=run: run.closed)
        await client.answer(run.work.id)


async def fill(client, engine, names):
    for name in names:
        await client.ask(name)
        await engine.generation(name)


async def queue(client, count=4):
    for number in range(count):
        for lane in LANES:
            await client.ask(f"{lane.replace('.', '_')}-{number}", lane=lane)


def served(engine):
    return [run.work.id for run in engine.submitted]


async def test_the_survivor_whose_slots_are_full_goes_on_with_what_the_dead_one_had_begun(start, client):
    doomed = await start(ScriptedEngine(slots=3), lease_s=LEASE_S)
    for lane in LANES:
        await begin(client, doomed.engine, [f"begun-{lane.replace('.', '_')}"], lane)
    begun = served(doomed.engine)
    survivor = await start(ScriptedEngine(slots=3), lease_s=LEASE_S)
    full = ["full-1", "full-2", "full-3"]
    await fill(client, survivor.engine, full)
    await queue(client)
    await doomed.kill()
    for name in begun:
        (await survivor.engine.generation(name)).finish("two")
        answer = await client.answer(name)
        assert answer.choices[0].message.content == "one two"
        assert answer.headrace.attempts == 2
    # Nothing that was queued has begun meanwhile.
    assert sorted(served(survivor.engine)) == sorted(full + begun)
    assert not any(run.closed for run in survivor.engine.submitted if run.work.id in full)
    # From here on the slots are the bound again.
    survivor.engine.most_running = 0
    await finish_all(client, survivor.engine)
    assert survivor.engine.most_running <= 3
    assert sorted(served(survivor.engine)) == sorted({*served(survivor.engine)})


async def test_a_worker_that_is_started_again_and_has_filled_its_slots_goes_on_with_what_it_had_begun(start, client):
    first = await start(ScriptedEngine(slots=2), lease_s=LEASE_S)
    await begin(client, first.engine, ["begun-1", "begun-2"], "low")
    await queue(client)
    await first.kill()
    second = await start(ScriptedEngine(slots=2), lease_s=LEASE_S)
    await eventually(lambda: len(second.engine.running) == 2)
    assert not {"begun-1", "begun-2"} & set(served(second.engine))
    for name in ("begun-1", "begun-2"):
        (await second.engine.generation(name)).finish("two")
        assert (await client.answer(name)).choices[0].message.content == "one two"
    assert len(second.engine.submitted) == 4


async def test_what_a_worker_hands_back_as_it_leaves_is_gone_on_with_at_once(start, client):
    # A lease long enough that only the last word of the one that leaves can be what the other one acts on.
    leaving = await start(ScriptedEngine(slots=2), lease_s=60.0)
    await begin(client, leaving.engine, ["begun-1", "begun-2"], "medium")
    staying = await start(ScriptedEngine(slots=2), lease_s=60.0)
    await fill(client, staying.engine, ["full-1", "full-2"])
    await queue(client)
    await leaving.drain(drain_s=0.1)
    for name in ("begun-1", "begun-2"):
        (await staying.engine.generation(name)).finish("two")
        assert isinstance(await client.answer(name), Completion)
    assert sorted(served(staying.engine)) == ["begun-1", "begun-2", "full-1", "full-2"]


async def test_what_is_taken_over_is_never_reported_as_more_slots_than_there_are(start, client):
    doomed = await start(ScriptedEngine(slots=2), lease_s=LEASE_S)
    await begin(client, doomed.engine, ["begun-1", "begun-2"])
    survivor = await start(ScriptedEngine(slots=2), lease_s=LEASE_S)
    await fill(client, survivor.engine, ["full-1", "full-2"])
    seen = await statuses_of(client.bus)
    await doomed.kill()
    mine = survivor.worker.me.name

    def over():
        return [status for status in seen if status.worker == mine and status.running.high == 4]

    await eventually(over, what="a status of the worker with two requests beyond its slots")
    assert {(status.slots.used, status.slots.total) for status in over()} == {(2, 2)}
    # A slot that is left by one of four is not free.
    survivor.engine.running[0].finish("two")
    await eventually(lambda: seen[-1].worker == mine and seen[-1].running.high == 3)
    assert seen[-1].slots.used == 2
    for left in (2, 1, 0):
        survivor.engine.running[0].finish("two")
        await eventually(lambda left=left: seen[-1].worker == mine and seen[-1].running.high == left)
        assert seen[-1].slots.used == left


async def test_no_more_is_taken_over_than_the_engine_has_slots(start, client):
    doomed = await start(ScriptedEngine(slots=6), lease_s=LEASE_S)
    names = [f"begun-{number}" for number in range(6)]
    await begin(client, doomed.engine, names)
    survivor = await start(ScriptedEngine(slots=2), lease_s=LEASE_S)
    await fill(client, survivor.engine, ["full-1", "full-2"])
    await doomed.kill()
    await eventually(lambda: len(survivor.engine.running) == 4)
    await finish_all(client, survivor.engine)
    assert survivor.engine.most_running <= 4
    assert sorted(served(survivor.engine)) == sorted([*names, "full-1", "full-2"])


async def test_survivors_share_what_the_dead_one_had_begun(start, client):
    doomed = await start(ScriptedEngine(slots=4), lease_s=LEASE_S)
    names = [f"begun-{number}" for number in range(4)]
    await begin(client, doomed.engine, names)
    survivors = [await start(ScriptedEngine(slots=1), lease_s=LEASE_S) for _ in range(2)]
    for number in range(len(survivors)):
        await client.ask(f"full-{number}")
    await eventually(lambda: all(one.engine.running for one in survivors))
    assert [len(one.engine.running) for one in survivors] == [1, 1]
    await doomed.kill()
    await eventually(lambda: all(len(one.engine.running) == 2 for one in survivors))
    # The others wait for a slot, or for somebody with more room.
    spacious = await start(ScriptedEngine(slots=8), lease_s=LEASE_S)
    await eventually(lambda: len(spacious.engine.running) == 2)
    for one in (*survivors, spacious):
        for run in list(one.engine.running):
            run.finish("two")
    await asyncio.gather(*(client.answer(name) for name in names))
    await client.none_waits()
