"""One request at a time, to whoever is free first; nothing is held that nobody serves."""

from __future__ import annotations

import asyncio
import socket
from contextlib import AsyncExitStack

import msgspec
import pytest

from pipeline.broker import topology
from pipeline.broker.jetstream import Bus
from pipeline.delivery.puller import Puller
from pipeline.wire.subjects import LANES, MSG_ID, STREAM_REQUESTS
from tests.faults import Process
from tests.waiting import TIMEOUT_S, eventually, taken

CONSUMERS = [lane.consumer for lane in LANES]


def forever():
    return asyncio.Event().wait()


class Pulling:
    """A puller with a connection of its own, and what came to it as surplus."""

    def __init__(self, bus: Bus, stands_s: float = 30.0) -> None:
        self.bus = bus
        self.surplus = []
        self.puller = Puller(bus, STREAM_REQUESTS, self._on_surplus, stands_s)

    async def _on_surplus(self, delivery):
        self.surplus.append(delivery)

    async def take(self, consumer="high"):
        return await self.puller.take(consumer)

    async def wait(self, consumers=CONSUMERS, unless=None, *, keep=False):
        return await self.puller.wait(consumers, unless or forever(), keep=lambda: keep)


@pytest.fixture
async def connect(nats_server, config):
    async with AsyncExitStack() as stack:

        async def connect() -> Pulling:
            bus = await stack.enter_async_context(Bus.connect(nats_server.url, name="puller"))
            await topology.apply(bus.js, msgspec.structs.replace(config, lease_s=2 * TIMEOUT_S))
            pulling = Pulling(bus)
            await pulling.puller.start()
            return pulling

        yield connect


@pytest.fixture
async def pulling(connect):
    return await connect()


async def publish(bus, request_id, lane="high", body=b"hello"):
    return await bus.store(f"llm.request.{lane}", body, headers={MSG_ID: request_id})


async def pulls_standing(bus, consumer="high", *, stands=True):
    """Wait until the broker has a pull standing on the consumer, or none any more."""

    async def seen():
        info = await bus.js.consumer_info(STREAM_REQUESTS, consumer)
        return bool(info.num_waiting) is stands

    await eventually(seen, what=f"a pull on {consumer} is {'there' if stands else 'gone'}")


async def _all_done(bus):
    return (await bus.stream_state(STREAM_REQUESTS)).messages == 0


async def held_by_somebody(bus):
    return sum(state.num_ack_pending for state in await bus.consumers(STREAM_REQUESTS))


async def waiting_in(bus, consumer, count):
    return any(one.name == consumer and one.num_pending == count for one in await bus.consumers(STREAM_REQUESTS))


async def test_take_finds_the_oldest_request_of_a_lane(pulling):
    await publish(pulling.bus, "a")
    await publish(pulling.bus, "b")
    await eventually(lambda: waiting_in(pulling.bus, "high", 2))
    delivery = await taken(pulling, "high")
    assert delivery.message.headers[MSG_ID] == "a"
    assert (delivery.consumer, delivery.sequence, delivery.delivered, delivery.pending) == ("high", 1, 1, 1)
    assert delivery.message.data == b"hello"
    assert await held_by_somebody(pulling.bus) == 1


async def test_take_of_an_empty_lane_says_so_at_once(pulling):
    await publish(pulling.bus, "a", "low")
    assert await pulling.take("high") is None
    assert await held_by_somebody(pulling.bus) == 0


async def test_take_from_a_consumer_that_is_gone_finds_nothing(pulling):
    await pulling.bus.js.delete_consumer(STREAM_REQUESTS, "high")
    assert await pulling.take("high") is None


async def test_wait_ends_with_the_first_request_of_any_lane(pulling):
    waiting = asyncio.create_task(pulling.wait())
    await pulls_standing(pulling.bus, "medium_complex")
    await publish(pulling.bus, "a", "medium.complex")
    delivery = await waiting
    assert (delivery.consumer, delivery.message.headers[MSG_ID]) == ("medium_complex", "a")
    await pulling.puller.close()
    for consumer in CONSUMERS:
        assert (await pulling.bus.js.consumer_info(STREAM_REQUESTS, consumer)).num_waiting == 0


