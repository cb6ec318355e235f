"""The gateway's process, with a real broker and real HTTP; the test plays the engine."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
from typing import Any

import httpx
import msgspec
import pytest

from pipeline.broker.jetstream import Bus
from pipeline.config import Config, ConfigError
from pipeline.core.limits import Limits
from pipeline.gateway import main as gateway
from pipeline.gateway import responses, server
from pipeline.gateway.identity import make_key
from pipeline.process.lifecycle import StartError
from pipeline.wire.answers import ErrorAnswer, ErrorBody
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import StoreReport, StoreState, encode
from pipeline.wire.subjects import MSG_ID, STORE, Priority, out_subject
from tests.pipeline.gateway.answers import COMPLETION
from tests.pipeline.gateway.conftest import Engine, Life, Serve
from tests.waiting import TIMEOUT_S, eventually

CHAT = {"messages": [{"role": "user", "content": "hello"}]}
STREAM = {**CHAT, "stream": True}
ASK = "/v1/chat/completions"
SECRET, KEY = make_key("alice")
OTHER_SECRET, OTHER = make_key("bob")


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def failed(code: ErrorCode) -> ErrorAnswer:
    return ErrorAnswer(id="", created=0, error=ErrorBody.of(HeadraceError(code, f"because of {code}")))


def port_of(client: httpx.AsyncClient) -> int:
    return client.base_url.port or 0


# ---- who may


async def test_it_does_not_start_where_everybody_could_call(config: Config):
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        with pytest.raises(ConfigError, match="http_keys"):
            await gateway.main(msgspec.structs.replace(config, http_host=host), Life())


async def test_a_port_that_is_taken_is_named(config: Config, serve: Serve):
    async with serve() as client:
        with pytest.raises(StartError, match=str(port_of(client))):
            await gateway.main(msgspec.structs.replace(config, http_port=port_of(client)), Life())


async def test_one_that_is_cancelled_ends(config: Config, bus: Bus):
    life = Life()
    running = asyncio.create_task(gateway.main(config, life))
    await life.ready.wait()
    running.cancel()
    done, _ = await asyncio.wait({running}, timeout=TIMEOUT_S)
    assert done
    assert running.cancelled()


async def test_with_a_key_it_may_be_bound_to_every_address(serve: Serve, engine: Engine):
    async with serve(http_host="0.0.0.0", http_keys=[KEY]) as client:
        for path in ("/v1/models", "/api/tags", "/queue/stats", "/metrics", "/load"):
            assert (await client.get(path)).status_code == 401, path
        assert (await client.post(ASK, json=CHAT)).json()["error"]["code"] == "unauthorized"
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/v1/models", headers=bearer(SECRET))).status_code == 200
        # Behind a name of its own a page may call it: it has to have the key.
        headers = {**bearer(SECRET), "Host": "llm.example", "Origin": "https://page.example"}
        assert (await client.get("/v1/models", headers=headers)).status_code == 200


async def test_a_key_brings_its_tenant_its_priority_and_its_ids(serve: Serve, engine: Engine):
    key = msgspec.structs.replace(KEY, tenant="team", priority=Priority.LOW, highest=Priority.MEDIUM)
    async with serve(http_keys=[key, OTHER]) as client:
        headers = {**bearer(SECRET), "Idempotency-Key": "job", "Prefer": "respond-async"}
        accepted = await client.post(ASK, json=CHAT, headers=headers)
        assert accepted.json()["id"] == "alice-job"
        stored = await engine.stored.get()
        assert stored.headers["Llm-Tenant"] == "team"
        assert stored.headers["Nats-Subject"].startswith("llm.request.low.t.team")
        assert stored.headers["Nats-Msg-Id"] == "t.team.alice-job"
        refused = await client.post(ASK, json=CHAT, headers={**bearer(SECRET), "X-Priority": "high"})
        assert refused.status_code == 403
        # The same word of another caller is another request.
        other = await client.post(ASK, json=CHAT, headers={**headers, **bearer(OTHER_SECRET)})
        assert other.json()["id"] == "bob-job"


async def test_a_key_with_a_tenant_is_answered_under_its_name_and_sees_its_id(serve: Serve, engine: Engine):
    key = msgspec.structs.replace(KEY, tenant="team")
    async with serve(http_keys=[key, OTHER]) as client:
        asking = asyncio.create_task(client.post(ASK, json=CHAT, headers={**bearer(SECRET), "Idempotency-Key": "job"}))
        name = await engine.next_id()
        assert name == "t.team.alice-job"
        await engine.answer(name)
        answered = await asking
        assert answered.status_code == 200
        assert answered.headers["X-Request-Id"] == "alice-job"
        # What is not read any more is cancelled by its name.
        with pytest.raises(httpx.ReadTimeout):
            await client.post(ASK, json=CHAT, headers=bearer(SECRET), timeout=0.5)
        assert await engine.next_id() == await engine.cancelled.get()


PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-priority"}


async def test_without_keys_the_pages_of_this_machine_may_call_it_and_no_others(serve: Serve, engine: Engine):
    async with serve() as client:
        for origin in ("http://localhost:3000", "http://127.0.0.1", "http://[::1]:5173", "https://app.localhost"):
            asked = await client.options(ASK, headers={"Origin": origin, **PREFLIGHT})
            assert asked.status_code == 200
            assert asked.headers["access-control-allow-origin"] == origin
            assert asked.headers["access-control-allow-headers"] == "authorization,x-priority"
            listed = await client.get("/v1/models", headers={"Origin": origin})
            assert listed.headers["access-control-allow-origin"] == origin
            assert "x-request-id" in listed.headers["access-control-expose-headers"]
        for origin in ("https://page.example", "null", "http://neighbour.local", "http://localhost.page.example"):
            for answer in (
                await client.options(ASK, headers={"Origin": origin, **PREFLIGHT}),
                await client.get("/v1/models", headers={"Origin": origin}),
            ):
                assert "access-control-allow-origin" not in answer.headers
            assert answer.json()["error"]["message"] == (
                f'Without API keys, this gateway does not serve pages from "{origin}". Add the origin to '
                "`http_origins`, or set `http_keys`."
            )
        foreign = await client.get("/v1/models", headers={"Host": "page.example"})
        assert foreign.json()["error"]["message"] == (
            'Without API keys, this gateway does not serve the host name "page.example". Call localhost or 127.0.0.1, '
            "add the name to `http_names`, or set `http_keys`."
        )


async def test_a_page_from_anywhere_may_call_with_a_key(serve: Serve, engine: Engine):
    async with serve(http_keys=[KEY]) as client:
        page = {"Origin": "https://page.example"}
        asked = await client.options(ASK, headers={**page, **PREFLIGHT})
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, "https://page.example")
        for headers, status in ((page, 401), ({**page, **bearer(SECRET)}, 200)):
            answer = await client.get("/v1/models", headers=headers)
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, page["Origin"])
            assert "access-control-allow-credentials" not in answer.headers


async def test_an_id_that_comes_again_with_something_else_is_refused(serve: Serve, engine: Engine):
    async with serve() as client:
        headers = {"Idempotency-Key": "job-1", "Prefer": "respond-async"}
        other = {"messages": [{"role": "user", "content": "goodbye"}]}
        assert (await client.post(ASK, json=CHAT, headers=headers)).status_code == 202
        for path in (ASK, "/api/chat"):
            refused = await client.post(path, json=other, headers=headers)
            assert refused.status_code == 400
            assert "used for a different request" in refused.text
        assert (await client.post("/api/chat", json=CHAT, headers=headers)).status_code == 202


async def test_one_request_id_for_several_calls_makes_them_no_copies_of_each_other(serve: Serve, engine: Engine):
    async with serve() as client:
        headers = {"X-Request-Id": "run-1", "Prefer": "respond-async"}
        ids = {(await client.post(ASK, json=CHAT, headers=headers)).headers["x-request-id"] for _ in range(2)}
        assert len(ids) == 2


# ---- limits


@pytest.fixture
def stopped_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the rate limits no time passes: what is used up stays so, however long the test takes."""
    take = Limits.take
    monkeypatch.setattr(Limits, "take", lambda limits, client, kind, rate, now: take(limits, client, kind, rate, 0.0))


