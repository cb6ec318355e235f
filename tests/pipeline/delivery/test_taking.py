"""Requests are taken in the scheduler's order, each held under a lease, and surplus goes back unharmed."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager

import msgspec
import pytest

from pipeline.broker.events import publish_event
from pipeline.broker.notes import NoteFollower
from pipeline.core import scheduler
from pipeline.core.ending import Abandoned, Loss, Returned
from pipeline.delivery import lanes
from pipeline.delivery.lanes import MLX_SOURCE, OLLAMA_SOURCE, Source
from pipeline.delivery.returns import times_returned
from pipeline.delivery.taking import Taking
from pipeline.process.role import role
from pipeline.wire.answers import ErrorAnswer, ErrorBody, Status
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import PerPriorityCount, RequestEvent, Slots, WorkerStatus, encode
from pipeline.wire.pauses import Pause, PausedState
from pipeline.wire.subjects import (
    LANES,
    MSG_ID,
    STORED_SEQUENCE,
    STORED_SUBJECT,
    STREAM_OLLAMA,
    STREAM_REQUESTS,
    Lane,
    Move,
    Priority,
    Task,
)
from tests import waiting
from tests.lanes import listed
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


async def nothing_waits_on(bus, lane):
    async def nothing():
        return not (await bus.js.consumer_info(STREAM_REQUESTS, lane.consumer)).num_waiting

    await eventually(nothing, what=f"no pull on {lane.consumer}")


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
    assert bool(taking._scheduler._heads[Priority.LOW]) is counts


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
        await eventually(lambda: asked)  # it is seen on another connection, where it may come later


async def test_an_announcement_makes_an_empty_lane_worth_asking(taking, bus):
    await taking.listen()
    assert await taking.next(at_once) is None
    await nothing_waits_on(bus, LOW)  # else the request could come on the pull that is being cancelled
    await publish(bus, "r1", "low")
    await eventually(lambda: taking._scheduler.announced(LOW) == 1)
    await eventually(lambda: _stands_in(bus, LOW), what="the consumer has the request that was announced")
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


async def _stands_in(bus, lane):
    return (await bus.js.consumer_info(STREAM_REQUESTS, lane.consumer)).num_pending == 1


async def test_a_stream_without_announcements_is_not_listened_to(config):
    async with role("taker", config) as me:
        taking = Taking(me, config, Source(STREAM_REQUESTS, {lane: lane.consumer for lane in LANES}))
        await taking.listen()
        assert taking._announcements is None


async def test_several_are_taken_by_the_shares_of_their_lanes_with_one_pull_a_lane(taking, bus):
    for number in range(12):
        for lane in LANES:
            await publish(bus, f"{lane.consumer}-{number}", lane.subject.removeprefix("llm.request."))
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


# ---- lanes of tenants

ANN, BOB = (Lane(Priority.MEDIUM, Task.UNTRIAGED, tenant) for tenant in ("ann", "bob"))


async def taken_next(taking):
    while (taken := await taking.next(never)) is None:
        pass
    return taken


async def test_a_tenants_lane_is_taken_from_once_it_has_a_consumer(taking, bus, config):
    await taking.listen()
    waiting = asyncio.create_task(taken_next(taking))
    for lane in LANES:
        await waits_on(bus, lane)
    await publish(bus, "t.ann.r1", "medium.t.ann")
    await listed(bus, config, ANN)
    taken = await waiting
    assert (taken.lane, taken.envelope.name) == (ANN, "t.ann.r1")


@pytest.fixture
def deaf(monkeypatch):
    """No process hears that the list of lanes has changed."""

    async def nothing(*_):
        pass

    monkeypatch.setattr(NoteFollower, "_on_change", nothing)
    monkeypatch.setattr(lanes, "_READ_EVERY_S", 0.05)


async def test_a_lane_of_whose_listing_the_process_did_not_hear_is_taken_from(deaf, taking, bus, config):
    await taking.listen()
    waiting = asyncio.create_task(taken_next(taking))
    await publish(bus, "t.ann.r1", "medium.t.ann")
    await listed(bus, config, ANN)
    assert (await waiting).lane == ANN


async def test_no_pull_stands_open_on_a_tenants_lane_until_a_request_is_announced(taking, bus, config):
    await listed(bus, config, ANN)
    await taking.listen()
    await eventually(lambda: ANN in taking.consumers)
    waiting = asyncio.create_task(taken_next(taking))
    for lane in LANES:
        await waits_on(bus, lane)
    assert not (await bus.js.consumer_info(STREAM_REQUESTS, ANN.consumer)).num_waiting
    await publish(bus, "t.ann.r1", "medium.t.ann")
    assert (await waiting).envelope.name == "t.ann.r1"


async def test_a_request_that_the_broker_announces_before_it_delivers_it_is_taken(taking, bus, config, monkeypatch):
    await listed(bus, config, ANN)
    await taking.listen()
    await eventually(lambda: ANN in taking.consumers)
    waiting = asyncio.create_task(taken_next(taking))
    await waits_on(bus, LOW)
    monkeypatch.setattr(lanes, "_LOOK_EVERY_S", 3600.0)
    await bus.publish("llm.queued.medium.t.ann", b"", headers={STORED_SUBJECT: ANN.subject, STORED_SEQUENCE: "1"})
    await waits_on(bus, ANN)
    await taking.me.bus.unsubscribe(taking._announcements)
    await publish(bus, "t.ann.r1", "medium.t.ann")
    assert (await waiting).envelope.name == "t.ann.r1"


async def test_what_another_process_returned_to_a_tenants_lane_is_taken(taking, bus, config):
    await listed(bus, config, ANN)
    await taking.listen()
    await publish(bus, "t.ann.r1", "medium.t.ann")
    other = await bus.js.pull_subscribe_bind(consumer=ANN.consumer, stream=STREAM_REQUESTS)
    [message] = await other.fetch(1)
    waiting = asyncio.create_task(taken_next(taking))
    await waits_on(bus, LOW)
    await message.nak()
    assert (await waiting).envelope.name == "t.ann.r1"


def status(worker, *given_back):
    return WorkerStatus(
        worker, "mlx", "ready", [], Slots(0, 1), PerPriorityCount(), 0, 0, 0, 0, 0, at=0.0, given_back=[*given_back]
    )


async def test_a_pull_stands_open_where_another_worker_has_returned_a_request(taking, bus, config):
    await listed(bus, config, ANN)
    await eventually(lambda: ANN in taking.consumers)
    await taking.listen()
    again = asyncio.create_task(taken_next(taking))
    await waits_on(bus, LOW)
    taking.heard(status(taking.me.name, ANN.consumer))
    assert not taking._lanes.stirred.is_set(), "it has returned it itself"
    taking.heard(status("other", "low", "unknown", ANN.consumer))
    await waits_on(bus, ANN)
    await publish(bus, "t.ann.r1", "medium.t.ann")
    assert (await again).envelope.name == "t.ann.r1"


async def test_others_are_told_of_what_is_given_back_and_have_it_first(taking, bus, config, monkeypatch):
    monkeypatch.setattr(scheduler, "OTHERS_FIRST_S", 3600.0)
    told = []
    taking._lanes.on_gave_back = lambda: told.extend(taking.given_back())
    await listed(bus, config, ANN)
    await eventually(lambda: ANN in taking.consumers)
    await publish(bus, "t.ann.r1", "medium.t.ann")
    taken = await taken_next(taking)
    await taken.held.open()
    await taken.held.end(Returned())
    assert told == [ANN.consumer]
    again = asyncio.create_task(taken_next(taking))
    await waits_on(bus, LOW)
    assert not (await bus.js.consumer_info(STREAM_REQUESTS, ANN.consumer)).num_waiting
    taking.heard(status("other", ANN.consumer))
    assert (await again).envelope.name == "t.ann.r1"


async def test_no_pull_stands_open_on_a_lane_that_has_left_the_list(taking, bus, config):
    await listed(bus, config, ANN, BOB)
    await eventually(lambda: {ANN, BOB} <= taking.consumers.keys())
    again = asyncio.create_task(taken_next(taking))
    await waits_on(bus, LOW)
    taking.heard(status("other", ANN.consumer))
    await waits_on(bus, ANN)
    await listed(bus, config, BOB)
    await nothing_waits_on(bus, ANN)
    await publish(bus, "t.bob.r1", "medium.t.bob")
    await taking.listen()
    assert (await again).envelope.name == "t.bob.r1"


async def test_a_request_whose_announcement_was_lost_is_taken(taking, bus, config):
    await listed(bus, config, ANN)
    await taking.listen()
    await taking.me.bus.unsubscribe(taking._announcements)
    waiting = asyncio.create_task(taken_next(taking))
    await waits_on(bus, LOW)
    await publish(bus, "t.ann.r1", "medium.t.ann")
    assert (await waiting).envelope.name == "t.ann.r1"


async def test_what_a_tenant_used_elsewhere_is_charged(taking, bus, config):
    await listed(bus, config, ANN, BOB)
    await taking.listen()
    await eventually(lambda: taking._lanes._events, what="the events are heard")
    await taking.me.bus.nc.flush()
    fair = taking._scheduler._tenants[Priority.MEDIUM]
    event = RequestEvent("t.ann.r1", "done", Priority.MEDIUM, "ollama", worker="other", completion_tokens=500)
    await publish_event(bus, event)
    await eventually(lambda: fair.start_tag("ann") > fair.start_tag("bob"))
    charged = fair.start_tag("ann")
    event.worker = taking.me.name
    await publish_event(bus, event)
    event.worker, event.id = "other", "t.bob.r1"
    await publish_event(bus, event)
    await eventually(lambda: fair.start_tag("bob") > 0)
    assert fair.start_tag("ann") == charged, "its own requests are charged when they end"


async def test_a_lane_that_leaves_the_list_is_not_asked_any_more(taking, bus, config):
    await listed(bus, config, ANN, BOB)
    await eventually(lambda: ANN in taking.consumers)
    await publish(bus, "t.ann.r1", "medium.t.ann")
    delivery = await waiting.taken(taking._puller, ANN.consumer)
    await listed(bus, config, BOB)
    await eventually(lambda: ANN not in taking.consumers)
    assert ANN not in taking._scheduler
    assert taking.receive(delivery).lane == ANN, "what was on its way is served all the same"
    assert ANN not in taking._scheduler


async def test_a_paused_tenants_lane_is_not_asked(taking, bus, config):
    pauses = PausedState(pauses=[Pause(tenant="ann")])
    await bus.store("llm.paused", msgspec.json.encode(pauses), expected_last=0)
    await eventually(lambda: taking.me.peers.pauses.now.scopes)
    await listed(bus, config, ANN, BOB)
    await eventually(lambda: ANN in taking.consumers)
    await publish(bus, "t.ann.r1", "medium.t.ann")
    await publish(bus, "t.bob.r1", "medium.t.bob")
    assert (await taken_next(taking)).lane == BOB
    async with pull_requests(bus) as asked:
        await taking.several(8, pytest.fail)
        await bus.nc.flush()
        assert ANN.consumer not in asked


async def test_with_tenants_several_are_taken_in_equal_parts(taking, bus, config):
    await listed(bus, config, ANN, BOB)
    await eventually(lambda: {ANN, BOB} <= taking.consumers.keys())
    for number in range(12):
        for lane in ("medium", "medium.t.ann", "medium.t.bob"):
            prefix = lane.removeprefix("medium").removeprefix(".")
            await publish(bus, f"{prefix}{'.' if prefix else ''}{number}", lane)
    for lane in LANES:
        if lane.subject != "llm.request.medium":
            taking._scheduler.empty(lane, bus.clock.now())
    taken = []
    await taking.several(9, taken.append)
    assert Counter(one.lane.tenant for one in taken) == {"": 3, "ann": 3, "bob": 3}


# ---- pauses


@pytest.fixture
async def paused(config, bus):
    """Takes from Ollama's lanes, where the requests of a paused tenant stand among the others."""
    pauses = PausedState(pauses=[Pause(tenant="default")])
    await bus.store("llm.paused", msgspec.json.encode(pauses), expected_last=0)
    async with role("taker", msgspec.structs.replace(config, lease_s=60.0)) as me:
        await eventually(lambda: me.peers.pauses.now.scopes)
        taking = Taking(me, config, OLLAMA_SOURCE)
        await taking.start()
        yield taking
        await taking.close()