async def test_the_next_request_goes_to_another_workers_pull_unharmed(connect, bus):
    first, second = await connect(), await connect()
    for round_number in range(40):
        one = asyncio.create_task(first.wait())
        await pulls_standing(bus, "low")
        await publish(bus, f"a{round_number}", "high")
        delivery = await one
        other = asyncio.create_task(second.wait())
        await publish(bus, f"b{round_number}", "low")
        # Raced surplus is given back, as a worker without room does.
        while not other.done():
            while first.surplus:
                await first.surplus.pop().nak()
            await asyncio.wait({other}, timeout=0.005)
        await delivery.ack()
        assert other.result().message.headers[MSG_ID] == f"b{round_number}"
        await other.result().ack()
    await eventually(lambda: _all_done(bus))


async def test_of_requests_that_race_one_is_the_answer_and_the_others_are_surplus(pulling):
    for round_number in range(20):
        waiting = asyncio.create_task(pulling.wait())
        await pulls_standing(pulling.bus, "low_complex")
        await asyncio.gather(
            *(
                pulling.bus.store(lane.subject, b"hello", headers={MSG_ID: f"{lane.consumer}-{round_number}"})
                for lane in LANES
            )
        )
        delivery = await waiting
        await pulling.puller.close()
        held = {one.consumer: one for one in (delivery, *pulling.surplus)}
        assert len(held) == 1 + len(pulling.surplus)
        await pulling.puller.start()
        # The others are in their lanes long before a lease ends, also what the broker was about to hand over when
        # it was told to stop.
        for consumer in CONSUMERS:
            if consumer not in held:
                held[consumer] = await taken(pulling, consumer)
        for one in held.values():
            await pulling.bus.delete(STREAM_REQUESTS, one.sequence)
        pulling.surplus.clear()


async def test_pulls_that_are_kept_stand_on_and_only_the_answered_one_is_asked_again(pulling):
    waiting = asyncio.create_task(pulling.wait(keep=True))
    await pulls_standing(pulling.bus, "low_complex")
    await publish(pulling.bus, "a", "high")
    assert (await waiting).consumer == "high"
    assert [consumer for consumer in CONSUMERS if not pulling.puller.stands_on(consumer)] == ["high"]
    for lane in LANES:
        state = await pulling.bus.js.consumer_info(STREAM_REQUESTS, lane.consumer)
        assert state.num_waiting == (lane.consumer != "high")
    waiting = asyncio.create_task(pulling.wait(keep=True))
    await pulls_standing(pulling.bus, "high")
    assert (await pulling.bus.js.consumer_info(STREAM_REQUESTS, "medium")).num_waiting == 1
    await publish(pulling.bus, "b", "medium")
    assert (await waiting).consumer == "medium"


async def test_what_comes_to_a_kept_pull_while_nobody_waits_is_surplus_and_a_take_ends_with_its_own(pulling):
    waiting = asyncio.create_task(pulling.wait(["high", "low"], keep=True))
    await pulls_standing(pulling.bus, "low")
    await publish(pulling.bus, "a", "high")
    await waiting
    await publish(pulling.bus, "c", "medium")
    await publish(pulling.bus, "b", "low")
    assert (await taken(pulling, "medium")).message.headers[MSG_ID] == "c"
    await eventually(lambda: pulling.surplus, what="the request of the kept pull")
    assert [one.message.headers[MSG_ID] for one in pulling.surplus] == ["b"]
    assert not pulling.puller.stands_on("low")


async def test_kept_pulls_that_are_withdrawn_take_nothing_any_more(pulling):
    waiting = asyncio.create_task(pulling.wait(keep=True))
    await pulls_standing(pulling.bus, "low_complex")
    await publish(pulling.bus, "a", "high")
    await waiting
    pulling.puller.withdraw()
    await pulling.puller.close()
    await publish(pulling.bus, "b", "low")
    assert await held_by_somebody(pulling.bus) == 1
    assert not pulling.surplus


async def test_kept_pulls_are_armed_again_after_the_broker_was_killed(pulling, nats_server):
    waiting = asyncio.create_task(pulling.wait(keep=True))
    await pulls_standing(pulling.bus, "low_complex")
    await publish(pulling.bus, "a", "high")
    await (await waiting).ack()
    await eventually(lambda: _all_done(pulling.bus))
    again = asyncio.Event()
    pulling.bus.on_reconnect(again.set)
    nats_server.kill()
    nats_server.start()
    await again.wait()
    waiting = asyncio.create_task(pulling.wait(keep=True))
    await publish(pulling.bus, "b", "low")
    assert (await waiting).message.headers[MSG_ID] == "b"