@pytest.mark.usefixtures("stopped_limits")
async def test_a_flood_of_lists_blocks_neither_statistics_nor_answers(serve: Serve, engine: Engine):
    async with serve(http_lists_per_s=1, http_answers_per_s=100) as client:
        flood = [await client.get("/api/tags") for _ in range(30)]
        refused = [answer for answer in flood if answer.status_code == 429]
        assert len(refused) == 20
        assert {answer.status_code for answer in flood} == {200, 429}
        assert isinstance(refused[0].json()["error"], str)
        assert refused[0].headers["retry-after"] == "1"
        assert refused[0].headers["x-ratelimit-limit-requests"] == "10"
        assert refused[0].headers["x-ratelimit-remaining-requests"] == "0"
        assert (await client.get("/v1/models")).json()["error"]["code"] == "rate_limited"
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/metrics")).status_code == 200
        asked = asyncio.create_task(client.post(ASK, json=CHAT))
        await engine.answer(await engine.next_id())
        assert (await asked).status_code == 200
        assert (await asked).headers["x-ratelimit-limit-requests"] == "1000"


@pytest.mark.usefixtures("stopped_limits")
async def test_no_spelling_of_a_path_is_counted_as_another_kind(serve: Serve, engine: Engine):
    async with serve(http_lists_per_s=0.1) as client:
        assert (await client.get("/v1/models")).headers["x-ratelimit-limit-requests"] == "1"
        for path in ("/queue/dead", "/queue/dead%0A", "/queue/%64ead"):
            assert (await client.get(path)).headers["x-ratelimit-limit-requests"] != "1", path


