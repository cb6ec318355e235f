"""Each delivery ends in exactly one way, and the record says which."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from pipeline.broker.peers import Peers
from pipeline.core import placement
from pipeline.core.ending import Failed
from pipeline.delivery.lanes import MLX_SOURCE
from pipeline.delivery.puller import Puller
from pipeline.delivery.taking import Taking
from pipeline.process.role import Role
from pipeline.telemetry import Tracing
from pipeline.wire.answers import Chunk, Completion, EmbeddingList, PromptDetails, Status, Usage
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import RequestEvent
from pipeline.wire.subjects import MSG_ID, STREAM_DEAD, STREAM_REQUESTS
from pipeline.worker.serving import Serving, ServingContext
from pipeline.worker.worker import Worker
from tests.pipeline.worker.conftest import ScriptedEmbedder, ScriptedEngine
from tests.waiting import eventually, taken


def text_of(chunks):
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


async def events_of(bus):
    seen = []

    async def on_event(message):
        seen.append(msgspec.json.decode(message.data, type=RequestEvent))

    await bus.subscribe("llm.event.>", on_event)
    await bus.nc.flush()
    return seen


async def dead_letters(bus):
    return [message async for message in bus.scan(STREAM_DEAD, ">")]


async def test_a_request_that_does_not_stream_gets_one_message(start, client):
    engine = (await start()).engine
    await client.ask("r1")
    run = await engine.generation("r1")
    run.say("Par")
    run.finish("is")
    answer = await client.answer("r1")
    assert answer.choices[0].message.content == "Paris"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 2)
    account = answer.headrace
    assert (account.engine, account.priority, account.attempts, account.spilled) == ("mlx", "high", 1, False)
    assert 0 < account.queue_ms <= account.ttft_ms <= account.total_ms
    await client.none_waits()
    assert await client.record("r1") == [answer]
    assert run.closed


async def test_a_request_that_streams_gets_its_start_its_chunks_and_the_whole(start, client):
    engine = (await start()).engine
    await client.stream("r1")
    run = await engine.generation("r1")
    run.say("Par")
    await client.until("r1", 2)
    run.say("i")
    await client.until("r1", 3)
    run.finish("s")
    answer = await client.answer("r1")
    started, *chunks, last = await client.record("r1")
    assert isinstance(started, Status)
    assert started.state == "started"
    assert [chunk.seq for chunk in chunks] == [0, 1, 2]
    assert text_of(chunks) == last.choices[0].message.content == "Paris"
    assert last == answer
    await client.none_waits()


async def test_events_are_published_for_watchers(start, client):
    events = await events_of(client.bus)
    engine = (await start()).engine
    await client.ask("r1", Llm_Tenant="alice")
    (await engine.generation("r1")).finish("x")
    await eventually(lambda: [event.kind for event in events] == ["started", "done"])
    assert {(event.id, event.tenant) for event in events} == {("r1", "alice")}


async def test_an_engine_knows_the_tenant_and_what_it_did_not_compute_costs_nothing(start, client, monkeypatch):
    costs = []
    monkeypatch.setattr(Worker, "_finish_charge", lambda _, taken, cost: costs.append((taken.envelope.id, cost)))
    engine = (await start(prompt_token_cost=0.5)).engine
    await client.ask("r1", Llm_Tenant="alice")
    run = await engine.generation("r1")
    assert run.work.tenant == "alice"
    run.say("x", finish_reason="stop", usage=Usage(100, 1, 101, PromptDetails(90)))
    answer = await client.answer("r1")
    assert answer.usage.prompt_tokens_details.cached_tokens == 90
    await eventually(lambda: costs == [("r1", 10 * 0.5 + 1)])


async def test_a_reply_to_gets_the_same_messages(start, client):
    seen = await client.listen("_INBOX.me.1")
    engine = (await start()).engine
    await client.stream("r1", Reply_To="_INBOX.me.1")
    (await engine.generation("r1")).finish("Paris")
    await client.answer("r1")
    await eventually(lambda: len(seen) == 3)
    assert seen == await client.record("r1")


async def test_another_worker_goes_on_where_a_dead_one_stopped(start, client):
    first = await start()
    seen = await client.listen("_INBOX.me.1")
    await client.stream("r1", Reply_To="_INBOX.me.1")
    run = await first.engine.generation("r1")
    run.say("The capital ")
    await client.until("r1", 2)
    run.say("of France ")
    await client.until("r1", 3)
    await first.kill()
    second = await start()
    run = await second.engine.generation("r1")
    assert run.work.resume_text == "The capital of France "
    assert "".join(map(chr, run.work.resume_tokens)) == "The capital of France "
    run.finish("is Paris")
    answer = await client.answer("r1")
    record = await client.record("r1")
    chunks = [message for message in record if isinstance(message, Chunk)]
    assert [message.state for message in record if isinstance(message, Status)] == ["started", "restarted"]
    assert [chunk.seq for chunk in chunks] == [0, 1, 2]
    assert text_of(chunks) == answer.choices[0].message.content == "The capital of France is Paris"
    assert answer.headrace.attempts == 2
    # Its reader saw the first token before the second attempt began.
    assert 0 < answer.headrace.ttft_ms < answer.headrace.queue_ms
    assert sum(isinstance(message, Completion) for message in record) == 1
    await client.none_waits()
    # The inbox's reader sees each chunk at least once.
    await eventually(lambda: answer in seen)
    by_seq = {message.seq: message for message in seen if isinstance(message, Chunk)}
    assert text_of(by_seq[seq] for seq in sorted(by_seq)) == answer.choices[0].message.content
    assert seen.count(answer) == 1


async def test_a_chunk_that_was_stored_and_not_forwarded_reaches_the_reply_to_after_all(start, client):
    first = await start()
    seen = await client.listen("_INBOX.me.1")
    await client.stream("r1", Reply_To="_INBOX.me.1")
    run = await first.engine.generation("r1")
    first.bus.meets("dies", lambda o: o.subject.startswith("_INBOX.me") and b'"seq":0' in o.data)
    run.say("Paris")
    await eventually(lambda: first.bus.struck)
    await first.kill()
    second = await start()
    (await second.engine.generation("r1")).finish("!")
    await client.answer("r1")
    await eventually(lambda: any(isinstance(message, Completion) for message in seen))
    assert {message.seq for message in seen if isinstance(message, Chunk)} == {0, 1}


async def test_a_request_answered_before_its_worker_died_is_only_acknowledged(start, client):
    first = await start()
    await client.ask("r1")
    run = await first.engine.generation("r1")
    first.bus.meets("loses", lambda o: o.data == b"+ACK")
    run.finish("Paris")
    await client.answer("r1")
    await eventually(lambda: first.bus.struck)
    await first.kill()
    second = await start()
    await client.none_waits()
    assert second.engine.submitted == []
    assert len(await client.record("r1")) == 1


async def test_the_deadline_may_pass_before_a_request_runs(start, client):
    await client.ask("r1", Llm_Timeout="0.001")
    engine = (await start()).engine
    assert await client.code("r1") == "deadline_exceeded"
    await client.none_waits()
    assert engine.submitted == []


async def test_the_deadline_may_pass_while_a_request_runs(start, client):
    events = await events_of(client.bus)
    engine = (await start()).engine
    await client.stream("r1", Llm_Timeout="0.5")
    run = await engine.generation("r1")
    run.say("Par")
    assert await client.code("r1") == "deadline_exceeded"
    await client.none_waits()
    assert run.closed
    await eventually(lambda: [event.kind for event in events] == ["started", "expired"])


async def test_a_running_request_is_cancelled(start, client):
    engine = (await start()).engine
    await client.stream("r1")
    run = await engine.generation("r1")
    run.say("Par")
    await client.until("r1", 2)
    await client.bus.publish("llm.cancel.r1", b"")
    await eventually(lambda: run.closed)
    assert await client.code("r1") == "cancelled"
    await client.none_waits()


async def test_a_slot_is_free_before_the_record_of_what_was_cancelled_is_closed(start, client):
    worker = await start(ScriptedEngine(slots=1))
    await client.stream("r1")
    (await worker.engine.generation("r1")).say("Par")
    await client.until("r1", 2)
    worker.bus.meets("freezes", lambda o: b'"cancelled"' in o.data)
    await client.ask("r2")
    await client.bus.publish("llm.cancel.r1", b"")
    (await worker.engine.generation("r2")).finish("x")
    assert isinstance((await client.record("r1"))[-1], Chunk)
    worker.bus.thaw()
    assert await client.code("r1") == "cancelled"
    await client.none_waits()


async def test_a_cancel_holds_whenever_it_comes(bus, config, client):
    """Also between the delivery of a request and its start."""
    engine, me = ScriptedEngine(slots=1), Role("worker", bus, Peers(bus), Tracing())
    taking = Taking(me, config, MLX_SOURCE, engine="mlx")
    context = ServingContext(me, engine, config)
    puller = Puller(bus, STREAM_REQUESTS, give_up, 30.0)
    await puller.start()
    beating = asyncio.create_task(taking.leases.run())
    for turns in range(30):
        await client.stream(str(turns))
        delivery = await taken(puller, "high")
        one = Serving(context, taking.hold(delivery), "its turn")
        running = asyncio.create_task(one.run())
        for _ in range(turns):
            await asyncio.sleep(0)
        one.interrupt(Failed(HeadraceError(ErrorCode.CANCELLED, "by the test")))
        await running
        assert await client.code(str(turns)) == "cancelled"
        await client.none_waits()
        assert engine.running == []
    beating.cancel()


async def give_up(_):
    raise AssertionError("a surplus request")


async def test_a_cancel_holds_while_the_record_of_a_redelivery_is_read(start, client):
    first = await start()
    await client.stream("r1")
    (await first.engine.generation("r1")).say("Par")
    await client.until("r1", 2)
    await first.kill()
    second = await start()
    second.bus.meets("freezes", lambda o: o.subject == "$JS.API.DIRECT.GET.LLM_REPLIES.llm.reply.r1")
    await eventually(lambda: second.bus.struck)
    await client.bus.publish("llm.cancel.r1", b"")
    await eventually(lambda: any(job.serving._interruption for job in second.worker._jobs))
    second.bus.thaw()
    assert await client.code("r1") == "cancelled"
    assert second.engine.submitted == []
    await client.none_waits()


@pytest.mark.parametrize("code", ["context_length_exceeded", "unsupported_parameter", "invalid_request"])
async def test_what_the_engine_refuses_is_told_once_and_for_all(start, client, code):
    engine = (await start(ScriptedEngine(refusal=HeadraceError(ErrorCode(code), "no")))).engine
    await client.stream("r1")
    assert await client.code("r1") == code
    await client.none_waits()
    assert [message.object for message in map(_tag, await client.record("r1"))] == ["error"]
    assert engine.submitted == []
    assert await dead_letters(client.bus) == []


class _Tagged(msgspec.Struct):
    object: str


def _tag(message):
    return _Tagged(type(message).__struct_config__.tag)


async def test_a_request_that_brings_the_engine_down_is_a_dead_letter(start, client):
    engine = (await start()).engine
    # What its publisher told the broker was for that one publish, and must not bar the way.
    sequence = await client.stream("r1", Nats_Expected_Stream="LLM", Llm_Tenant="me")
    (await engine.generation("r1")).fail(ErrorCode.ENGINE_FAILED, "it crashed the engine")
    answer = await client.answer("r1")
    assert answer.error.code == "engine_failed"
    assert not answer.error.retryable
    await client.none_waits()
    (letter,) = await dead_letters(client.bus)
    assert letter.data == b'{"prompt":"x","stream":true}'
    assert letter.headers["Llm-Id"] == "r1"
    assert letter.headers["Llm-Tenant"] == "me"
    assert letter.headers["Llm-Attempts"] == "1"
    assert letter.headers["Llm-Subject"] == "llm.request.high"
    assert msgspec.json.decode(letter.headers["Llm-Error"])["message"] == "it crashed the engine"
    assert sequence == 1


async def test_a_request_whose_workers_die_is_a_dead_letter_in_the_end(start, client):
    for _ in range(2):
        worker = await start(max_attempts=2, lease_s=1.0)
        if not worker.engine.submitted:
            await client.stream("r1")
        await worker.engine.generation("r1")
        await worker.kill()
    last = await start(max_attempts=2, lease_s=1.0)
    assert await client.code("r1") == "engine_failed"
    assert last.engine.submitted == []
    (letter,) = await dead_letters(client.bus)
    assert letter.headers[MSG_ID].startswith("r1@")
    await client.none_waits()


async def test_an_unavailable_engine_gives_back_without_using_up_an_attempt(start, client, monkeypatch):
    monkeypatch.setattr(placement, "RETRY_DELAY_S", 0.01)
    events = await events_of(client.bus)
    engine = (await start(max_attempts=2)).engine
    await client.ask("r1")
    for number in range(1, 5):
        (await engine.generation("r1", number)).fail(ErrorCode.UNAVAILABLE)
    (await engine.generation("r1", 5)).finish("Paris")
    answer = await client.answer("r1")
    assert answer.choices[0].message.content == "Paris"
    assert answer.headrace.attempts == 1
    await client.none_waits()
    await eventually(lambda: events and events[-1].kind == "done")
    assert [event.kind for event in events].count("returned") == 4


async def test_an_engine_that_misbehaves_uses_up_the_attempts_and_its_words_are_told(start, client, monkeypatch):
    monkeypatch.setattr(placement, "RETRY_DELAY_S", 0.01)
    events = await events_of(client.bus)
    engine = (await start(max_attempts=3)).engine
    await client.ask("r1")
    for number in range(1, 4):
        (await engine.generation("r1", number)).misbehave("model requires more system memory")
    error = (await client.answer("r1")).error
    assert error.code == "engine_failed"
    assert "r1 failed after 3 attempts" in error.message
    assert "model requires more system memory" in error.message
    await client.none_waits()
    (letter,) = await dead_letters(client.bus)
    assert letter.headers["Llm-Attempts"] == "3"
    await eventually(lambda: events and events[-1].kind == "failed")
    assert [event.kind for event in events].count("returned") == 2


async def test_a_request_is_answered_by_an_attempt_after_one_that_misbehaved(start, client, monkeypatch):
    monkeypatch.setattr(placement, "RETRY_DELAY_S", 0.01)
    engine = (await start(max_attempts=2)).engine
    await client.stream("r1")
    run = await engine.generation("r1")
    run.say("Par")
    await client.until("r1", 2)
    run.misbehave()
    run = await engine.generation("r1", 2)
    assert run.work.resume_text == "Par"
    run.finish("is")
    answer = await client.answer("r1")
    assert (answer.choices[0].message.content, answer.headrace.attempts) == ("Paris", 2)
    assert await dead_letters(client.bus) == []


async def test_an_engine_that_restarts_a_request_says_so_to_its_reader(start, client):
    engine = (await start()).engine
    await client.stream("r1")
    run = await engine.generation("r1")
    run.say("Par")
    await client.until("r1", 2)
    run.say("is", restarted=1)
    run.finish()
    answer = await client.answer("r1")
    assert answer.headrace.attempts == 2
    states = [message.state for message in await client.record("r1") if isinstance(message, Status)]
    assert states == ["started", "restarted"]
    assert answer.choices[0].message.content == "Paris"


async def test_a_request_that_the_engine_suspends_says_so_to_its_reader(start, client):
    engine = (await start()).engine
    await client.stream("r1")
    run = await engine.generation("r1")
    run.say("Par", preempted=1, suspended=True)
    await client.until("r1", 3)
    run.say("is", suspended=False)
    run.finish()
    answer = await client.answer("r1")
    assert (answer.headrace.preempted, answer.headrace.attempts) == (1, 1)
    states = [message.state for message in await client.record("r1") if isinstance(message, Status)]
    assert states == ["started", "suspended", "resumed"]
    assert answer.choices[0].message.content == "Paris"


async def test_the_letter_and_the_reader_agree_on_the_attempts(start, client):
    engine = (await start(max_attempts=1)).engine
    await client.stream("r1")
    run = await engine.generation("r1")
    run.say("", restarted=1)
    run.misbehave("the engine crashed")
    answer = await client.answer("r1")
    assert "after 2 attempts" in answer.error.message
    assert max(message.attempt for message in await client.record("r1") if isinstance(message, Status)) == 2
    (letter,) = await dead_letters(client.bus)
    assert letter.headers["Llm-Attempts"] == "2"


DEEP = b'{"prompt":"x","tools":' + b"[" * 100_000 + b"]" * 100_000 + b"}"

MALFORMED = {
    "bad JSON": (b'{"prompt":', {}, "invalid_request"),
    "trailing": (b'{"prompt":"x"} and more', {}, "invalid_request"),
    "wrong types": (b'{"prompt":7}', {}, "invalid_request"),
    "no prompt": (b"{}", {}, "invalid_request"),
    "huge number": (b'{"prompt":"x","max_tokens":1e999}', {}, "invalid_request"),
    "huge integer": (b'{"prompt":"x","seed":' + b"9" * 5000 + b"}", {}, "invalid_request"),
    "deep": (DEEP, {}, "invalid_request"),
    "invalid UTF-8": (b'{"prompt":"\xff\xfe"}', {}, "invalid_request"),
    "invalid UTF-8 text": (b"\xff\xfe", {}, "invalid_request"),
    "empty": (b"", {}, "invalid_request"),
    "empty with a status": (b"", {"Status": "503"}, "invalid_request"),
    "blank": (b"  \n", {}, "invalid_request"),
    "2 MB": (b"x" * (2 << 20), {}, "request_too_large"),
    "unknown model": (b'{"prompt":"x","model":"nobody"}', {}, "model_not_found"),
    "n": (b'{"prompt":"x","n":2}', {}, "unsupported_parameter"),
    "evil Reply-To": (b"x", {"Reply-To": "llm.request.high"}, "reply_subject_denied"),
    "Reply-To with a wildcard": (b"x", {"Reply-To": "_INBOX.>"}, "reply_subject_denied"),
    "Reply-To of the system": (b"x", {"Reply-To": "$JS.API.STREAM.DELETE.LLM"}, "reply_subject_denied"),
    "bad timeout": (b"x", {"Llm-Timeout": "soon"}, "invalid_request"),
    "bad task": (b"x", {"Llm-Task": "easy"}, "invalid_request"),
}


async def test_nothing_a_publisher_sends_stops_a_worker_or_goes_without_its_error(start, client):
    engine = (await start(ScriptedEngine(slots=4))).engine
    expected = {}
    for number, (body, headers, code) in enumerate(MALFORMED.values()):
        await client.bus.store("llm.request.medium", body, headers={MSG_ID: f"bad{number}"} | headers)
        expected[f"bad{number}"] = code
    evil_ids = ["a.b", "*", ">", "x" * 129, "имя", "a:spilled:b", "a b"]
    sequences = [await client.bus.store("llm.request.low", b"x", headers={MSG_ID: evil}) for evil in evil_ids]
    expected |= dict.fromkeys((f"LLM-{sequence}" for sequence in sequences), "invalid_request")
    await client.ask("good")
    (await engine.generation("good")).finish("Paris")
    got = {request_id: str(await client.code(request_id)) for request_id in expected}
    assert got == expected
    assert (await client.answer("good")).choices[0].message.content == "Paris"
    await client.none_waits()
    assert [run.work.id for run in engine.submitted] == ["good"]


async def test_an_error_does_not_reach_the_readers_of_another_request(start, client):
    engine = (await start()).engine
    await client.stream("victim")
    (await engine.generation("victim")).say("Par")
    await client.until("victim", 2)
    seen = await client.listen("llm.reply.victim")
    await client.bus.store("llm.request.high", b'{"prompt":', headers={MSG_ID: "evil", "Reply-To": "llm.reply.victim"})
    await client.ask("late", Reply_To="llm.reply.victim", Llm_Timeout="0.001")
    await client.answer("evil")
    await client.answer("late")
    await client.none_waits(but=1)
    assert seen == []


# ---- embeddings

TEXTS = b'{"input":["a","bcd"]}'


async def test_texts_are_embedded_in_order_in_one_last_message(start, client):
    events = await events_of(client.bus)
    embedder = ScriptedEmbedder()
    await start(ScriptedEngine(embedder=embedder))
    await client.ask("r1", TEXTS)
    await eventually(lambda: embedder.asked and [event.kind for event in events] == ["started"])
    embedder.goes_on.set()
    answer = await client.answer("r1")
    assert isinstance(answer, EmbeddingList)
    assert [(item.index, item.embedding) for item in answer.embeddings()] == [(0, [1.0, 1.0]), (1, [3.0, 3.0])]
    assert (answer.model, answer.usage.total_tokens) == ("scripted-embed", 2)
    assert (answer.headrace.engine, answer.headrace.attempts) == ("mlx", 1)
    await client.none_waits()
    assert await client.record("r1") == [answer]
    await eventually(lambda: [event.kind for event in events] == ["started", "done"])


async def test_an_engine_that_cannot_embed_says_so_and_counts_as_having_begun_nothing(start, client):
    events = await events_of(client.bus)
    await start()
    await client.ask("r1", TEXTS)
    assert await client.code("r1") is ErrorCode.MODEL_NOT_FOUND
    await eventually(lambda: [event.kind for event in events] == ["failed"])


async def test_vectors_that_no_message_can_hold_are_refused_with_what_to_do(start, client):
    embedder = ScriptedEmbedder(dimensions=client.bus.max_payload // 4)
    embedder.goes_on.set()
    await start(ScriptedEngine(embedder=embedder))
    await client.ask("r1", b'{"input":"a"}')
    error = (await client.answer("r1")).error
    assert (error.code, error.param) == (ErrorCode.REQUEST_TOO_LARGE, "input")
    assert "fewer texts" in error.message
    await client.none_waits()


async def test_embedding_is_broken_off_by_a_cancel_and_its_slot_is_free(start, client):
    embedder = ScriptedEmbedder()
    await start(ScriptedEngine(slots=1, embedder=embedder))
    await client.ask("r1", TEXTS)
    await eventually(lambda: embedder.asked)
    await client.bus.publish("llm.cancel.r1", b"")
    assert await client.code("r1") is ErrorCode.CANCELLED
    embedder.goes_on.set()
    await client.ask("r2", TEXTS)
    assert isinstance(await client.answer("r2"), EmbeddingList)


async def test_texts_that_a_dead_worker_had_in_hand_are_embedded_by_another(start, client):
    dying = ScriptedEmbedder()
    first = await start(ScriptedEngine(embedder=dying))
    await client.ask("r1", TEXTS)
    await eventually(lambda: dying.asked)
    await first.kill()
    living = ScriptedEmbedder()
    living.goes_on.set()
    await start(ScriptedEngine(embedder=living))
    answer = await client.answer("r1")
    assert (answer.headrace.attempts, len(answer.embeddings())) == (2, 2)
    assert await client.record("r1") == [answer]


async def test_an_embedding_that_fails_for_no_reason_of_its_own_comes_again(start, client):
    embedder = ScriptedEmbedder(refusal=HeadraceError(ErrorCode.UNAVAILABLE, "away"))
    embedder.goes_on.set()
    await start(ScriptedEngine(embedder=embedder))
    await client.ask("r1", TEXTS)
    await eventually(lambda: len(embedder.asked) >= 2)
    embedder.refusal = None
    assert isinstance(await client.answer("r1"), EmbeddingList)


async def test_the_headers_of_a_request_are_read_in_any_case(start, client, bus):
    await start()
    seen = await client.listen("_INBOX.me.2")
    await bus.store(
        "llm.request.high", b"x", headers={"nats-msg-id": "r1", "reply-to": "_INBOX.me.2", "LLM-TIMEOUT": "soon"}
    )
    answer = await client.answer("r1")
    assert answer.error.code == "invalid_request"
    await eventually(lambda: seen)
    assert seen == [answer]


async def test_an_answer_notes_the_parameters_that_were_taken_in_another_meaning(start, client):
    worker = await start()
    await client.ask("r1", b'{"prompt":"x","max_tokens":-1,"stop":""}')
    (await worker.engine.generation("r1")).finish("so")
    assert (await client.answer("r1")).headrace.notes == [
        "`max_tokens` -1 means no limit.",
        "An empty `stop` string stops nothing.",
    ]
    await client.ask("r2", b'{"prompt":"x","max_tokens":9}')
    (await worker.engine.generation("r2")).finish("so")
    assert (await client.answer("r2")).headrace.notes is msgspec.UNSET
