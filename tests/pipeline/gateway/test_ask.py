"""One core request, one answer, whatever happens to it."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from pipeline.broker import topology
from pipeline.broker.asker import Asker
from pipeline.gateway.ask import Ask
from pipeline.process.role import role
from pipeline.wire.answers import ErrorAnswer, ErrorBody, decode_answer
from pipeline.wire.messages import Load, PerPriority, PerPriorityCount, Slots, encode
from pipeline.wire.subjects import MSG_ID, REPLY_TO, STREAM_REQUESTS
from tests.waiting import TIMEOUT_S, eventually


@pytest.fixture
async def asking(config, bus):
    async with role("gateway", config) as me:
        await Ask(me.bus, me.tracing, Asker(me.bus, me.tracing), me.peers, 2).start()
        await me.bus.nc.flush()
        yield me


async def queued(bus):
    return [message async for message in bus.scan(STREAM_REQUESTS, ">")]


async def test_a_question_is_queued_with_the_way_back(bus, asking):
    waiting = asyncio.create_task(bus.request("llm.ask.low", b"Why is the sky blue?", timeout_s=TIMEOUT_S))
    (message,) = await eventually(lambda: queued(bus))
    stored = await bus.stored(STREAM_REQUESTS, 1)
    assert (stored.subject, stored.data) == ("llm.request.low", b"Why is the sky blue?")
    assert message.headers[MSG_ID]
    # Whoever answers at the reply subject answers the asker.
    await bus.publish(message.headers[REPLY_TO], b"Because.")
    assert (await waiting).data == b"Because."


async def test_the_askers_headers_go_along_but_not_its_reply_to(bus, asking):
    headers = {MSG_ID: "mine", "Llm-Timeout": "5", REPLY_TO: "llm.reply.somebody"}
    waiting = asyncio.create_task(bus.request("llm.ask.high", b"x", headers=headers, timeout_s=TIMEOUT_S))
    (message,) = await eventually(lambda: queued(bus))
    assert (message.headers[MSG_ID], message.headers["Llm-Timeout"]) == ("mine", "5")
    assert message.headers[REPLY_TO].startswith("_INBOX.")
    waiting.cancel()


async def test_an_unknown_priority_is_told_at_once(bus, asking):
    answer = decode_answer((await bus.request("llm.ask.urgent", b"x", timeout_s=TIMEOUT_S)).data)
    assert isinstance(answer, ErrorAnswer)
    assert answer.error.code == "invalid_request"
    assert await queued(bus) == []


async def test_a_full_lane_is_told_at_once(bus, config, asking):
    await topology.apply(bus.js, msgspec.structs.replace(config, lane_max_messages=1))
    await bus.store("llm.request.high", b"x", headers={MSG_ID: "first"})
    answer = decode_answer((await bus.request("llm.ask.high", b"x", timeout_s=TIMEOUT_S)).data)
    assert answer.error.code == "queue_full"
    assert answer.error.retryable


async def test_a_tenant_is_told_when_all_tenants_together_have_the_most(bus, asking):
    load = Load("mlx", "saturated", 1.0, PerPriority(), PerPriorityCount(high=3), Slots(8, 8), 1.0, "", 0.0)
    load.queued_tenants = PerPriorityCount(high=2)
    await bus.publish("llm.load.mlx", encode(load))
    await eventually(lambda: asking.peers.load("mlx"))
    answer = decode_answer((await bus.request("llm.ask.high.t.ann", b"x", timeout_s=TIMEOUT_S)).data)
    assert answer.error.code == "queue_full"
    assert "tenants_max_messages" in answer.error.message
    for subject in ("llm.ask.high", "llm.ask.low.t.ann"):
        await bus.publish(subject, b"x", reply="_INBOX.other")
    await eventually(lambda: queued(bus))
    subjects = {message.headers["Nats-Subject"] for message in await eventually(lambda: both(bus))}
    assert subjects == {"llm.request.high", "llm.request.low.t.ann"}


async def both(bus):
    found = await queued(bus)
    return found if len(found) == 2 else None


async def test_what_the_broker_refuses_is_told_at_once(bus, asking):
    headers = {"Nats-Expected-Stream": "OTHER"}
    answer = decode_answer((await bus.request("llm.ask.high", b"x", headers=headers, timeout_s=TIMEOUT_S)).data)
    assert answer.error.code == "unavailable"


async def test_who_asks_again_under_the_same_id_gets_the_same_answer(bus, asking):
    headers = {MSG_ID: "mine"}
    first = await bus.subscribe("_INBOX.first", _ignore)
    await bus.publish("llm.ask.high", b"x", headers=headers, reply="_INBOX.first")
    await eventually(lambda: queued(bus))
    again = [
        asyncio.create_task(bus.request("llm.ask.high", b"x", headers=headers, timeout_s=TIMEOUT_S)) for _ in range(2)
    ]
    cancelled = ErrorAnswer("mine", 1, ErrorBody("cancelled", "over", "cancelled_error", None, retryable=False))
    await bus.store("llm.out.mine", encode(cancelled), expected_last=0)
    late = await bus.request("llm.ask.high", b"x", headers=headers, timeout_s=TIMEOUT_S)
    for answer in (*await asyncio.gather(*again), late):
        assert decode_answer(answer.data) == cancelled
    assert len(await queued(bus)) == 1
    await bus.unsubscribe(first)


async def test_two_tenants_that_ask_under_the_same_id_ask_for_two_requests(bus, asking):
    for subject in ("llm.ask.high", "llm.ask.high.t.ann", "llm.ask.high.t.bob"):
        await bus.publish(subject, b"x", headers={MSG_ID: "job-7"}, reply="_INBOX.other")
    await eventually(lambda: stored_ids(bus, 3))
    assert await stored_ids(bus, 3) == {"job-7", "t.ann.job-7", "t.bob.job-7"}


@pytest.mark.parametrize(
    ("subject", "bad"),
    [("llm.ask.high.t.ann", "t.bob.job-7"), ("llm.ask.high", "t.bob.job-7"), ("llm.ask.high", "LLM-1")],
)
async def test_a_second_request_under_an_id_that_is_not_valid_is_refused_as_well(bus, asking, subject, bad):
    await bus.store("llm.request.high.t.bob", b"x", headers={MSG_ID: bad})
    answer = decode_answer((await bus.request(subject, b"x", headers={MSG_ID: bad}, timeout_s=TIMEOUT_S)).data)
    assert (answer.error.code, answer.error.param) == ("invalid_request", MSG_ID)
    assert len(await queued(bus)) == 1


async def stored_ids(bus, count):
    found = [message.headers[MSG_ID] for message in await queued(bus)]
    return set(found) if len(found) == count else None


async def _ignore(_):
    pass


async def test_a_question_without_a_way_back_is_not_queued(bus, asking):
    await bus.publish("llm.ask.high", b"x")
    # Handled in their order, so the first is behind us when the second is answered.
    await bus.request("llm.ask.urgent", b"x", timeout_s=TIMEOUT_S)
    assert await queued(bus) == []


async def test_two_gateways_queue_each_question_once(bus, config, asking):
    async with role("gateway2", config) as me:
        await Ask(me.bus, me.tracing, Asker(me.bus, me.tracing), me.peers, 2).start()
        await me.bus.nc.flush()
        for number in range(20):
            await bus.publish("llm.ask.high", b"x", reply=f"_INBOX.me.{number}")

        async def all_there():
            return len(await queued(bus)) >= 20

        await eventually(all_there)
        assert sorted(m.headers[REPLY_TO] for m in await queued(bus)) == sorted(f"_INBOX.me.{n}" for n in range(20))
