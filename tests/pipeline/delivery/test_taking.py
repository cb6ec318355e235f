"""Requests are taken in the scheduler's order, each held under a lease, and surplus goes back unharmed."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager

import msgspec
import pytest

from pipeline.core.ending import Abandoned, Loss, Returned
from pipeline.delivery.returns import times_returned
from pipeline.delivery.taking import MLX_SOURCE, Source, Taking
from pipeline.process.role import role
from pipeline.wire.subjects import LANES, MSG_ID, STREAM_REQUESTS, TENANT_LANES, Lane, Priority, Task
from tests import waiting
from tests.waiting import eventually

HIGH, LOW = Lane(Priority.HIGH, Task.UNTRIAGED), Lane(Priority.LOW, Task.UNTRIAGED)


async def never() -> None:
    await asyncio.Event().wait()


async def at_once() -> None:
    pass


@pytest.fixture
async def taking(config):
    async with role("taker", msgspec.structs.replace(config, lease_s=60.0)) as me:
        taking = Taking(me, config, MLX_SOURCE)
        await taking.start()
        yield taking
        await taking.close()


async def publish(bus, request_id, lane="high", **headers):
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    await bus.store(f"llm.request.{lane}", b"hello", headers={MSG_ID: request_id} | given)


async def waits_on(bus, lane):
    async def waiting():
        return (await bus.js.consumer_info(STREAM_REQUESTS, lane.consumer)).num_waiting

    await eventually(waiting, what=f"a pull on {lane.consumer}")


@asynccontextmanager
async def pull_requests(bus):
    """The consumers that are asked for a request, in order."""
    asked = []
    prefix = f"$JS.API.CONSUMER.MSG.NEXT.{STREAM_REQUESTS}."

    async def on_pull(message):
        asked.append(message.subject.removeprefix(prefix))

    subscription = await bus.subscribe(f"{prefix}>", on_pull)
    await bus.nc.flush()
    yield asked
    await bus.unsubscribe(subscription)


async def test_a_request_is_held_with_its_lane_and_its_envelope(taking, bus, config):
    await publish(bus, "r1", "low", Llm_Timeout="60")
    taken = await taking.next(never)
    assert (taken.lane, taken.consumer, taken.envelope.id) == (LOW, "low", "r1")
    assert taken.envelope.deadline == pytest.approx(taken.envelope.stored_at + 60)
    assert taken.held.body == b"hello"
    assert len(taking.leases._leases) == 1
    await taken.held.end(Returned())
    assert taking.leases._leases == []


@pytest.mark.parametrize(("headers", "counts"), [({}, True), ({"Llm_Batch": "batch_1"}, False)])
async def test_a_line_of_a_batch_does_not_count_for_the_longest_wait(taking, bus, headers, counts):
    await publish(bus, "r1", "low", **headers)
    await taking.next(never)
    account = taking._scheduler._accounts[Priority.LOW]
    assert (account.head_stored_at is not None) is counts


async def test_the_scheduler_says_which_lane_comes_first(taking, bus):
    for lane in ("low", "high"):
        for number in range(4):
            await publish(bus, f"{lane}-{number}", lane)
    order = []
    for _ in range(4):
        taken = await taking.next(never)
        order.append(taken.lane)
        taking.finish(taken, 100.0)
    assert order[0] == HIGH
    assert order.count(HIGH) > order.count(LOW)


async def test_only_the_given_lanes_are_asked(taking, bus):
    await publish(bus, "r1", "high")
    async with pull_requests(bus) as asked:
        assert await taking.next(at_once, lanes=[LOW]) is None
        await eventually(lambda: asked)
        assert set(asked) == {"low"}
    assert (await taking.next(never, lanes=[HIGH])).envelope.id == "r1"


async def test_what_is_stored_while_it_waits_is_taken(taking, bus):
    waiting = asyncio.create_task(taking.next(never))
    await waits_on(bus, LOW)
    await publish(bus, "r1", "low")
    assert (await waiting).envelope.id == "r1"


async def test_the_wait_ends_when_there_is_a_reason_to(taking, bus):
    no_room = asyncio.Event()
    waiting = asyncio.create_task(taking.next(no_room.wait))
    await waits_on(bus, LOW)
    no_room.set()
    assert await waiting is None


async def test_surplus_goes_back_without_using_up_an_attempt(taking, bus):
    """As when a request arrives at the moment at which the wait for it is cancelled."""
    waiting = asyncio.create_task(taking.next(never))
    await waits_on(bus, HIGH)
    standing = taking.me.bus.nc._subs[max(taking.me.bus.nc._subs)]
    settle = standing._cb

    async def cancel_as_it_comes(message):
        await settle(message)
        waiting.cancel()

    standing._cb = cancel_as_it_comes
    await publish(bus, "r1")
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await taking.close()
    await taking.start()
    again = await taking.next(never)
    assert again.envelope.delivered == 2
    assert await again.held.open()
    assert again.held.tries == 1


async def test_surplus_may_be_kept(config, bus):
    kept = []

    async def keep(delivery):
        kept.append(delivery)

    async with role("taker", config) as me:
        taking = Taking(me, config, MLX_SOURCE, on_surplus=keep)
        await taking.start()
        waiting = asyncio.create_task(taking.next(never, keep=lambda: True))
        await waits_on(bus, LOW)
        await publish(bus, "r1", "high")
        assert (await waiting).envelope.id == "r1"
        await publish(bus, "r2", "low")
        await eventually(lambda: kept, what="the request of the pull that stayed open")
        assert kept[0].message.headers[MSG_ID] == "r2"
        await taking.close()


async def test_a_request_that_arrives_after_a_standstill_is_abandoned_and_costs_no_attempt(taking, bus, config):
    await publish(bus, "r1")
    delivery = await waiting.taken(taking._puller, "high")
    before = taking.me.bus.clock._monotonic
    taking.me.bus.clock._monotonic = lambda: before() + 1000
    taken = taking.receive(delivery)
    assert await taken.held.open() == Abandoned(Loss.STOOD_STILL)
    assert await taken.held.end(Returned()) == Abandoned(Loss.STOOD_STILL)
    assert await times_returned(bus, delivery) == 1
    state = next(one for one in await bus.consumers(STREAM_REQUESTS) if one.name == "high")
    assert state.num_ack_pending == 1, "it was not given back either: it may be another process's by now"


async def test_nothing_is_asked_for_while_deliveries_are_in_doubt(taking, bus):
    await publish(bus, "r1")
    clock, before = taking.me.bus.clock, taking.me.bus.clock._monotonic
    clock._monotonic = lambda: before() + 1000
    async with pull_requests(bus) as asked:
        waiting = asyncio.create_task(taking.next(never))
        await bus.nc.flush()
        assert asked == []
        # The loop turns: the doubt ends half a second later.
        await taking.leases.renew()
        clock._monotonic = lambda: before() + 1001
        assert (await waiting).envelope.id == "r1"
        assert asked


async def test_an_announcement_makes_an_empty_lane_worth_asking(taking, bus):
    await taking.listen()
    assert await taking.next(at_once) is None
    taken = None
    await publish(bus, "r1", "low")
    await eventually(lambda: taking._scheduler.announced(LOW) == 1)
    async with pull_requests(bus) as asked:
        taken = await taking.next(never)
        await eventually(lambda: asked)
        assert asked == ["low"]
    assert taken.envelope.id == "r1"
    await taking.ignore()
    await publish(bus, "r2", "low")
    await bus.nc.flush()
    await taking.me.bus.nc.flush()
    assert taking._scheduler.announced(LOW) == 1


async def test_a_stream_without_announcements_is_not_listened_to(config):
    async with role("taker", config) as me:
        taking = Taking(me, config, Source(STREAM_REQUESTS, {lane: lane.consumer for lane in LANES}))
        await taking.listen()
        assert taking._announcements is None


async def test_several_are_taken_by_the_shares_of_their_lanes_with_one_pull_a_lane(taking, bus):
    for number in range(12):
        for lane in LANES:
            await publish(bus, f"{lane.consumer}-{number}", lane.subject.removeprefix("llm.request."))
    for lane in TENANT_LANES:
        # A lane that was not asked yet is planned for as if it had requests.
        taking._scheduler.empty(lane, bus.clock.now())
    taken = []
    async with pull_requests(bus) as asked:
        await taking.several(20, taken.append)
        await eventually(lambda: asked)
        assert len(asked) == len(set(asked))
    counts = Counter(one.lane.priority for one in taken)
    assert counts.total() == 20
    assert counts[Priority.HIGH] > counts[Priority.MEDIUM] > counts[Priority.LOW] > 0
    assert len(taking.leases._leases) == 20


async def test_several_of_lanes_that_are_known_to_be_empty_are_not_asked_for(taking, bus):
    await taking.several(64, pytest.fail)
    async with pull_requests(bus) as asked:
        await taking.several(64, pytest.fail)
        await bus.nc.flush()
        assert asked == []
