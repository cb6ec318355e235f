"""Notes on the use of requests: what is done if the broker does not take one."""

from __future__ import annotations

import pytest

from pipeline.broker.connection import Unreachable
from pipeline.broker.jetstream import Bus
from pipeline.broker.usage import NoteFeed, store_note
from pipeline.wire.subjects import STREAM_USED, USED, Priority
from pipeline.wire.usage import UsageNote
from tests.waiting import eventually

NOTE = UsageNote("a", "done", Priority.LOW, "acme", "alice", prompt=3, completion=4)


async def test_a_note_that_the_broker_does_not_take_is_logged_and_delays_no_further_request(
    bus: Bus, caplog, monkeypatch
):
    monkeypatch.setattr("pipeline.broker.usage._PATIENCE_S", 0.0)
    await bus.js.delete_stream(STREAM_USED)
    heard = []

    async def note(message) -> None:
        heard.append(message)

    await bus.subscribe(USED, note)
    for _ in range(3):
        await store_note(bus, NOTE, 1000)
    assert caplog.text.count("was not stored") == 1
    await eventually(lambda: len(heard) >= 2, what="the notes are sent all the same")


async def test_a_request_is_not_acknowledged_while_the_broker_is_away(nats_server, monkeypatch):
    monkeypatch.setattr("pipeline.broker.usage._PATIENCE_S", 0.0)
    async with Bus.connect(nats_server.url, name="test") as bus:
        nats_server.kill()
        await eventually(lambda: not bus.is_connected, what="the connection is lost")
        with pytest.raises(Unreachable):
            await store_note(bus, NOTE, 1000)


async def test_what_is_no_note_is_passed_over(bus: Bus):
    for foreign in (b"no note", '{"object": "headrace.used", "id": "é"}'.encode("latin-1")):
        await bus.store(USED, foreign)
    await store_note(bus, NOTE, 1000)
    assert [stored.notes async for stored in NoteFeed(bus).after(0)] == [{}, {}, {"a@1000": NOTE}]


async def test_the_first_note_since_a_time_is_found(bus: Bus):
    feed = NoteFeed(bus)
    assert await feed.first_since(0.0) is None
    await store_note(bus, NOTE, 1000)
    await store_note(bus, NOTE, 1001)
    (first, second) = [stored async for stored in feed.after(0)]
    assert (first.sequence, first.notes) == (1, {"a@1000": NOTE})
    assert await feed.first_since(0.0) == 1
    assert await feed.first_since(second.at) == 2
    assert await feed.first_since(second.at + 60) is None