async def test_a_kept_pull_that_the_broker_has_lost_is_sent_again_once_it_has_expired(pulling):
    """As when the server that led the consumer has died, and this process is connected to another one."""
    losing = Process(pulling.bus)
    pulling.puller.bus = losing
    losing.meets("loses", at=lambda operation: operation.subject.endswith(f"MSG.NEXT.{STREAM_REQUESTS}.high"))
    waiting = asyncio.create_task(pulling.wait(["high", "low"], keep=True))
    await pulls_standing(pulling.bus, "low")
    await publish(pulling.bus, "a", "low")
    assert (await waiting).consumer == "low"
    losing.meets(None)
    assert pulling.puller.stands_on("high")
    before = losing.clock._monotonic
    losing.clock._monotonic = lambda: before() + pulling.puller.stands_s + 10
    assert not pulling.puller.stands_on("high")
    waiting = asyncio.create_task(pulling.wait(["high", "low"], keep=True))
    await publish(pulling.bus, "b", "high")
    assert (await waiting).consumer == "high"


async def test_a_request_without_a_body_that_looks_like_a_status_is_delivered(pulling):
    await pulling.bus.store("llm.request.high", b"", headers={MSG_ID: "a", "Status": "404"})
    assert (await taken(pulling, "high")).message.headers[MSG_ID] == "a"


@pytest.mark.parametrize(
    "headers", [b"NATS/1.0", b"NATS/1.0\r\n", b"NATS/1.0 \xff\xfe\xfd\r\n\r\n", b"garbage\r\n\r\n"]
)
async def test_headers_that_cannot_be_read_cut_nobody_off(pulling, nats_server, headers):
    with socket.create_connection(("127.0.0.1", nats_server.port), timeout=5) as raw:
        raw.sendall(b'CONNECT {"headers":true,"verbose":false}\r\n')
        raw.sendall(
            b"HPUB llm.request.high %d %d\r\n" % (len(headers), len(headers) + 5) + headers + b"hello\r\nPING\r\n"
        )
        while not raw.recv(4096).endswith(b"PONG\r\n"):
            pass
    delivery = await eventually(pulling.take)
    assert delivery.message.data == b"hello"
    await publish(pulling.bus, "next")
    assert (await taken(pulling, "high")).message.headers[MSG_ID] == "next"


@pytest.mark.parametrize("how", ["take", "wait"])
async def test_cancelling_at_any_moment_loses_no_request(connect, bus, how):
    pulling = await connect()
    for turns in range(25):
        if how == "take":
            await publish(bus, f"r{turns}")
            pull = asyncio.create_task(pulling.take())
        else:
            pull = asyncio.create_task(pulling.wait())
            await pulls_standing(bus, "high")
            await publish(bus, f"r{turns}")
        for _ in range(turns):
            await asyncio.sleep(0)
        pull.cancel()
        await asyncio.wait({pull})
        found = pull.result() if not pull.cancelled() else None
        if found is None:
            # Either it came after all, or nobody has it and anybody can get it.
            found = await eventually(lambda: pulling.surplus or pulling.take(), what="the request")
        delivery = found[0] if isinstance(found, list) else found
        assert delivery.message.headers[MSG_ID] == f"r{turns}"
        await delivery.ack()
        pulling.surplus.clear()
        await pulling.puller.close()
        await pulling.puller.start()
    await eventually(lambda: _all_done(bus))


async def test_a_request_that_has_come_is_surplus_when_the_pull_is_cancelled_in_the_same_turn(pulling):
    waiting = asyncio.create_task(pulling.wait())
    await pulls_standing(pulling.bus, "high")
    standing = pulling.bus.nc._subs[max(pulling.bus.nc._subs)]
    settle = standing._cb

    async def cancel_as_it_comes(message):
        await settle(message)
        waiting.cancel()

    standing._cb = cancel_as_it_comes
    await publish(pulling.bus, "a")
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await pulling.puller.close()
    assert [one.message.headers[MSG_ID] for one in pulling.surplus] == ["a"]


async def test_wait_ends_without_a_request_when_there_is_a_reason_to(pulling):
    no_room = asyncio.Event()
    waiting = asyncio.create_task(pulling.wait(unless=no_room.wait()))
    await pulls_standing(pulling.bus, "high")
    no_room.set()
    assert await waiting is None
    await pulls_standing(pulling.bus, "high", stands=False)


