"""Only the holder of a request extends its record, and what a reader sees is the record and nothing else."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from pipeline.broker.asker import Asker
from pipeline.core.answer import Record, error_answer
from pipeline.core.envelope import Envelope
from pipeline.delivery.record import RecordWriter, Superseded
from pipeline.telemetry import Tracing
from pipeline.wire.answers import Chunk, ChunkChoice, Delta
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import encode
from pipeline.wire.subjects import STREAM_REPLIES, Priority, Task, reply_subject
from tests.faults import Process
from tests.waiting import eventually

ENVELOPE = Envelope("r1", Priority.HIGH, Task.UNTRIAGED, stored_at=1000.5, delivered=1)


def chunk(seq, envelope=ENVELOPE):
    choice = ChunkChoice(Delta(content=f"piece {seq}"))
    return Chunk(id=envelope.id, created=envelope.created, model="m", choices=[choice], seq=seq, attempt=1)


def last(envelope=ENVELOPE, text="enough"):
    return error_answer(envelope, HeadraceError(ErrorCode.CANCELLED, text))


class Writer(RecordWriter):
    """Writes as `Held.say` does."""

    async def write(self, message):
        await self.append(encode(message))
        await self.forward(encode(message))


def writer(bus, envelope=ENVELOPE):
    return Writer(bus, envelope)


async def held(bus, subject="llm.reply.r1"):
    return [message for _, message in await bus.read_answers(subject)]


class Reader:
    """A plain subscriber, as any program may be."""

    def __init__(self) -> None:
        self.seen = []

    async def on_message(self, message):
        self.seen.append(message.data)

    @classmethod
    async def of(cls, bus, subject):
        reader = cls()
        await bus.subscribe(subject, reader.on_message)
        await bus.nc.flush()
        return reader

    async def sees(self, messages):
        wanted = [encode(message) for message in messages]
        await eventually(lambda: len(self.seen) >= len(wanted))
        return self.seen == wanted


async def test_what_is_written_is_what_live_and_late_readers_see(bus):
    reader = await Reader.of(bus, "llm.reply.r1")
    mine = writer(bus)
    messages = [chunk(0), chunk(1), last()]
    for message in messages:
        await mine.write(message)
    assert await held(bus) == messages
    assert await reader.sees(messages)


async def test_of_two_writers_the_slower_one_is_refused_and_no_reader_sees_it(bus):
    reader = await Reader.of(bus, "llm.reply.r1")
    frozen, mine = writer(bus), writer(bus)
    await frozen.write(chunk(0))
    mine.last_sequence = frozen.last_sequence
    await mine.write(chunk(1))
    with pytest.raises(Superseded):
        await frozen.write(replace_text(chunk(1), "other"))
    with pytest.raises(Superseded):
        await frozen.write(last())
    await mine.write(last())
    assert await held(bus) == [chunk(0), chunk(1), last()]
    assert await reader.sees([chunk(0), chunk(1), last()])


def replace_text(message, text):
    return Chunk(
        id=message.id,
        created=message.created,
        model="m",
        choices=[ChunkChoice(Delta(content=text))],
        seq=message.seq,
        attempt=2,
    )


@pytest.mark.parametrize("reply_to", [None, "_INBOX.reader.1", "llm.reply.shared"])
async def test_a_write_cancelled_at_any_moment_leaves_no_message_out_and_none_twice(bus, reply_to):
    for turns in range(40):
        envelope = replace(ENVELOPE, id=f"r{turns}", reply_to=reply_to and f"{reply_to}{turns}")
        mine = writer(bus, envelope)
        await mine.write(chunk(0, envelope))
        target = reply_to and f"{reply_to}{turns}"
        reader = await Reader.of(bus, target or reply_subject(envelope.id))
        writing = asyncio.create_task(mine.write(chunk(1, envelope)))
        for _ in range(turns):
            await asyncio.sleep(0)
        writing.cancel()
        await asyncio.wait({writing})
        await mine.write(last(envelope))
        record = await held(bus, reply_subject(envelope.id))
        assert record in (
            [chunk(0, envelope), last(envelope)],
            [chunk(0, envelope), chunk(1, envelope), last(envelope)],
        )
        if not writing.cancelled():
            assert len(record) == 3
        await eventually(lambda reader=reader, envelope=envelope: encode(last(envelope)) in reader.seen)
        assert len(reader.seen) == len(set(reader.seen))
        assert reader.seen[-1] == encode(last(envelope))
        if reply_to == "llm.reply.shared":
            assert (await held(bus, target))[-1] == last(envelope)


async def test_a_message_stored_though_its_acknowledgement_was_lost_is_not_written_twice(bus):
    process = Process(bus)
    mine = writer(process, replace(ENVELOPE, reply_to="llm.reply.other"))
    for message in (chunk(0), last()):
        for subject in ("llm.out.r1", "llm.out.other"):
            process.meets("hears nothing", lambda operation, subject=subject: operation.subject == subject)
            if subject == "llm.out.r1":
                await mine.append(encode(message))
            else:
                await mine.forward(encode(message))
            assert process.struck
    assert await held(bus) == [chunk(0), last()]
    assert await held(bus, "llm.reply.other") == [chunk(0), last()]


async def test_an_older_request_under_the_same_id_makes_way(bus):
    older = replace(ENVELOPE, stored_at=1.0)
    for message in (chunk(0, older), last(older)):
        await writer_after(bus, older, message)
    mine = writer(bus)
    await mine.write(chunk(0))
    await mine.write(last())
    assert await held(bus) == [chunk(0), last()]


async def writer_after(bus, envelope, message):
    again = writer(bus, envelope)
    found = await bus.last_message(STREAM_REPLIES, reply_subject(envelope.id))
    again.last_sequence = found[0] if found else 0
    await again.write(message)


async def test_a_closed_record_takes_no_second_last_message(bus):
    await writer(bus).write(last())
    with pytest.raises(Superseded):
        await writer(bus).write(last(text="another"))
    assert await held(bus) == [last()]


@pytest.mark.parametrize("target", ["_INBOX.me.1", "llm.reply.mine"])
async def test_the_answer_goes_to_its_reply_to_as_well(bus, target):
    reader = await Reader.of(bus, target)
    mine = writer(bus, replace(ENVELOPE, reply_to=target))
    await mine.check_reply_to()
    await mine.write(chunk(0))
    await mine.write(last())
    assert await reader.sees([chunk(0), last()])
    assert await held(bus) == [chunk(0), last()]
    assert await held(bus, target) == ([chunk(0), last()] if target.startswith("llm.") else [])


async def test_another_requests_record_is_no_place_to_answer(bus):
    victim = replace(ENVELOPE, id="victim")
    await writer(bus, victim).write(chunk(0, victim))
    mine = writer(bus, replace(ENVELOPE, reply_to="llm.reply.victim"))
    with pytest.raises(HeadraceError) as denied:
        await mine.check_reply_to()
    assert denied.value.code is ErrorCode.REPLY_SUBJECT_DENIED
    reader = await Reader.of(bus, "llm.reply.victim")
    await mine.write(last())
    await bus.nc.flush()
    assert reader.seen == []
    assert await held(bus) == [last()]
    assert await held(bus, "llm.reply.victim") == [chunk(0, victim)]


async def test_an_answer_written_without_looking_does_not_reach_another_requests_readers(bus):
    victim = replace(ENVELOPE, id="victim")
    await writer(bus, victim).write(chunk(0, victim))
    reader = await Reader.of(bus, "llm.reply.victim")
    await writer(bus, replace(ENVELOPE, reply_to="llm.reply.victim")).write(last())
    await bus.nc.flush()
    assert reader.seen == []
    assert await held(bus) == [last()]


async def test_a_reply_to_that_another_request_takes_over_gets_no_more(bus):
    mine = writer(bus, replace(ENVELOPE, reply_to="llm.reply.other"))
    await mine.write(chunk(0))
    other = replace(ENVELOPE, id="other")
    await writer_after_any(bus, other, chunk(0, other))
    await mine.write(chunk(1))
    await mine.write(last())
    assert await held(bus) == [chunk(0), chunk(1), last()]
    assert [message.id for message in await held(bus, "llm.reply.other")][-1] == "other"


async def writer_after_any(bus, envelope, message):
    found = await bus.last_message(STREAM_REPLIES, reply_subject(envelope.id))
    again = writer(bus, envelope)
    again.last_sequence = found[0]
    await again.write(message)


async def test_forwarding_again_adds_nothing_to_a_reply_to_that_is_kept(bus):
    envelope = replace(ENVELOPE, reply_to="llm.reply.mine")
    await writer(bus, envelope).write(last())
    (kept,) = await held(bus)
    await writer(bus, envelope).forward(encode(kept))
    assert await held(bus, "llm.reply.mine") == [last()]


async def test_a_message_is_stored_behind_an_earlier_one_whose_acknowledgement_was_not_heard(bus):
    process = Process(bus)
    mine = writer(process)
    await mine.write(chunk(0))
    process.meets("hears late", lambda operation: operation.subject == "llm.out.r1")
    writing = asyncio.create_task(mine.write(chunk(1)))

    async def both_stored():
        return len(await held(bus)) == 2

    await eventually(both_stored)
    writing.cancel()
    await asyncio.wait({writing})
    process.thaw()
    await mine.write(last())
    assert await held(bus) == [chunk(0), chunk(1), last()]


FOREIGN = [b'{"stream":"LLM","seq":1}', b"\xff", b"[]", b'{"object":"chat.completion.chunk","choices":[]}']


@pytest.mark.parametrize("foreign", FOREIGN)
async def test_what_is_no_answer_neither_ends_a_record_nor_leads_to_a_loss(bus, foreign):
    """Before the answer it makes way; in the middle it is skipped, and what is written before it stays."""
    await bus.store("llm.out.r1", foreign, headers={"Nats-Msg-Id": "1"})
    assert await bus.last_answer("llm.reply.r1") == (1, None)
    mine = writer(bus)
    await mine.write(chunk(0))
    await bus.store("llm.out.r1", foreign, headers={"Nats-Msg-Id": "2"})
    await mine.write(chunk(1))
    assert bus.foreign > 0
    kept = await bus.read_answers("llm.reply.r1")
    assert [message for _, message in kept] == [chunk(0), None, chunk(1)]
    resumed = Record.read(kept, ENVELOPE.created)
    assert (resumed.text, resumed.next_seq, resumed.last_sequence) == ("piece 0piece 1", 2, kept[-1][0])
    await bus.store("llm.out.r1", foreign, headers={"Nats-Msg-Id": "3"})
    kept = await bus.read_answers("llm.reply.r1")
    assert Record.read(kept, ENVELOPE.created).last_sequence == kept[-1][0]
    await mine.write(last())
    assert (await bus.last_answer("llm.reply.r1"))[1] == encode(last())


@pytest.mark.parametrize("foreign", FOREIGN)
async def test_a_reader_skips_what_is_no_answer_live_and_late(bus, foreign):
    asker = Asker(bus, Tracing())
    async with await asker.read("r1") as live:
        for data in (foreign, encode(chunk(0)), foreign, encode(last()), foreign):
            await bus.publish("llm.out.r1", data)
        assert [(await live.next()).answer for _ in range(2)] == [chunk(0), last()]
    async with await asker.read("r1") as late:
        assert [(await late.next()).answer for _ in range(2)] == [chunk(0), last()]
    assert (await asker.last("r1")).answer == last()
