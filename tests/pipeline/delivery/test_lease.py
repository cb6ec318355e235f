"""A request stays with the worker that works on it, and leaves one that stood still."""

from __future__ import annotations

import pytest

from pipeline.broker.clock import Clock
from pipeline.broker.connection import Delivery, Message, Unreachable
from pipeline.delivery.lease import LeaseKeeper
from pipeline.wire.answers import Completion
from pipeline.wire.subjects import STREAM_REQUESTS
from tests.waiting import eventually

LEASE_S = 1.0


class Renewals:
    """Stands for the broker's side of a lease: counts what it hears."""

    def __init__(self) -> None:
        self.heard = []

    async def publish(self, subject, data, **_):
        self.heard.append((subject, data))


class Hands:
    """The hands of a clock, moved by the test."""

    now = 100.0


@pytest.fixture
def broker():
    return Renewals()


@pytest.fixture
def delivery(broker):
    return Delivery(Message("llm.request.high", b"", {}, "$JS.ACK.x"), "high", 1, 1, 0.0, 0, broker)


@pytest.fixture
def hands():
    return Hands()


@pytest.fixture
def keeper(hands):
    return LeaseKeeper(3.0, clock=Clock(lambda: hands.now))


async def test_a_lease_is_renewed_until_it_is_released(keeper, broker, delivery, hands):
    lease = keeper.hold(delivery)
    lease.on_lost = lambda: pytest.fail("lost")
    for _ in range(5):
        hands.now += 1
        await keeper.renew()
    assert broker.heard == [("$JS.ACK.x", b"+WPI")] * 5
    assert lease.holds()
    assert lease.expires_at == hands.now + 3
    keeper.release(lease)
    keeper.release(lease)
    await keeper.renew()
    assert len(broker.heard) == 5


async def test_a_lease_holds_for_its_time_after_the_last_renewal(keeper, delivery, hands):
    lease = keeper.hold(delivery)
    hands.now += 2
    await keeper.renew()
    hands.now += 2.9
    assert lease.holds()
    hands.now += 0.1
    assert not lease.holds()


async def test_a_keeper_that_stood_still_for_a_lease_has_lost_everything_and_says_so_once(
    keeper, broker, delivery, hands
):
    lost = []
    leases = [keeper.hold(delivery) for _ in range(3)]
    for number, lease in enumerate(leases):
        lease.on_lost = lambda number=number: lost.append(number)
    hands.now += 3.1
    assert keeper.stood_still()
    assert not any(lease.holds() for lease in leases)
    for _ in range(2):
        await keeper.renew()
    assert lost == [0, 1, 2]
    assert broker.heard == []
    assert keeper.stood_still()
    hands.now += 0.6
    assert not keeper.stood_still()


async def test_a_renewal_that_does_not_reach_the_broker_extends_nothing(keeper, broker, delivery, hands):
    async def publish(*_, **__):
        raise Unreachable

    lease = keeper.hold(delivery)
    broker.publish = publish
    hands.now += 1
    await keeper.renew()
    assert lease.expires_at == 103.0


@pytest.mark.parametrize("passed_s", [0.0, 3.0], ids=["in time", "run out"])
async def test_a_lease_that_is_released_during_a_round_is_neither_renewed_nor_lost(keeper, hands, passed_s):
    """Its request has ended meanwhile. A renewal after a return that names a delay would set another time."""
    held, sent = [], []

    class Slow:
        async def publish(self, *_):
            sent.append(self)
            hands.now += passed_s
            keeper.release(held[1])

    for number in (1, 2):
        delivery = Delivery(Message("llm.request.high", b"", {}, f"$JS.ACK.{number}"), "high", 1, 1, 0.0, 0, Slow())
        held.append(keeper.hold(delivery))
    held[1].on_lost = lambda: pytest.fail("lost")
    await keeper.renew()
    assert len(sent) == 1


async def test_after_each_round_of_renewals_others_are_told(hands):
    rounds = []
    keeper = LeaseKeeper(3.0, lambda: rounds.append(hands.now), clock=Clock(lambda: hands.now))
    await keeper.renew()
    assert rounds == [100.0]


async def test_a_request_served_for_three_leases_is_delivered_once(start, client):
    renewals = []

    async def on_renewal(message):
        if message.data == b"+WPI":
            renewals.append(message)

    await client.bus.subscribe("$JS.ACK.>", on_renewal)
    await client.bus.nc.flush()
    worker = await start(lease_s=LEASE_S)
    await client.stream("r1")
    run = await worker.engine.generation("r1")
    count = 0
    # Three renewals a lease: work goes on for three leases, as the broker counts them.
    while len(renewals) < 9:
        heard = len(renewals)
        run.say(".")
        count += 1
        await client.until("r1", 1 + count)
        await eventually(lambda heard=heard: len(renewals) > heard)
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
    worker.skip(2 * LEASE_S)
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
