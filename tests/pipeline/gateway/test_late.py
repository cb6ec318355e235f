"""An answer is read late by asking for it, by tenant, from any of its messages on."""

from __future__ import annotations

import json

import pytest

from pipeline.broker.jetstream import Bus
from pipeline.gateway.late import LateAnswers
from pipeline.wire.answers import ErrorAnswer, ErrorBody
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import encode
from pipeline.wire.subjects import out_subject
from tests.pipeline.gateway.answers import CHUNKS, COMPLETION


@pytest.fixture
async def late(nats_server, bus):
    async with Bus.connect(nats_server.url, name="gateway") as serving:
        await LateAnswers(serving).start()
        await serving.nc.flush()
        yield bus


async def read(bus, body: object, subject: str = "llm.queue.answer") -> list[tuple[int, str]]:
    """The messages of a reply: sequence and kind."""
    given = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = await bus.request(subject, given)
    assert "Nats-Service-Error-Code" not in reply.headers, reply.headers
    return [(one["seq"], one["message"]["object"]) for one in json.loads(reply.data)["messages"]]


async def write(bus, name: str) -> list[int]:
    return [await bus.store(out_subject(name), encode(answer)) for answer in (*CHUNKS, COMPLETION)]


async def test_an_answer_is_read_from_its_start_and_from_any_message_on(late):
    sequences = await write(late, "r1")
    whole = await read(late, {"id": "r1"})
    assert [sequence for sequence, _ in whole] == sequences
    assert whole[-1][1] == "chat.completion"
    assert await read(late, b"r1") == await read(late, b'"r1"') == whole
    assert await read(late, {"id": "r1", "after": sequences[0]}) == whole[1:]
    assert await read(late, {"id": "r1", "after": sequences[-1]}) == []


async def test_a_tenant_reads_its_own_answer_alone(late):
    for name in ("same", "t.acme.same", "t.bolt.same"):
        await write(late, name)
    mine = await read(late, {"id": "same"}, "llm.queue.answer.t.acme")
    others = [await read(late, {"id": "same"}, subject) for subject in ("llm.queue.answer", "llm.queue.answer.t.bolt")]
    assert len(mine) == len(CHUNKS) + 1
    assert not {sequence for sequence, _ in mine} & {sequence for other in others for sequence, _ in other}


@pytest.mark.parametrize("body", [b"t.acme.r1", b"*", b">", b"", b"\xff", b"[]", b'{"id": "t.acme.r1"}', b'{"id": 3}'])
async def test_what_is_no_id_finds_nothing(late, body):
    await write(late, "t.acme.r1")
    assert await read(late, body) == []
    assert await read(late, body, "llm.queue.answer.t.bolt") == []


async def test_what_is_no_answer_is_left_out(late):
    await late.store(out_subject("r1"), b"{}")
    error = ErrorAnswer("r1", 1, ErrorBody.of(HeadraceError(ErrorCode.CANCELLED, "It was cancelled.")))
    sequence = await late.store(out_subject("r1"), encode(error))
    assert await read(late, b"r1") == [(sequence, "error")]


async def test_a_long_answer_comes_in_several_replies(late):
    chunk = json.loads(encode(CHUNKS[0]))
    chunk["choices"][0]["delta"]["content"] = "x" * 700_000
    for _ in range(3):
        await late.store(out_subject("r1"), json.dumps(chunk).encode())
    after, found = 0, []
    while part := await read(late, {"id": "r1", "after": after}):
        found += part
        after = part[-1][0]
    assert len(found) == 3
    assert len(await read(late, b"r1")) < 3