async def test_wait_ends_when_its_consumer_is_deleted(pulling):
    waiting = asyncio.create_task(pulling.wait())
    await pulls_standing(pulling.bus, "high")
    await pulling.bus.js.delete_consumer(STREAM_REQUESTS, "high")
    assert await waiting is None
    # The other lanes are served as before, once their pulls are gone.
    await pulls_standing(pulling.bus, "low", stands=False)
    await publish(pulling.bus, "a", "low")
    assert (await taken(pulling, "low")).message.headers[MSG_ID] == "a"


async def test_pulls_are_armed_again_after_the_broker_was_killed(pulling, nats_server):
    waiting = asyncio.create_task(pulling.wait())
    await pulls_standing(pulling.bus, "high")
    nats_server.kill()
    nats_server.start()
    assert await waiting is None
    waiting = asyncio.create_task(pulling.wait())
    await publish(pulling.bus, "a")
    assert (await waiting).message.headers[MSG_ID] == "a"


async def test_nothing_is_held_by_pulls_that_stand(pulling):
    waiting = asyncio.create_task(pulling.wait(["high"]))
    await pulls_standing(pulling.bus, "high")
    for number in range(10):
        await publish(pulling.bus, f"r{number}")
    await waiting
    await pulling.puller.close()
    assert await held_by_somebody(pulling.bus) == 1 + len(pulling.surplus) == 1


@pytest.mark.parametrize("how", ["take", "wait"])
async def test_a_pull_that_the_broker_never_answers_is_given_up(bus, caplog, how):
    process = Process(bus)
    process.meets("loses", lambda operation: operation.subject.startswith("$JS.API.CONSUMER.MSG.NEXT."))
    pulling = Pulling(process, stands_s=0.1)
    await pulling.puller.start()
    # Within what every wait of these tests allows, and no longer than that.
    async with asyncio.timeout(TIMEOUT_S):
        assert await getattr(pulling, how)() is None
    assert not pulling.puller.refused
    assert ("has not answered pulls" in caplog.text) is (how == "wait")
    await pulling.puller.close()


# ---- several at once


async def test_gather_takes_so_many_of_each_lane_and_tells_which_had_fewer(pulling):
    for number in range(3):
        await publish(pulling.bus, f"high-{number}", "high")
        await publish(pulling.bus, f"low-{number}", "low")
    await eventually(lambda: waiting_in(pulling.bus, "low", 3))
    found = []
    empty = await pulling.puller.gather({"high": 2, "low": 5, "medium": 4}, found.append)
    assert sorted(one.message.headers[MSG_ID] for one in found) == ["high-0", "high-1", "low-0", "low-1", "low-2"]
    assert empty == {"low", "medium"}
    assert await held_by_somebody(pulling.bus) == 5


async def test_what_comes_after_a_gathering_was_cancelled_is_surplus(pulling):
    await publish(pulling.bus, "a")
    await eventually(lambda: waiting_in(pulling.bus, "high", 1))
    found = []
    gathering = asyncio.create_task(pulling.puller.gather({"high": 8}, found.append))
    await asyncio.sleep(0)
    gathering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gathering
    await eventually(lambda: pulling.surplus)
    assert found == []
    assert pulling.surplus[0].message.headers[MSG_ID] == "a"


async def test_gather_from_a_consumer_that_is_gone_finds_nothing_and_the_others_answer(pulling):
    await pulling.bus.js.delete_consumer(STREAM_REQUESTS, "high")
    await publish(pulling.bus, "a", "low")
    await eventually(lambda: waiting_in(pulling.bus, "low", 1))
    found = []
    assert "high" in await pulling.puller.gather({"high": 2, "low": 1}, found.append)
    assert [one.message.headers[MSG_ID] for one in found] == ["a"]
    assert pulling.puller.refused


async def test_of_two_who_gather_at_once_each_request_goes_to_one(connect, bus):
    first, second = await connect(), await connect()
    for number in range(40):
        await publish(bus, f"r{number}")
    found = []
    while len(found) < 40:
        await asyncio.gather(*(one.puller.gather({"high": 7}, found.append) for one in (first, second)))
        while first.surplus or second.surplus:
            found.append((first.surplus or second.surplus).pop())
    assert sorted(one.sequence for one in found) == list(range(1, 41))
    assert {one.delivered for one in found} == {1}