@pytest.mark.usefixtures("stopped_limits")
async def test_a_key_may_have_limits_of_its_own(serve: Serve, engine: Engine):
    generous, frugal = (msgspec.structs.replace(KEY, lists_per_s=0.0), msgspec.structs.replace(OTHER, lists_per_s=0.1))
    async with serve(http_keys=[generous, frugal], http_lists_per_s=1) as client:
        assert {(await client.get("/api/ps", headers=bearer(SECRET))).status_code for _ in range(30)} == {200}
        statuses = [(await client.get("/api/ps", headers=bearer(OTHER_SECRET))).status_code for _ in range(3)]
        assert statuses == [200, 429, 429]


async def test_a_full_lane_says_when_to_come_back(serve: Serve, engine: Engine, config: Config):
    from pipeline.broker import topology

    await topology.apply(engine.bus.js, msgspec.structs.replace(config, lane_max_messages=1))
    async with serve(lane_max_messages=1) as client:
        headers = {"Prefer": "respond-async"}
        assert (await client.post(ASK, json=CHAT, headers=headers)).status_code == 202
        for path, more in ((ASK, headers), (ASK, {}), ("/api/chat", {})):
            answer = await client.post(path, json=CHAT, headers=more)
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert "queue_full" in answer.text


async def test_a_body_that_is_too_large_is_refused_however_it_comes(serve: Serve, engine: Engine):
    async with serve(max_body_bytes=1000) as client:
        assert (await client.post(ASK, content=b"x" * 1001)).status_code == 413

        async def parts():
            for _ in range(5):
                yield b"y" * 300

        assert (await client.post("/api/chat", content=parts())).json()["code"] == "request_too_large"
        endless = await client.post(ASK, content=b"z" * 20_000)
        assert endless.status_code == 413


async def test_a_compressed_body_is_refused_for_what_it_is(serve: Serve, engine: Engine):
    async with serve() as client:
        for path in (ASK, "/api/chat", "/api/show"):
            answer = await client.post(path, content=gzip.compress(b"{}"), headers={"Content-Encoding": "gzip"})
            assert answer.status_code == 415
            assert "gzip" in answer.text


async def test_one_connection_too_many_is_told_when_to_come_back(serve: Serve, engine: Engine):
    async with serve(http_connections=1) as client:
        _, writer = await raw(client, b"")
        for path in ("/v1/models", "/api/tags"):
            answer = await client.get(path)
            assert (answer.status_code, answer.headers["connection"]) == (503, "close")
            assert int(answer.headers["retry-after"]) >= 1
            assert "unavailable" in json.dumps(answer.json())
        writer.close()


# ---- clients that do not get on


