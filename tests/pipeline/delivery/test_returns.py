"""Each returned delivery is counted, also if two processes note it at once or the broker dies."""

from __future__ import annotations

import asyncio

from pipeline.broker.connection import BusError
from pipeline.delivery.puller import Puller
from pipeline.delivery.returns import OwedReturns, note_return, times_returned
from pipeline.wire.subjects import MSG_ID, STREAM_REQUESTS
from tests.faults import Process
from tests.waiting import eventually, taken


async def delivered(bus, request_id="a"):
    await bus.store("llm.request.high", b"x", headers={MSG_ID: request_id})

    async def nothing(_):
        raise AssertionError

    puller = Puller(bus, STREAM_REQUESTS, nothing, 30.0)
    await puller.start()
    return await taken(puller, "high")


async def test_each_return_is_counted(bus):
    delivery = await delivered(bus)
    for times in range(4):
        assert await times_returned(bus, delivery) == times
        await note_return(bus, delivery)
    assert await times_returned(bus, delivery) == 4


async def test_the_same_request_stored_again_begins_with_no_returns(bus):
    for move in ("", ":spilled:1"):
        delivery = await delivered(bus, f"a{move}")
        assert await times_returned(bus, delivery) == 0
        await note_return(bus, delivery)
        await delivery.ack()


async def test_returns_are_remembered_by_a_broker_that_was_killed(bus, nats_server):
    delivery = await delivered(bus)
    await note_return(bus, delivery)
    again = asyncio.Event()
    bus.on_reconnect(again.set)
    nats_server.kill()
    nats_server.start()
    await again.wait()
    assert await times_returned(bus, delivery) == 1


async def test_two_processes_that_note_the_same_message_at_once_are_both_counted(bus):
    """One of them has read the count before the other writes it."""
    delivery = await delivered(bus)
    slow = Process(bus)
    slow.meets("freezes", lambda operation: operation.subject.startswith("llm.returned."))
    noting = asyncio.create_task(note_return(slow, delivery))
    await eventually(lambda: slow.struck)
    await note_return(bus, delivery)
    slow.thaw()
    await noting
    assert await times_returned(bus, delivery) == 2


async def test_a_return_that_the_broker_does_not_store_is_counted_here_and_noted_once_it_does(bus):
    """While the broker's disk is full, each failed write ends a delivery, and none of them is an attempt."""
    delivery = await delivered(bus)
    broken = Process(bus)
    refused = asyncio.Event()

    async def refuse(subject, data=b"", **more):
        if subject.startswith("llm.returned."):
            refused.set()
            raise BusError("no space left on device")
        return await bus.request(subject, data, **more)

    broken.request = refuse
    owed = OwedReturns()
    owed.owe(broken, delivery)
    await refused.wait()
    assert owed.count(delivery) == 1
    assert await times_returned(bus, delivery) == 0
    del broken.request
    await eventually(lambda: owed.count(delivery) == 0)
    assert await times_returned(bus, delivery) == 1
