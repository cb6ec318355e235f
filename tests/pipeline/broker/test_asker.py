"""What every asker shares, on a real broker: durable, deduplicated, and a record that is read whole from anywhere."""

from __future__ import annotations

import asyncio
import contextlib
from uuid import uuid4

import msgspec
import pytest

from pipeline.broker import topology
from pipeline.broker.asker import Asker, Outgoing, RecordReader, whole
from pipeline.broker.jetstream import Bus
from pipeline.config import Config
from pipeline.telemetry import Tracing
from pipeline.wire.answers import Chunk, ErrorAnswer, ErrorBody
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import encode
from pipeline.wire.subjects import CANCEL, MSG_ID, STREAM_REQUESTS, out_subject, reply_subject
from tests.pipeline.gateway.answers import CHUNKS, COMPLETION
from tests.support import NatsServer
from tests.waiting import TIMEOUT_S

SUBJECT = "llm.request.high"
BODY = b'{"prompt": "hello"}'


def chunks(count: int) -> list[Chunk]:
    return [msgspec.structs.replace(CHUNKS[0], seq=seq) for seq in range(count)]


async def write(bus: Bus, request_id: str, *answers: msgspec.Struct) -> int:
    """Write messages into a record; returns the last one's sequence."""
    *before, last = map(encode, answers)
    for data in before:
        await bus.publish(out_subject(request_id), data)
    return await bus.store(out_subject(request_id), last, headers={MSG_ID: uuid4().hex})


async def read_all(record: RecordReader) -> list[msgspec.Struct]:
    found = []
    async with asyncio.timeout(20):
        while not found or not isinstance(found[-1], type(COMPLETION)):
            found.append((await record.next()).answer)
    return found


@pytest.fixture
def client(bus: Bus) -> Asker:
    return Asker(bus, Tracing())


async def test_what_was_submitted_is_stored_and_its_answer_followed(bus: Bus, client: Asker):
    async with await client.submit(Outgoing("a", SUBJECT, BODY, {"Llm-Tenant": "me"})) as record:
        stored = await bus.stored(STREAM_REQUESTS, 1)
        assert stored is not None
        assert (stored.subject, stored.data) == (SUBJECT, BODY)
        assert (stored.headers[MSG_ID], stored.headers["Llm-Tenant"]) == ("a", "me")
        await write(bus, "a", *CHUNKS, COMPLETION)
        assert await read_all(record) == [*CHUNKS, COMPLETION]


async def test_the_same_id_again_reads_the_same_answer_from_its_start(bus: Bus, client: Asker):
    first = await client.submit(Outgoing("a", SUBJECT, BODY, {}, given_id=True))
    await write(bus, "a", *CHUNKS, COMPLETION)
    async with first, await client.submit(Outgoing("a", SUBJECT, BODY, {}, given_id=True)) as second:
        assert await read_all(second) == await read_all(first) == [*CHUNKS, COMPLETION]
    assert (await bus.stream_state(STREAM_REQUESTS)).messages == 1


async def test_an_older_answer_under_the_same_id_is_not_taken_for_the_new_one(bus: Bus, client: Asker):
    await write(bus, "a", msgspec.structs.replace(COMPLETION, created=1))
    async with await client.submit(Outgoing("a", SUBJECT, BODY, {}, given_id=True)) as record:
        await write(bus, "a", COMPLETION)
        assert (await whole(record)).answer == COMPLETION


@pytest.mark.parametrize("answers", [[CHUNKS[0]], [*CHUNKS, COMPLETION]], ids=["running", "answered"])
async def test_a_cancelled_request_under_the_same_id_that_is_not_purged_yet_is_left_out(
    bus: Bus, client: Asker, answers: list[msgspec.Struct]
):
    first = await client.submit(Outgoing("a", SUBJECT, BODY, {}, given_id=True))
    await first.close()
    earlier = ErrorAnswer("a", 1, ErrorBody.of(HeadraceError(ErrorCode.CANCELLED, "It was cancelled.")))
    await write(bus, "a", msgspec.structs.replace(CHUNKS[0], created=1), earlier, *answers)
    submitted = await client.submit(Outgoing("a", SUBJECT, BODY, {}, given_id=True))
    for record in (submitted, await client.read("a")):
        async with record, asyncio.timeout(20):
            assert [(await record.next()).answer for _ in answers] == answers


async def test_a_request_that_the_broker_does_not_accept_is_refused_for_good(bus: Bus, client: Asker):
    with pytest.raises(HeadraceError) as raised:
        await client.submit(Outgoing("a", SUBJECT, b"x" * bus.max_payload, {}))
    assert raised.value.code is ErrorCode.REQUEST_TOO_LARGE


@pytest.mark.parametrize("count", [10, 300, 1200])
async def test_a_reader_who_comes_at_any_time_reads_everything_once(bus: Bus, client: Asker, count: int):
    early = await client.read("a")
    await write(bus, "a", *chunks(count))
    middle = await client.read("a")
    await write(bus, "a", COMPLETION)
    late = await client.read("a")
    for record in (early, middle, late):
        async with record:
            assert await read_all(record) == [*chunks(count), COMPLETION]


