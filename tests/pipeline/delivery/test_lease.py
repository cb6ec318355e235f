"""A request stays with whoever works on it, and with nobody who stood still."""

from __future__ import annotations

import asyncio
import time

import pytest

from pipeline.broker.connection import Delivery, Message
from pipeline.delivery.lease import LeaseKeeper
from pipeline.wire.messages import Completion
from pipeline.wire.subjects import STREAM_REQUESTS
from tests.waiting import eventually

LEASE_S = 1.0


class Renewals:
    """Stands for the broker's side of a lease: counts what it hears."""

    def __init__(self) -> None:
        self.heard = []

    async def publish(self, subject, data, **_):
        self.heard.append((subject, data))


@pytest.fixture
def broker():
    return Renewals()


@pytest.fixture
def delivery(broker):
    return Delivery(Message("llm.request.high", b"", {}, "$JS.ACK.x"), "high", 1, 1, 0.0, 0, broker)


@pytest.fixture
async def keeper():
    keeper = LeaseKeeper(lease_s=0.3)
    running = asyncio.create_task(keeper.run())
    yield keeper
    running.cancel()


async def test_a_lease_is_renewed_until_it_is_released(keeper, broker, delivery):
    lease = keeper.hold(delivery, lambda: pytest.fail("lost"))
    await eventually(lambda: len(broker.heard) >= 5)
    assert set(broker.heard) == {("$JS.ACK.x", b"+WPI")}
    assert lease.holds()
    keeper.release(lease)
    keeper.release(lease)
    heard = len(broker.heard)
    other = keeper.hold(delivery, lambda: None)
    await eventually(lambda: len(broker.heard) >= heard + 2)
    assert keeper._leases == [other]


async def test_whoever_stood_still_for_a_lease_has_lost_everything_and_hears_of_it_once(keeper, broker, delivery):
    lost = []
    leases = [keeper.hold(delivery, lambda number=number: lost.append(number)) for number in range(3)]
    await eventually(lambda: broker.heard)
    time.sleep(0.35)  # noqa: ASYNC251 - the loop stands still
    assert not any(lease.holds() for lease in leases)
    heard = len(broker.heard)
    await eventually(lambda: lost == [0, 1, 2])
    assert len(broker.heard) == heard
    assert keeper._leases == []


async def test_a_request_served_for_three_leases_is_delivered_once(start, client):
    worker = await start(lease_s=LEASE_S)
    await client.stream("r1")
    run = await worker.engine.generation("r1")
    served_since = time.monotonic()
    count = 0
    while time.monotonic() - served_since < 3 * LEASE_S:
        run.say(".")
        count += 1
        await client.until("r1", 1 + count)
        await asyncio.sleep(0.1)  # tokens take their time
    run.finish()
    answer = await client.answer("r1")
    assert answer.choices[0].message.content == "." * count
    assert answer.headrace.attempts == 1
    assert len(worker.engine.submitted) == 1
    await client.none_waits()


async def test_a_worker_that_stood_still_writes_nothing_and_another_one_goes_on(start, client, bus):
    worker = await start(lease_s=LEASE_S)
    await client.stream("r1")
    await client.ask("r2")
    run, quiet = await worker.engine.generation("r1"), await worker.engine.generation("r2")
    run.say("before ")
    await client.until("r1", 2)
    before = await client.record("r1")
    # Everything the worker needs to go on is there as it wakes up, but for the lease.
    run.finish("after")
    quiet.finish("after")
    time.sleep(2 * LEASE_S)  # noqa: ASYNC251 - the loop stands still
    for again in range(2, 4):
        await eventually(lambda again=again: len(worker.engine.submitted) >= again)
    second = {"r1": await worker.engine.generation("r1", 2), "r2": await worker.engine.generation("r2", 2)}
    record = await client.record("r1")
    assert record[: len(before)] == before
    assert all("after" not in str(message) for message in record)
    assert await client.record("r2") == []
    state = await bus.stream_state(STREAM_REQUESTS)
    assert state.messages == 2
    for one in second.values():
        one.finish("at last")
    for request_id in second:
        answer = await client.answer(request_id)
        assert isinstance(answer, Completion)
        assert answer.choices[0].message.content.endswith("at last")
        # What it was handed while it stood still was not its own any more.
        assert answer.headrace.attempts in (2, 3)
    await client.none_waits()
