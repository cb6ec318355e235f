"""A burst of requests is begun and stored by urgency, and its connections are accepted together."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack
from functools import partial

from pipeline.config import Config
from pipeline.gateway.server import Acceptor
from pipeline.gateway.turns import PER_TURN, Beginnings, Turns
from pipeline.process.listening import bind
from pipeline.wire.subjects import Priority
from tests.waiting import eventually

HIGH, LOW = Priority.HIGH, Priority.LOW


async def test_the_most_urgent_waiting_request_gets_the_next_turn():
    turns, order, goes_on = Turns(at_once=1), [], asyncio.Event()

    async def one(name: str, priority: Priority) -> None:
        async with turns.turn(priority):
            order.append(name)
            await goes_on.wait()

    tasks = [asyncio.create_task(one(*each)) for each in (("first", LOW), ("low", LOW), ("high", HIGH))]
    await eventually(lambda: order == ["first"])
    goes_on.set()
    await asyncio.gather(*tasks)
    assert order == ["first", "high", "low"]


async def test_a_request_that_is_cancelled_loses_no_turn():
    turns, order = Turns(at_once=1), []

    async def one(name: str) -> None:
        async with turns.turn(HIGH):
            order.append(name)

    first = turns.turn(LOW)
    await first.__aenter__()
    waits, given, last = (asyncio.create_task(one(name)) for name in ("waits", "given", "last"))
    await asyncio.sleep(0)
    waits.cancel()
    await asyncio.wait([waits])
    await first.__aexit__(None, None, None)
    given.cancel()  # it has the turn, and has not run since
    await asyncio.wait([given, last])
    await asyncio.wait_for(one("after"), 30)
    assert order == ["last", "after"]


async def test_requests_begin_by_urgency_a_few_in_each_turn_of_the_loop():
    beginnings, begun = Beginnings(), []
    for number in range(2 * PER_TURN):
        beginnings.add(LOW, partial(begun.append, f"low {number}"))
    assert begun == [f"low {number}" for number in range(PER_TURN)], "the first ones wait for nothing"
    beginnings.add(HIGH, partial(begun.append, "high"))
    await eventually(lambda: len(begun) == 2 * PER_TURN + 1)
    assert begun[PER_TURN] == "high"
    beginnings.add(LOW, partial(begun.append, "later"))
    assert begun[-1] == "later"


async def test_connections_that_wait_are_accepted_together():
    made: list[asyncio.BaseTransport] = []

    class Counts(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            made.append(transport)

    with ExitStack() as stack:
        listening = stack.enter_context(bind(Config(state_dir="x", http_port=0)))
        for _ in range(100):
            stack.enter_context(socket.create_connection(listening.getsockname()))
        acceptor = Acceptor(listening, Counts)
        for _ in range(10):  # turns of the event loop, far fewer than connections
            await asyncio.sleep(0)
        assert len(made) == 100
        acceptor.close()
        acceptor.close()
        assert listening.fileno() < 0
        for transport in made:
            transport.close()