async def raw(client: httpx.AsyncClient, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(client))
    writer.write(data)
    return reader, writer


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", b"408"),
        (b"GET /healthz HTTP/1.1\r\nhost: loc", b"408"),
        (b"POST /api/chat HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n\r\n{", b"408"),
        (b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * (server.MAX_HEAD_BYTES + 1), b"431"),
        (b"nonsense\r\n\r\n", b"400"),
    ],
    ids=["silent", "half-a-head", "half-a-body", "long-head", "no-http"],
)
async def test_who_does_not_get_on_is_told_and_cut_off(serve: Serve, engine: Engine, sent: bytes, status: bytes):
    async with serve(http_stall_timeout_s=0.2) as client, asyncio.timeout(TIMEOUT_S):
        reader, writer = await raw(client, sent)
        with contextlib.suppress(ConnectionError):
            assert (await reader.readline()).split()[1] == status
            await reader.read()
        writer.close()
        assert (await client.get("/healthz")).status_code == 200


@pytest.mark.parametrize(
    "then",
    [b"\r\n", b"GET /healthz HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n\r\n{"],
    ids=["empty-lines", "half-a-body"],
)
async def test_who_was_answered_and_does_not_get_on_is_cut_off(serve: Serve, engine: Engine, then: bytes):
    async with serve(http_stall_timeout_s=0.2) as client, asyncio.timeout(TIMEOUT_S):
        reader, writer = await raw(client, b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        await reader.readuntil(b'{"status":"ok"}')
        writer.write(then)
        if b"GET" in then:
            await reader.readuntil(b'{"status":"ok"}')
            writer.write(b"{")
        await reader.read()
        writer.close()


async def test_a_refusal_is_not_written_into_a_response(serve: Serve, engine: Engine):
    async with serve(http_stall_timeout_s=0.2) as client, asyncio.timeout(TIMEOUT_S):
        reader, writer = await raw(client, b"GET /load HTTP/1.1\r\nhost: localhost\r\n\r\nGET / HT")
        said = await reader.read()
        assert said.startswith(b"HTTP/1.1 200")
        assert b"408" not in said
        writer.close()


@pytest.mark.parametrize("path", ["/load", "/queue/live"])
async def test_who_goes_away_with_a_second_request_behind_the_first_leaves_nothing(
    serve: Serve, engine: Engine, path: str
):
    async with serve() as client, asyncio.timeout(TIMEOUT_S):
        one = f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()
        reader, writer = await raw(client, one + one)
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

        async def nothing_is_open() -> bool:
            return "headrace_http_open 0" in (await client.get("/metrics")).text

        await eventually(nothing_is_open)


@pytest.mark.parametrize("path", ["/load", "/queue/live"])
async def test_the_head_of_what_has_no_end_is_the_whole_response(serve: Serve, engine: Engine, path: str):
    async with serve() as client, asyncio.timeout(TIMEOUT_S):
        head = f"HEAD {path} HTTP/1.1\r\nhost: localhost\r\n\r\n"
        then = "GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"
        reader, writer = await raw(client, (head + then).encode())
        await reader.readuntil(b'{"status":"ok"}')
        writer.close()


async def test_a_reader_that_stands_still_is_cut_off_and_its_record_stays(
    serve: Serve, engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.gateway.answering.KEEP_ALIVE_S", 0.05)
    async with serve(http_stall_timeout_s=0.3) as client, asyncio.timeout(60):
        body = json.dumps(STREAM).encode()
        head = f"POST {ASK} HTTP/1.1\r\nhost: localhost\r\nidempotency-key: slow\r\ncontent-length: {len(body)}\r\n\r\n"
        reader, writer = await raw(client, head.encode() + body)
        assert await engine.next_id() == "slow"
        await reader.readline()
        reader._transport.pause_reading()
        texts = [str(number) * 40_000 for number in range(10)] * 40
        writing = asyncio.create_task(engine.write("slow", *engine.chunks(texts)))
        assert await engine.cancelled.get() == "slow"
        await writing
        writer.close()
        assert len(await engine.bus.read_answers("llm.reply.slow")) == len(texts)


async def test_a_reader_that_is_slower_than_the_engine_misses_nothing(
    serve: Serve, engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.gateway.answering.KEEP_ALIVE_S", 0.05)
    texts = [f"{number:08}" * 5000 for number in range(400)]
    async with serve() as client, client.stream("POST", ASK, json=STREAM) as response, asyncio.timeout(60):
        request_id = await engine.next_id()
        await engine.write(request_id, *engine.chunks(texts))
        await engine.answer(request_id)
        text = "".join([part async for part in response.aiter_text()])
    deltas = [json.loads(line[6:])["choices"][0]["delta"]["content"] for line in text.split("\n\n") if "chunk" in line]
    assert deltas[: len(texts)] == texts


async def test_who_hangs_up_has_the_request_cancelled_at_once(serve: Serve, engine: Engine):
    async with serve() as client:
        for path in (ASK, "/v1/completions", "/api/chat", "/api/generate"):
            for stream in (True, False):
                body = {**CHAT, "prompt": "x", "stream": stream}
                del body["messages" if path in ("/v1/completions", "/api/generate") else "prompt"]
                asking = asyncio.create_task(client.post(path, json=body))
                request_id = await engine.next_id()
                asking.cancel()
                async with asyncio.timeout(TIMEOUT_S):
                    assert await engine.cancelled.get() == request_id


async def test_who_does_not_wait_may_go(serve: Serve, engine: Engine):
    async with serve() as client:
        accepted = await client.post(ASK, json=STREAM, headers={"Prefer": "respond-async"})
        request_id = await engine.next_id()
        assert accepted.json()["id"] == request_id
        asking = asyncio.create_task(client.post(ASK, json=STREAM))
        other_id = await engine.next_id()
        asking.cancel()
        async with asyncio.timeout(TIMEOUT_S):
            assert await engine.cancelled.get() == other_id
        assert engine.cancelled.empty()


async def test_of_two_who_read_one_request_one_may_go(serve: Serve, engine: Engine):
    async with serve() as client:
        headers = {"Idempotency-Key": "shared"}
        one, two = [asyncio.create_task(client.post(ASK, json=CHAT, headers=headers)) for _ in range(2)]
        assert await engine.next_id() == "shared"
        metrics = "headrace_http_open 2\n"

        async def both_read() -> bool:
            return metrics in (await client.get("/metrics")).text

        await eventually(both_read)
        one.cancel()
        await eventually(lambda: _gone(client), what="the gateway knows that one is gone")
        await engine.answer("shared")
        assert (await two).json()["choices"][0]["message"]["content"] == "Hello there"
        assert engine.cancelled.empty()


async def _gone(client: httpx.AsyncClient) -> bool:
    return "headrace_http_gone_total 1\n" in (await client.get("/metrics")).text


@pytest.mark.parametrize("path", [ASK, "/api/chat"])
async def test_what_was_asked_for_whole_may_be_streamed_afterwards(serve: Serve, engine: Engine, path: str):
    async with serve() as client:
        headers = {"Idempotency-Key": "again"}
        first = asyncio.create_task(client.post(path, json={**CHAT, "stream": False}, headers=headers))
        await engine.write(await engine.next_id(), COMPLETION)
        await first
        again = await client.post(path, json=STREAM, headers=headers)
        lines = [line.removeprefix("data: ") for line in again.text.split("\n") if line]
        message = json.loads(lines[0])
        text = message["message"] if path == "/api/chat" else message["choices"][0]["delta"]
        assert text["content"] == "Hello there"
        assert len(lines) == 2


# ---- errors


@pytest.mark.parametrize("code", ErrorCode)
async def test_every_error_of_the_pipeline_has_a_status_and_the_dialects_envelope(code: ErrorCode):
    error = HeadraceError(code, "why")
    for path in ("/v1/x", "/api/x"):
        response = responses.error_response(error, path)
        assert response.status_code >= 400
        body = json.loads(bytes(response.body))
        assert (body["error"] if path == "/api/x" else body["error"]["message"]) == "why"
        assert ("retry-after" in response.headers) == (response.status_code in (429, 503))
        assert ("x-should-retry" in response.headers) != error.retryable


@pytest.mark.parametrize("stream", [True, False])
async def test_an_error_before_the_first_word_has_its_status(serve: Serve, engine: Engine, stream: bool):
    async with serve() as client:
        for path in (ASK, "/api/chat"):
            asking = asyncio.create_task(client.post(path, json={**CHAT, "stream": stream}))
            await engine.write(await engine.next_id(), failed(ErrorCode.ENGINE_FAILED))
            answer = await asking
            assert answer.status_code == 502
            assert "because of engine_failed" in answer.text


async def test_an_error_in_the_middle_comes_in_the_stream(serve: Serve, engine: Engine):
    async with serve() as client:
        for path in (ASK, "/api/chat"):
            asking = asyncio.create_task(client.post(path, json=STREAM))
            request_id = await engine.next_id()
            await engine.write(request_id, *engine.chunks(["begun"]), failed(ErrorCode.ENGINE_FAILED))
            answer = await asking
            assert answer.status_code == 200
            last = answer.text.strip().split("\n")[-1].removeprefix("data: ")
            assert json.loads(last)["error"]


async def test_whose_time_is_up_is_told_even_where_nobody_came_to_it(
    serve: Serve, engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.gateway.answering._DEADLINE_GRACE_S", 0.0)
    async with serve() as client:
        answer = await client.post(ASK, json=CHAT, headers={"X-Request-Timeout": "0.1"})
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "deadline_exceeded"
        assert await engine.cancelled.get() == await engine.next_id()


async def test_while_nobody_answers_a_stream_shows_that_it_lives(
    serve: Serve, engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.gateway.answering.KEEP_ALIVE_S", 0.05)
    async with serve() as client, client.stream("POST", ASK, json=STREAM) as response:
        lines = response.aiter_lines()
        assert await anext(lines) == ": waiting"
        request_id = await engine.next_id()
        await engine.answer(request_id)
        rest = [line async for line in lines]
        assert rest[-2] == "data: [DONE]"


async def test_while_nobody_answers_a_stream_of_ollamas_api_has_parts_without_text(
    serve: Serve, engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.gateway.answering.KEEP_ALIVE_S", 0.05)
    async with serve() as client, client.stream("POST", "/api/chat", json=CHAT) as response:
        lines = response.aiter_lines()
        first = json.loads(await anext(lines))
        assert (first["message"], first["done"]) == ({"role": "assistant", "content": ""}, False)
        await engine.answer(await engine.next_id())
        rest = [json.loads(line) async for line in lines]
        assert rest[-1]["done"]
        assert "".join(part["message"]["content"] for part in rest)


@pytest.mark.parametrize("path", [ASK, "/api/chat"])
async def test_a_client_of_http_1_0_gets_a_stream_whole_and_without_chunks(serve: Serve, engine: Engine, path: str):
    async with serve() as client, asyncio.timeout(60):
        body = json.dumps(STREAM).encode()
        head = f"POST {path} HTTP/1.0\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
        reader, writer = await raw(client, head.encode() + body)
        await engine.answer(await engine.next_id())
        answer = await reader.read()
        writer.close()
        head, _, text = answer.partition(b"\r\n\r\n")
        assert b"200 OK" in head
        assert b"transfer-encoding" not in head.lower()
        assert f"content-length: {len(text)}".encode() in head.lower()
        assert text.endswith(b"data: [DONE]\n\n" if path == ASK else b"}\n")


async def test_without_a_monitor_the_queue_is_away_and_answers_go_on(serve: Serve, engine: Engine):
    async with serve() as client:
        for path in ("/queue/stats", "/queue/requests/x"):
            answer = await client.get(path)
            assert answer.status_code == 503
            assert answer.headers["retry-after"]
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.json()["monitor"]) == (503, False)
        asking = asyncio.create_task(client.post(ASK, json=CHAT))
        await engine.answer(await engine.next_id())
        assert (await asking).status_code == 200


# ---- the broker's store


@pytest.mark.parametrize(("state", "code"), [("full", "queue_full"), ("failed", "unavailable")])
async def test_while_the_broker_has_no_room_new_requests_are_refused_with_the_reason(
    serve: Serve, bus: Bus, state: StoreState, code: str
):
    reason = "The disk of the broker's store is full."
    async with serve() as client:

        async def report(state: StoreState, reason: str = "") -> None:
            await bus.publish(STORE, encode(StoreReport(state, reason, 7, 70)))
            await eventually(lambda: said_by_metrics(client, f'headrace_store_state{{state="{state}"}} 1'))

        await report("ok")
        assert (await client.get("/readyz")).json()["store"] is True
        await report(state, reason)
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.json()["store"], ready.json()["reason"]) == (503, False, reason)
        assert "headrace_store_free_bytes 7\n" in (await client.get("/metrics")).text
        answer = await client.post(ASK, json=CHAT)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "5"
        error = answer.json()["error"]
        assert (error["code"], error["message"]) == (code, f"{reason} Retry later.")
        for refused in (await client.post("/v1/files", files={"file": b"x"}), await client.post("/v1/batches")):
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, code)
        asked = json.loads((await bus.request("llm.ask.high", b"hello", timeout_s=TIMEOUT_S)).data)
        assert (asked["error"]["code"], asked["error"]["message"]) == (code, f"{reason} Retry later.")


async def said_by_metrics(client: httpx.AsyncClient, line: str) -> bool:
    return line in (await client.get("/metrics")).text


# ---- the end


async def test_messages_that_are_no_answers_are_skipped_and_counted(serve: Serve, engine: Engine, bus: Bus):
    async with serve() as client:
        asking = asyncio.create_task(client.post(ASK, json=CHAT))
        request_id = await engine.next_id()
        await bus.store(out_subject(request_id), b"no answer", headers={MSG_ID: "foreign"})
        await engine.answer(request_id)
        assert (await asking).status_code == 200
        count = "headrace_foreign_messages_total 1\n"
        assert count in (await client.get("/metrics")).text


async def test_draining_lets_answers_come_to_their_end(serve: Serve, engine: Engine):
    async with serve() as client:
        asking = asyncio.create_task(client.post(ASK, json=STREAM))
        request_id = await engine.next_id()
        async with client.stream("GET", "/load") as watching:
            lines = watching.aiter_lines()
            await anext(lines)
            client.life.stop()
            async for _ in lines:  # ends before the answer
                pass
        await engine.answer(request_id)
        assert (await asking).text.endswith("data: [DONE]\n\n")


async def test_who_still_reads_at_the_end_is_told_where_to_read_on(serve: Serve, engine: Engine):
    async with serve() as client:
        asking: list[asyncio.Task[Any]] = [
            asyncio.create_task(client.post(ASK, json=CHAT)),
            asyncio.create_task(client.post(ASK, json=STREAM)),
        ]
        ids = [await engine.next_id() for _ in asking]
        await engine.write(ids[1], *engine.chunks(["begun"]))
        client.life.stop(drain_s=0.8)
        whole, streamed = [await task for task in asking]
        assert whole.status_code == 503
        assert f"/queue/requests/{whole.headers['x-request-id']}/events" in whole.text
        assert f"/queue/requests/{streamed.headers['x-request-id']}/events" in streamed.text
    # The requests go on.
    assert engine.cancelled.empty()


async def test_calls_without_a_valid_key_are_limited_by_address_and_a_valid_key_still_works(
    serve: Serve, engine: Engine
):
    async with serve(http_keys=[KEY]) as client:
        statuses = [(await client.get("/v1/models", headers=bearer("wrong"))).status_code for _ in range(40)]
        assert statuses[:20] == [401] * 20
        assert 429 in statuses[20:]
        refused = await client.get("/v1/models", headers=bearer("wrong"))
        if refused.status_code == 429:
            assert int(refused.headers["retry-after"]) >= 1
        assert (await client.get("/v1/models", headers=bearer(SECRET))).status_code == 200


@pytest.mark.parametrize(
    "hosts",
    [
        "",
        "Host:\r\n",
        "Host: \t\r\n",
        "Host: localhost\r\nHost: 127.0.0.1\r\n",
        "Host: localhost\r\nhost: localhost\r\n",
    ],
)
async def test_a_request_without_one_host_is_refused(serve: Serve, engine: Engine, hosts: str):
    async with serve() as client:
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        writer.write(f"GET /healthz HTTP/1.1\r\n{hosts}Connection: close\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"Host" in answer


async def test_one_address_elsewhere_has_a_share_of_the_connections_and_this_machine_all(
    serve: Serve, engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    get = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"
    async with serve(http_connections=12) as client:
        local = [await raw(client, get) for _ in range(8)]
        assert [(await reader.readline())[9:12] for reader, _ in local] == [b"200"] * 8
        for _, writer in local:
            writer.close()
    monkeypatch.setattr("pipeline.gateway.server.is_loopback", lambda _: False)
    async with serve(http_connections=6) as client:
        first = [await raw(client, get) for _ in range(3)]
        assert [(await reader.readline())[9:12] for reader, _ in first] == [b"200"] * 3
        reader, writer = await raw(client, b"")
        assert (await reader.readline())[9:12] == b"503"
        writer.close()
        first[0][1].close()

        async def fits() -> bool:
            reader, writer = await raw(client, get)
            status = (await reader.readline())[9:12]
            writer.close()
            return status == b"200"

        await eventually(fits)
        for _, writer in first:
            writer.close()
