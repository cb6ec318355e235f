"""A request that is published twice, delivered late, or lost is not served, written or returned twice."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest

from pipeline.core.answer import error_answer
from pipeline.core.envelope import Envelope
from pipeline.delivery.record import Duplicate, RecordWriter
from pipeline.wire.answers import Chunk, Completion, is_last
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import encode
from pipeline.wire.subjects import STREAM_REQUESTS, Move, Priority, Task
from tests.waiting import eventually

LEASE_S = 1.0


@pytest.mark.parametrize("reply_to", [None, "_INBOX.me.1", "llm.reply.mine"])
async def test_an_id_that_a_restarted_broker_has_forgotten_is_still_one_request(start, client, nats_server, reply_to):
    headers = {"Reply_To": reply_to} if reply_to else {}
    seen = await client.listen(reply_to or "llm.reply.r1")
    worker = await start()
    await client.ask("r1", **headers)
    (await worker.engine.generation("r1")).finish("once")
    answer = await client.answer("r1")
    await client.none_waits()
    nats_server.kill()
    nats_server.start()
    assert await client.ask("r1", **headers) == 2, "the broker took it for another request"
    if reply_to != "llm.reply.mine":  # found out before anything is generated
        (await worker.engine.generation("r1", 2)).finish("twice")
    await client.none_waits()
    assert await client.record("r1") == [answer]
    assert [message for message in seen if is_last(message)] == [answer]


async def test_an_answer_is_still_there_when_the_broker_has_been_killed(start, client, nats_server):
    worker = await start()
    await client.stream("r1")
    (await worker.engine.generation("r1")).finish("kept")
    await client.answer("r1")
    await client.none_waits()
    record = await client.record("r1")
    nats_server.kill()
    nats_server.start()
    assert await eventually(lambda: client.record("r1")) == record


async def test_a_worker_that_lost_a_request_does_not_return_it(start, client):
    slow, quick = await start(lease_s=LEASE_S), None
    await client.ask("r1")
    run = await slow.engine.generation("r1")
    slow.engine.set_state("loading")  # it pulls nothing more
    # A worker that hears nothing of its lease: as one that stood still, but for the others in this process.
    for lease in slow.worker._taking.leases._leases:
        lease.expires_at = time.monotonic()
    slow.worker._taking.leases._leases.clear()
    quick = await start(lease_s=LEASE_S)
    second = await quick.engine.generation("r1")
    run.fail(ErrorCode.UNAVAILABLE)
    await eventually(lambda: not slow.worker._jobs)
    second.finish("from the second")
    answer = await client.answer("r1")
    assert isinstance(answer, Completion)
    assert answer.headrace.attempts == 2
    await client.none_waits()
    assert len(quick.engine.submitted) == 1


async def test_what_a_frozen_worker_was_handed_waits_for_one_lease_and_uses_up_no_attempt(start, client, nats_server):
    worker = await start(lease_s=LEASE_S, max_attempts=1)
    await eventually(lambda: _is_waiting(client.bus))
    with socket.create_connection(("127.0.0.1", nats_server.port), timeout=5) as raw:
        raw.sendall(b'CONNECT {"headers":true,"verbose":false}\r\nPUB llm.request.high 1\r\nx\r\nPING\r\n')
        while not raw.recv(4096).endswith(b"PONG\r\n"):
            pass
        time.sleep(1.5 * LEASE_S)  # noqa: ASYNC251 - the loop stands still
        raw.sendall(b"PUB llm.request.high 1\r\ny\r\nPING\r\n")
        while not raw.recv(4096).endswith(b"PONG\r\n"):
            pass
        # The pulls have run out: nothing more is handed over to a process that is frozen.
        time.sleep(0.5 * LEASE_S)  # noqa: ASYNC251 - the loop stands still
    for request_id in ("LLM-1", "LLM-2"):
        (await worker.engine.generation(request_id)).finish("x")
        assert (await client.answer(request_id)).headrace.attempts == 1
    assert await times_delivered(client.bus) == {"high": 3}
    await client.none_waits()


async def _is_waiting(bus):
    return (await bus.js.consumer_info(STREAM_REQUESTS, "low_complex")).num_waiting


async def times_delivered(bus):
    """How many deliveries each consumer that has made any has made."""
    infos = await bus.js.consumers_info(STREAM_REQUESTS)
    return {info.name: info.delivered.consumer_seq for info in infos if info.delivered.consumer_seq}


def envelope(stored_at, move=None, *, anew=False):
    return Envelope("r1", Priority.HIGH, Task.UNTRIAGED, stored_at=stored_at, delivered=1, move=move, anew=anew)


def ended(stored_at, code):
    return encode(error_answer(envelope(stored_at), HeadraceError(code, "over")))


@pytest.mark.parametrize("move", [None, Move.SPILLED, Move.COMPLEX, Move.RETURNED])
@pytest.mark.parametrize("apart_s", [-100.0, 100.0])
async def test_two_copies_of_one_request_have_one_record_wherever_they_went(bus, move, apart_s):
    await RecordWriter(bus, envelope(1000.5)).append(ended(1000.5, ErrorCode.CANCELLED))
    copy = RecordWriter(bus, envelope(1000.5 + apart_s, move))
    with pytest.raises(Duplicate):
        await copy.append(ended(1000.5 + apart_s, ErrorCode.CANCELLED))
    assert [message.created for _, message in await bus.read_answers("llm.reply.r1")] == [1000]


@pytest.mark.parametrize("move", [Move.REPLAYED, Move.SPILLED])
async def test_what_is_replayed_from_the_dead_letters_is_answered_again(bus, move):
    await RecordWriter(bus, envelope(1000.5)).append(ended(1000.5, ErrorCode.ENGINE_FAILED))
    await RecordWriter(bus, envelope(1010.5, move)).append(ended(1010.5, ErrorCode.CANCELLED))
    assert [message.created for _, message in await bus.read_answers("llm.reply.r1")] == [1010]


@pytest.mark.parametrize("move", [Move.REPLAYED, Move.SPILLED])
async def test_what_is_sent_again_after_a_cancel_is_answered_wherever_it_goes(bus, move):
    await RecordWriter(bus, envelope(1000.5)).append(ended(1000.5, ErrorCode.CANCELLED))
    await RecordWriter(bus, envelope(1010.5, move, anew=True)).append(ended(1010.5, ErrorCode.CANCELLED))
    assert [message.created for _, message in await bus.read_answers("llm.reply.r1")] == [1010]


async def test_a_broker_that_was_away_for_longer_than_a_lease_causes_no_storm_of_attempts(start, client, nats_server):
    worker, other = await start(lease_s=LEASE_S), await start(lease_s=LEASE_S)
    await client.stream("r1")
    await client.ask("r2")
    engines = (worker.engine, other.engine)

    def runs():
        return [run for engine in engines for run in engine.submitted]

    await eventually(lambda: len(runs()) == 2)
    (streamed,) = [run for run in runs() if run.work.id == "r1"]
    streamed.say("before ")
    await client.until("r1", 2)
    nats_server.kill()
    await asyncio.sleep(1.5 * LEASE_S)  # all leases run out at the broker
    nats_server.start()
    await eventually(lambda: client.record("r1"))
    await asyncio.sleep(1.5 * LEASE_S)  # the redeliveries have been made, or are made in a moment
    finished = []

    async def all_over():
        for run in runs():
            if run not in finished:
                finished.append(run)
                run.finish("after")
        return (await client.bus.stream_state(STREAM_REQUESTS)).messages == 0

    await eventually(all_over, what="all requests acknowledged")
    for request_id in ("r1", "r2"):
        answer = await client.answer(request_id)
        assert answer.headrace.attempts <= 3
        assert answer.choices[0].message.content == ("before after" if request_id == "r1" else "after")
    chunks = [message for message in await client.record("r1") if isinstance(message, Chunk)]
    assert [chunk.seq for chunk in chunks] == list(range(len(chunks)))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "before after"
    for request_id in ("r1", "r2"):
        assert sum(is_last(message) for message in await client.record(request_id)) == 1
    assert len(runs()) <= 4
