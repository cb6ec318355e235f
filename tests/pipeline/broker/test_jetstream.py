"""What is said of a message is true: stored once, refused for the reason given, read as it stands."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec
import pytest
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from pipeline.broker import connection, topology
from pipeline.broker.connection import BusError, Message, ServiceFailed, Unreachable
from pipeline.broker.jetstream import Bus, Fenced, LaneFull, read_failure
from pipeline.wire.answers import ErrorAnswer, ErrorBody
from pipeline.wire.messages import StoreFailure, encode
from pipeline.wire.subjects import MSG_ID, STORE_FAILED, STREAM_REPLIES, STREAM_REQUESTS
from tests.faults import Process
from tests.waiting import TIMEOUT_S, eventually


def answer(number, request_id="r1"):
    return ErrorAnswer(request_id, 1, ErrorBody("cancelled", str(number), "cancelled_error", None, retryable=False))


async def write(bus, number, expected_last, request_id="r1"):
    return await bus.store(f"llm.out.{request_id}", encode(answer(number, request_id)), expected_last=expected_last)


async def test_the_same_message_id_is_stored_once(bus):
    first = await bus.store("llm.request.high", b"x", headers={MSG_ID: "a"})
    assert await bus.store("llm.request.high", b"y", headers={MSG_ID: "a"}) == first
    assert (await bus.stream_state(STREAM_REQUESTS)).messages == 1


async def test_a_write_is_refused_where_somebody_else_has_written(bus):
    first = await write(bus, 0, 0)
    with pytest.raises(Fenced):
        await write(bus, 1, 0)
    await write(bus, 1, first)


async def test_a_reader_never_sees_a_refused_message(bus, nats_server):
    async with Bus.connect(nats_server.url, name="reader") as reader:
        seen = []

        async def on_message(message):
            seen.append(message.data)

        await reader.subscribe("llm.reply.r1", on_message)
        await reader.nc.flush()
        last = 0
        for number in range(20):
            with pytest.raises(Fenced):
                await write(bus, f"refused {number}", last + 1000)
            last = await write(bus, number, last)
        await eventually(lambda: len(seen) >= 20)
        assert seen == [encode(answer(number)) for number in range(20)]


async def test_what_is_flushed_has_reached_the_broker(bus, nats_server):
    async with Bus.connect(nats_server.url, name="listener") as listener:
        for number in range(100):

            async def on_message(message):
                await listener.publish(message.reply, message.data)

            subscription = await listener.subscribe(f"question.{number}", on_message)
            await listener.nc.flush()
            assert (await bus.request(f"question.{number}", b"x")).data == b"x"
            await listener.drain(subscription)
            with pytest.raises(Unreachable, match="no responders"):
                await bus.request(f"question.{number}", b"x")


async def test_a_publish_waits_for_a_broker_that_is_killed_and_comes_back(bus, nats_server):
    nats_server.kill()
    storing = asyncio.create_task(bus.store("llm.request.high", b"x", headers={MSG_ID: "a"}))
    again = asyncio.create_task(bus.store("llm.request.low", b"x", headers={MSG_ID: "b"}))
    await asyncio.sleep(0)
    assert not storing.done()
    nats_server.start()
    await storing
    await again
    assert (await bus.stream_state(STREAM_REQUESTS)).messages == 2


async def test_a_broker_that_does_not_come_back_in_time_is_unreachable(bus, nats_server):
    nats_server.kill()
    with pytest.raises(Unreachable):
        await bus.store("llm.request.high", b"x", headers={MSG_ID: "a"}, patience_s=0.1)


async def test_nobody_there_is_unreachable_at_the_first_try(nats_server, monkeypatch):
    monkeypatch.setattr(connection, "_CONNECT_PATIENCE_S", 0.3)
    nats_server.stop()
    with pytest.raises(Unreachable) as error:
        async with Bus.connect(f"nats://me:secret@127.0.0.1:{nats_server.port}", name="test"):
            pass
    assert "secret" not in str(error.value)


async def test_other_refusals_say_why(bus):
    with pytest.raises(BusError, match="expected stream") as refused:
        await bus.store("llm.request.high", b"x", headers={"Nats-Expected-Stream": "OTHER"})
    assert not isinstance(refused.value, Unreachable | Fenced | LaneFull)


async def test_a_subject_no_stream_takes_is_unreachable(bus):
    with pytest.raises(Unreachable):
        await bus.store("llm.elsewhere", b"x", patience_s=0.0)


@pytest.mark.parametrize("count", [0, 1, 499, 500, 501, 1203])
async def test_all_answers_of_a_subject_are_read_in_their_order(bus, count):
    last = 0
    for number in range(count):
        last = await write(bus, number, last)
    await write(bus, "other", 0, "r2")
    read = await bus.read_answers("llm.reply.r1")
    assert [message for _, message in read] == [answer(number) for number in range(count)]
    assert [sequence for sequence, _ in read] == sorted({sequence for sequence, _ in read})


async def test_scan_sees_the_messages_of_all_lanes_with_their_places(bus):
    for lane in ("high", "low.simple"):
        await bus.store(f"llm.request.{lane}", b"", headers={MSG_ID: lane.replace(".", "-"), "Status": "404"})
    found = [(m.headers["Nats-Subject"], m.headers["Nats-Sequence"]) async for m in bus.scan(STREAM_REQUESTS, ">")]
    assert found == [("llm.request.high", "1"), ("llm.request.low.simple", "2")]


async def test_scan_of_a_stream_that_is_not_there_is_no_empty_stream(bus):
    with pytest.raises(Unreachable):
        [m async for m in bus.scan("NO_SUCH_STREAM", ">")]


async def test_a_message_without_data_that_looks_like_a_status_is_found(bus):
    sequence = await bus.store("llm.request.high", b"", headers={MSG_ID: "a", "Status": "404"})
    assert (await bus.stored(STREAM_REQUESTS, sequence)).headers[MSG_ID] == "a"
    assert await bus.last_message(STREAM_REQUESTS, "llm.request.high") == (sequence, b"")


async def test_one_message_can_be_found_and_deleted_and_is_then_gone(bus):
    sequence = await bus.store("llm.request.high", b"hello", headers={MSG_ID: "a"})
    found = await bus.stored(STREAM_REQUESTS, sequence)
    assert (found.subject, found.sequence, found.data) == ("llm.request.high", sequence, b"hello")
    assert await bus.delete(STREAM_REQUESTS, sequence)
    assert not await bus.delete(STREAM_REQUESTS, sequence)
    assert await bus.stored(STREAM_REQUESTS, sequence) is None
    assert await bus.stored(STREAM_REQUESTS, 10**9) is None


async def test_the_last_message_of_a_subject(bus):
    assert await bus.last_message(STREAM_REPLIES, "llm.reply.r1") is None
    last = 0
    for number in range(3):
        last = await write(bus, number, last)
    assert await bus.last_message(STREAM_REPLIES, "llm.reply.r1") == (last, encode(answer(2)))


async def test_a_purge_spares_what_came_later_and_other_subjects(bus):
    first = await write(bus, 0, 0)
    await write(bus, 0, 0, "r2")
    await write(bus, 1, first)
    await bus.purge(STREAM_REPLIES, "llm.reply.r1", up_to=first)
    assert [message for _, message in await bus.read_answers("llm.reply.r1")] == [answer(1)]
    assert len(await bus.read_answers("llm.reply.r2")) == 1


async def test_a_delivery_says_which_one_it_is(bus):
    await bus.store("llm.request.low.complex", b"x", headers={MSG_ID: "r1"})
    stored_at = (await bus.stored(STREAM_REQUESTS, 1)).stored_at
    handed_over = asyncio.Queue()
    await bus.subscribe("_INBOX.pull", handed_over.put)
    subject = f"$JS.API.CONSUMER.MSG.NEXT.{STREAM_REQUESTS}.low_complex"
    await bus.publish(subject, b"", reply="_INBOX.pull")
    first = bus.delivery(await handed_over.get())
    assert (first.consumer, first.sequence, first.delivered, first.pending) == ("low_complex", 1, 1, 0)
    assert first.stored_at == pytest.approx(stored_at, abs=1e-3)
    await first.nak()
    await bus.publish(subject, b"", reply="_INBOX.pull")
    again = bus.delivery(await handed_over.get())
    assert (again.sequence, again.delivered) == (1, 2)
    await again.in_progress()
    await again.ack()

    async def gone():
        return await bus.stored(STREAM_REQUESTS, 1) is None

    await eventually(gone)


async def test_services_are_listed_and_answer_and_fail_with_a_code(bus, nats_server):
    async def echo(_, body):
        return body[::-1]

    async def broken(_, __):
        raise RuntimeError("a secret")

    async def away(_, __):
        raise Unreachable("the broker is away")

    async with Bus.connect(nats_server.url, name="service") as serving:
        await serving.serve("test-service", "for the test", {"t.echo": echo, "t.broken": broken, "t.away": away})
        await serving.nc.flush()
        assert (await bus.request("t.echo", b"abc")).data == b"cba"
        with pytest.raises(ServiceFailed, match=r"^The service t\.broken failed: RuntimeError$"):
            await bus.request("t.broken")
        with pytest.raises(ServiceFailed, match=r"^The service t\.away failed: the broker is away$"):
            await bus.request("t.away")
        codes = [
            (await bus.nc.request(subject)).headers["Nats-Service-Error-Code"] for subject in ("t.broken", "t.away")
        ]
        assert codes == ["500", "503"]
        assert (await bus.request("t.echo", b"again")).data == b"niaga"
        info = msgspec.json.decode((await bus.request("$SRV.INFO.test-service")).data)
        assert {endpoint["subject"] for endpoint in info["endpoints"]} == {"t.echo", "t.broken", "t.away"}


async def test_nobody_listening_is_unreachable(bus):
    with pytest.raises(Unreachable):
        await bus.request("nobody.there")


async def test_a_handler_that_fails_goes_on_with_the_next_message(bus):
    seen = []

    async def on_message(message):
        seen.append(message.data)
        if message.data == b"bad":
            raise RuntimeError

    await bus.subscribe("t.handler", on_message)
    for data in (b"bad", b"good"):
        await bus.publish("t.handler", data)
    await eventually(lambda: seen == [b"bad", b"good"])


async def test_a_cancellation_that_comes_with_the_answer_is_not_lost(bus):
    for turns in range(20):
        asking = asyncio.create_task(_ask_and_stay(bus))
        for _ in range(turns):
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait({asking}, timeout=TIMEOUT_S)
        assert asking.cancelled()


async def _ask_and_stay(bus):
    await bus.stream_state(STREAM_REQUESTS)
    await asyncio.Event().wait()


async def test_a_cancellation_that_comes_with_a_read_message_is_not_lost(bus, monkeypatch):
    waits = asyncio.Event()

    async def swallowed(*_):
        waits.set()
        # As `asyncio.wait_for` before Python 3.12, if the message is there at the same moment.
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return Msg(bus.nc, headers={"Status": "404"})

    monkeypatch.setattr(Subscription, "next_msg", swallowed)
    reading = asyncio.create_task(_read_and_stay(bus))
    await waits.wait()
    reading.cancel()
    await asyncio.wait({reading}, timeout=TIMEOUT_S)
    assert reading.cancelled()


async def _read_and_stay(bus):
    await bus.batch(STREAM_REQUESTS, "llm.request.>", 1)
    await asyncio.Event().wait()


async def test_whoever_asked_hears_that_the_connection_is_back(bus, nats_server):
    back = asyncio.Event()
    bus.on_reconnect(back.set)
    nats_server.kill()
    nats_server.start()
    await asyncio.wait_for(back.wait(), TIMEOUT_S)
    assert (await bus.stream_state(STREAM_REQUESTS)).messages == 0


async def test_a_message_that_the_broker_does_not_store_is_announced(bus):
    heard: asyncio.Queue[Message] = asyncio.Queue()

    await bus.subscribe(STORE_FAILED, heard.put)
    with pytest.raises(Unreachable):
        await bus.store("llm.nothing.stores.this", b"x", headers={MSG_ID: "a"}, patience_s=0.0)
    assert read_failure(await asyncio.wait_for(heard.get(), 60)) == "llm.nothing.stores.this"


async def test_what_a_client_has_the_broker_send_there_is_no_announcement(bus):
    heard: asyncio.Queue[Message] = asyncio.Queue()
    await bus.subscribe(STORE_FAILED, heard.put)
    forged = encode(StoreFailure("llm.out.x"))
    await bus.publish("llm.request.high", forged, reply=STORE_FAILED)
    await eventually(lambda: _holds(bus, 1))
    await bus.publish("$JS.API.DIRECT.GET.LLM", b'{"seq": 1}', reply=STORE_FAILED)
    for _ in range(2):
        assert read_failure(await asyncio.wait_for(heard.get(), 60)) is None


async def _holds(bus, messages):
    return (await bus.stream_state(STREAM_REQUESTS)).messages == messages


async def test_the_requests_can_be_limited_and_the_limit_stays_when_a_role_applies_the_topology(bus, config):
    """A role that starts while there is no room must not lift the limit."""
    await bus.store("llm.request.high", b"x" * 100, headers={MSG_ID: "a"})
    used = (await bus.stream_state(STREAM_REQUESTS)).bytes
    await topology.limit_requests(bus.js, config, used)
    assert await topology.apply(bus.js, config) == []
    with pytest.raises(LaneFull):
        await bus.store("llm.request.high", b"x" * 100, headers={MSG_ID: "b"})
    await topology.limit_requests(bus.js, config, -1)
    await bus.store("llm.request.high", b"x" * 100, headers={MSG_ID: "b"})


async def test_jetstream_is_on_while_it_answers(bus):
    assert await topology.is_on(bus)


class Leaderless(Process):
    """Its broker answers calls of JetStream's API, and elects a leader meanwhile."""

    async def request(self, subject, data=b"", **more):
        if subject.startswith("$JS.API."):
            error = {"code": 503, "err_code": 10008, "description": "JetStream system temporarily unavailable"}
            return Message(subject, msgspec.json.encode({"error": error}), {}, "")
        return await super().request(subject, data, **more)


@pytest.mark.parametrize(
    "call",
    [
        lambda bus: bus.consumers(STREAM_REQUESTS),
        lambda bus: bus.consumer(STREAM_REQUESTS, "high"),
        lambda bus: bus.subjects(STREAM_REQUESTS, ">"),
        lambda bus: bus.stream_state(STREAM_REQUESTS),
        lambda bus: bus.removed(STREAM_REQUESTS),
        lambda bus: bus.delete(STREAM_REQUESTS, 1),
        lambda bus: bus.purge(STREAM_REQUESTS, "llm.request.high", up_to=1),
    ],
    ids=["consumers", "consumer", "subjects", "state", "removed", "delete", "purge"],
)
async def test_a_broker_that_is_not_able_to_answer_has_not_said_that_nothing_is_there(bus, call):
    with pytest.raises(Unreachable, match="temporarily unavailable"):
        await call(Leaderless(bus))


async def test_a_stream_that_is_not_there_has_no_state(bus):
    for call in (bus.stream_state("NONE"), bus.subjects("NONE", ">"), bus.removed("NONE")):
        with pytest.raises(Unreachable, match="stream not found"):
            await call
    assert await bus.consumers("NONE") == []
    assert await bus.consumer(STREAM_REQUESTS, "none") is None