async def spill(bus, request_id):
    headers = {MSG_ID: bus.moves.make(request_id, Move.SPILLED, 1, 0.0), "Llm-Stored-At": "1.0"}
    await bus.store("llm.ollama.high", b"hello", headers=headers)


async def test_a_paused_request_that_was_begun_is_not_delivered_again_at_once(paused, bus):
    """Only its engine's worker goes on with it. Others would get it again and again."""
    returns = []

    async def on_answer(message):
        returns.append(message.data)

    await bus.subscribe("$JS.ACK.>", on_answer)
    await bus.nc.flush()
    await spill(bus, "r1")
    await bus.store("llm.out.r1", encode(Status("r1", "started", 1, "ollama", "m", 1, 0.0)), expected_last=0)
    delivery = await waiting.taken(paused._puller, "ollama_high")
    assert paused.held_back(delivery)
    [returned] = await eventually(lambda: returns)
    assert returned.startswith(b'-NAK {"delay"')


async def test_a_paused_request_that_has_ended_is_removed(paused, bus):
    await spill(bus, "r1")
    error = ErrorBody.of(HeadraceError(ErrorCode.CANCELLED, "as the test wants it"))
    await bus.store("llm.out.r1", encode(ErrorAnswer("r1", 1, error)), expected_last=0)
    delivery = await waiting.taken(paused._puller, "ollama_high")
    assert paused.held_back(delivery)

    async def removed():
        return not (await bus.stream_state(STREAM_OLLAMA)).messages

    await eventually(removed)