async def test_a_reader_goes_on_from_where_it_left_off(bus: Bus, client: Asker):
    sequence = await write(bus, "a", *chunks(5))
    await write(bus, "a", COMPLETION)
    async with await client.read("a", after=sequence) as record:
        assert await read_all(record) == [COMPLETION]


async def test_what_a_reader_does_not_take_is_not_kept_for_it(bus: Bus, client: Asker):
    async with await client.read("a") as record:
        await write(bus, "a", *chunks(1000), COMPLETION)
        await bus.request("$JS.API.INFO")  # behind all of it
        assert len(record._live) < 200
        assert len(await read_all(record)) == 1001


async def test_what_is_said_while_the_connection_is_away_is_read_when_it_is_back(
    nats_server: NatsServer, bus: Bus, config: Config
):
    reading = Bus.connect(config.nats_url, name="reader")
    async with reading as other, await Asker(other, Tracing()).read("a") as record:
        await write(bus, "a", *chunks(3))
        assert [(await record.next()).answer for _ in range(3)] == chunks(3)
        # Only the reader's connection breaks; what comes next is published without it.
        other.nc._transport._io_writer.transport.abort()
        await write(bus, "a", *chunks(6)[3:], COMPLETION)
        assert await read_all(record) == [*chunks(6)[3:], COMPLETION]


async def test_a_lost_message_is_read_from_the_stream_also_by_a_reader_that_looks_up_often(
    bus: Bus, client: Asker, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.broker.asker._LOOK_AFTER_S", 0.3)
    async with await client.read("a") as record, asyncio.timeout(20):
        await write(bus, "a", CHUNKS[0])
        assert (await record.next()).answer == CHUNKS[0]
        assert record._subscription is not None
        await bus.unsubscribe(record._subscription)
        await write(bus, "a", COMPLETION)
        found = None
        while found is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    found = await record.next()
        assert found.answer == COMPLETION


async def test_a_reader_that_waits_for_less_time_than_a_look_takes_reads_everything_once(
    bus: Bus, client: Asker, monkeypatch: pytest.MonkeyPatch
):
    batch = Bus.batch

    async def slow(*given: object, **more: object) -> object:
        await asyncio.sleep(0.2)
        return await batch(*given, **more)

    await write(bus, "a", *chunks(600))
    await write(bus, "a", COMPLETION)
    monkeypatch.setattr(Bus, "batch", slow)
    async with await client.read("a") as record, asyncio.timeout(TIMEOUT_S):
        found: list[msgspec.Struct] = []
        while not found or found[-1] != COMPLETION:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.02):
                    found.append((await record.next()).answer)
        assert found == [*chunks(600), COMPLETION]


async def test_a_full_lane_is_told(bus: Bus, client: Asker, config: Config):
    await topology.apply(bus.js, msgspec.structs.replace(config, lane_max_messages=1))
    await (await client.submit(Outgoing("a", SUBJECT, BODY, {}))).close()
    with pytest.raises(HeadraceError) as caught:
        await client.submit(Outgoing("b", SUBJECT, BODY, {}))
    assert caught.value.code is ErrorCode.QUEUE_FULL
    assert not client._records


async def test_a_broker_that_is_away_is_told(nats_server: NatsServer, client: Asker):
    nats_server.kill()
    with pytest.raises(HeadraceError) as caught:
        await client.submit(Outgoing("a", SUBJECT, BODY, {}), patience_s=0.2)
    assert caught.value.code is ErrorCode.UNAVAILABLE


async def test_a_request_that_nobody_waits_for_any_more_is_taken_back_once_it_is_stored(bus: Bus, client: Asker):
    cancelled: asyncio.Queue[str] = asyncio.Queue()

    async def on_cancel(message: object) -> None:
        # By then it is there to be cancelled.
        assert (await bus.stream_state(STREAM_REQUESTS)).messages == 1
        await cancelled.put(message.subject)

    await bus.subscribe(f"{CANCEL}.*", on_cancel)
    await bus.request("$JS.API.INFO")
    submitting = asyncio.create_task(client.submit(Outgoing("a", SUBJECT, BODY, {})))
    while not client._records:  # noqa: ASYNC110 - between two turns of the loop, before the broker can have answered
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    submitting.cancel()
    async with asyncio.timeout(TIMEOUT_S):
        assert await cancelled.get() == f"{CANCEL}.a"
    assert not client._records


async def test_the_last_message_of_a_record_is_found_or_there_is_none(bus: Bus, client: Asker):
    assert await client.last("a") is None
    sequence = await write(bus, "a", *CHUNKS, COMPLETION)
    last = await client.last("a")
    assert last is not None
    assert (last.sequence, last.answer) == (sequence, COMPLETION)
    assert (await bus.last_message("LLM_REPLIES", reply_subject("a"))) == (sequence, last.data)


async def test_a_record_that_could_not_be_opened_is_kept_by_nobody(bus: Bus, client: Asker):
    await bus.nc.close()
    with pytest.raises(Exception, match="closed"):
        await client.read("a")
    assert not client._records
