"""The headers of a long stream, as they are read elsewhere, at a fraction of the cost."""

from __future__ import annotations

import pytest

from pipeline.broker.bulk import read_heads, to_head
from pipeline.broker.connection import Unreachable
from pipeline.broker.jetstream import Bus, to_stored
from pipeline.wire.subjects import MSG_ID, STREAM_REQUESTS
from tests.support import NatsServer


async def store(bus: Bus, count: int) -> None:
    for number in range(count):
        headers = {MSG_ID: f"r{number}", "Llm-Timeout": "30", "traceparent": "00-a-b-01"}
        await bus.store("llm.request.low", b"x" * 100, headers=headers)


async def test_heads_are_the_messages_without_their_bodies(bus: Bus):
    await store(bus, 5)
    await bus.delete(STREAM_REQUESTS, 3)
    whole = [to_stored(message) async for message in bus.scan(STREAM_REQUESTS, ">")]
    heads = [to_head(head) for head in await read_heads(bus, STREAM_REQUESTS, 2)]
    assert [head.sequence for head in heads] == [2, 4, 5]
    for head, message in zip(heads, whole[1:], strict=True):
        assert (head.subject, head.stored_at, head.data) == (message.subject, message.stored_at, b"")
        own = {name: value for name, value in message.headers.items() if name != "Nats-Num-Pending"}
        assert own.items() <= head.headers.items() | {("Nats-Last-Sequence", own["Nats-Last-Sequence"])}


async def test_a_batch_is_bounded_in_messages_and_in_bytes(bus: Bus):
    await store(bus, 6)
    assert len(await read_heads(bus, STREAM_REQUESTS, 1, messages=4)) == 4
    assert len(await read_heads(bus, STREAM_REQUESTS, 1, max_bytes=300)) < 3
    assert len(await read_heads(bus, STREAM_REQUESTS, 6)) == 1
    assert await read_heads(bus, STREAM_REQUESTS, 7) == []


async def test_an_empty_stream_has_no_heads_and_one_that_is_not_there_is_unreachable(bus: Bus):
    assert await read_heads(bus, STREAM_REQUESTS, 1) == []
    with pytest.raises(Unreachable, match="NOWHERE does not answer"):
        await read_heads(bus, "NOWHERE", 1)


async def test_nothing_is_left_of_a_read_when_it_is_over(bus: Bus):
    await store(bus, 2)
    before = len(bus.nc._subs)
    for _ in range(3):
        await read_heads(bus, STREAM_REQUESTS, 1)
    assert (len(bus.nc._subs), bus.nc.takers) == (before, {})


async def test_other_messages_of_the_connection_are_received_as_ever(bus: Bus):
    heard = []

    async def on_message(message):
        heard.append((message.data, dict(message.headers)))

    await bus.subscribe("here", on_message)
    await store(bus, 3)
    await bus.publish("here", b"1", headers={"a": "b"})
    await read_heads(bus, STREAM_REQUESTS, 1)
    await bus.publish("here", b"2")
    await bus.nc.flush()
    await bus.request("$JS.API.INFO")
    assert heard == [(b"1", {"a": "b"}), (b"2", {})]


@pytest.mark.parametrize(
    "own",
    [
        pytest.param(b"NATS/1.0", id="no end of line"),
        pytest.param(b"NATS/1.0\r\nnonsense\r\n", id="no colon"),
        pytest.param(b"NATS/1.0\r\nName:\xff\xfe\r\n", id="not UTF-8"),
        pytest.param(b"NATS/1.0\r\n:\r\n", id="no name"),
    ],
)
def test_what_a_publisher_wrote_hides_nothing_that_the_broker_wrote(own: bytes):
    brokers = (
        b"Nats-Stream: LLM\r\nNats-Subject: llm.request.high\r\nNats-Sequence: 7\r\n"
        b"Nats-Time-Stamp: 2026-11-26T04:49:21.073641546Z\r\n\r\n"
    )
    head = to_head(own + brokers)
    assert (head.subject, head.sequence) == ("llm.request.high", 7)


def test_spaces_around_names_and_values_do_not_count():
    head = to_head(
        b"NATS/1.0\r\n Llm-Timeout :  30 \r\nNats-Subject: s\r\nNats-Sequence: 1\r\n"
        b"Nats-Time-Stamp: 1970-01-01T00:00:01Z\r\n\r\n"
    )
    assert (head.headers["Llm-Timeout"], head.stored_at) == ("30", 1.0)


def test_a_head_without_the_brokers_headers_is_refused():
    with pytest.raises(KeyError):
        to_head(b"NATS/1.0\r\na: b\r\n\r\n")


async def test_a_broker_that_is_gone_is_unreachable(bus: Bus, nats_server: NatsServer):
    nats_server.kill()
    with pytest.raises(Unreachable):
        await read_heads(bus, STREAM_REQUESTS, 1)
