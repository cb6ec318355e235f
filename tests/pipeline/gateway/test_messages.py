"""Anthropic's endpoints over HTTP, with a real broker; the test plays the engine."""

from __future__ import annotations

import asyncio
import json

import pytest

from pipeline.broker.connection import Message
from pipeline.broker.jetstream import Bus
from pipeline.gateway.identity import make_key
from pipeline.wire.answers import ErrorAnswer, ErrorBody
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import PerPriorityCount, Slots, TokenCount, WorkerStatus, encode
from tests.pipeline.gateway.answers import COMPLETION
from tests.pipeline.gateway.conftest import Engine, Serve
from tests.waiting import TIMEOUT_S, eventually

NONE = PerPriorityCount()
ASK = "/v1/messages?beta=true"
CHAT = {"model": "auto", "max_tokens": 100, "messages": [{"role": "user", "content": "hello"}]}
VERSION = {"anthropic-version": "2023-06-01", "anthropic-beta": "claude-code-20250219"}
FAILED = ErrorAnswer(id="", created=0, error=ErrorBody.of(HeadraceError(ErrorCode.ENGINE_FAILED, "why")))
SECRET, KEY = make_key("alice")


async def test_a_message_is_answered_for_a_key_in_either_header(serve: Serve, engine: Engine):
    async with serve(http_keys=[KEY]) as client:
        for headers in ({"x-api-key": SECRET}, {"Authorization": f"Bearer {SECRET}"}):
            asking = asyncio.create_task(client.post(ASK, json=CHAT, headers=VERSION | headers))
            request_id = await engine.next_id()
            await engine.write(request_id, COMPLETION)
            answer = await asking
            assert answer.json()["content"] == [{"type": "text", "text": "Hello there"}]
            assert answer.json()["id"] == answer.headers["request-id"] == answer.headers["x-request-id"] == request_id


async def test_what_is_refused_before_it_is_queued_has_anthropics_envelope(serve: Serve, engine: Engine):
    async with serve(http_keys=[KEY], http_answers_per_s=0.1) as client:
        allowed = {"x-api-key": SECRET}
        answers = [
            await client.post(ASK, json=CHAT),
            await client.post(ASK, json=CHAT, headers=allowed | {"X-Priority": "urgent"}),
            await client.post(ASK, json=CHAT, headers=allowed),
            await client.get("/v1/messages/batches", headers=allowed),
        ]
        kinds = ["authentication_error", "invalid_request_error", "rate_limit_error", "not_found_error"]
        assert [answer.status_code for answer in answers] == [401, 400, 429, 404]
        for answer, kind in zip(answers, kinds, strict=True):
            body = answer.json()
            assert (body["type"], body["error"]["type"], body["request_id"]) == ("error", kind, None)


@pytest.mark.parametrize("stream", [True, False])
async def test_an_error_before_the_first_word_has_its_status_and_the_requests_id(
    serve: Serve, engine: Engine, stream: bool
):
    async with serve() as client:
        asking = asyncio.create_task(client.post(ASK, json=CHAT | {"stream": stream}))
        request_id = await engine.next_id()
        await engine.write(request_id, FAILED)
        answer = await asking
        assert answer.status_code == 502
        assert answer.json()["error"]["type"] == "api_error"
        assert answer.json()["request_id"] == answer.headers["request-id"] == request_id


async def test_a_stream_pings_while_it_waits_and_says_what_breaks_it_off(
    serve: Serve, engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.gateway.answering.KEEP_ALIVE_S", 0.05)
    async with serve() as client, client.stream("POST", ASK, json=CHAT | {"stream": True}) as response:
        lines = response.aiter_lines()
        assert [await anext(lines), await anext(lines)] == ["event: ping", 'data: {"type":"ping"}']
        request_id = await engine.next_id()
        await engine.write(request_id, *engine.chunks(["begun"]), FAILED)
        events = [json.loads(line.removeprefix("data: ")) async for line in lines if line.startswith("data: ")]
        told = [event for event in events if event["type"] != "ping"]
        assert [event["type"] for event in told] == [
            "message_start",
            "content_block_start",
            "content_block_delta",
            "error",
        ]
        assert told[-1]["request_id"] == request_id


async def test_a_client_that_goes_away_cancels_its_request(serve: Serve, engine: Engine):
    async with serve() as client:
        asking = asyncio.create_task(client.post(ASK, json=CHAT))
        request_id = await engine.next_id()
        asking.cancel()
        async with asyncio.timeout(TIMEOUT_S):
            assert await engine.cancelled.get() == request_id


async def test_an_answer_can_be_read_later(serve: Serve, engine: Engine):
    async with serve() as client:
        headers = {"Prefer": "respond-async", "Idempotency-Key": "later"}
        accepted = await client.post(ASK, json=CHAT, headers=headers)
        assert (accepted.status_code, accepted.json()["id"], accepted.headers["request-id"]) == (202, "later", "later")
        await engine.answer(await engine.next_id())
        again = await client.post(ASK, json=CHAT | {"stream": True}, headers={"Idempotency-Key": "later"})
        assert '"text":" there"' in again.text


async def test_the_root_tells_clients_of_ollama_that_it_runs_and_shows_browsers_the_dashboard(serve: Serve):
    async with serve() as client:
        for headers in ({"Accept": "*/*"}, {"Accept": "application/json, text/plain, */*"}):
            told = await client.get("/", headers=headers)
            assert (told.status_code, told.text) == (200, "Ollama is running")
            assert "accept" in told.headers["vary"]
        assert (await client.head("/")).status_code == 200
        page = await client.get("/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
        assert page.headers["content-type"].startswith("text/html")


async def test_models_are_listed_in_the_form_of_the_client_that_asks(serve: Serve, bus: Bus):
    async with serve() as client:
        listed = await client.get("/v1/models", headers=VERSION)
        assert listed.json() == {"data": [], "has_more": False, "first_id": None, "last_id": None}
        await workers(bus, {"a": None, "b": None})

        async def heard() -> bool:
            page = (await client.get("/v1/models", headers=VERSION)).json()
            return (page["first_id"], page["last_id"]) == ("model-a", "auto")

        await eventually(heard)
        one = {"type": "model", "id": "model-a", "display_name": "model-a", "created_at": "1970-01-01T00:00:00Z"}
        assert (await client.get("/v1/models/model-a", headers=VERSION)).json() == one
        assert (await client.get("/v1/models", headers=VERSION)).json()["data"][0] == one
        assert (await client.get("/v1/models/model-a")).json()["object"] == "model"


# ---- counting tokens

COUNT = "/v1/messages/count_tokens?beta=true"


async def workers(bus: Bus, replies: dict[str, TokenCount | ErrorAnswer | None]) -> None:
    """Workers of MLX with a model of their own each, and what they reply: None is not to be there for counts."""
    for name, reply in replies.items():
        status = WorkerStatus(name, "mlx", "ready", [f"model-{name}"], Slots(0, 1), NONE, 0, 0, 0, 0, 0, at=0.0)
        await bus.publish(f"llm.worker.{name}", encode(status))
        if reply is not None:

            async def answer(message: Message, reply: TokenCount | ErrorAnswer = reply) -> None:
                assert json.loads(message.data)["messages"] == CHAT["messages"]
                await bus.publish(message.reply, encode(reply))

            await bus.subscribe(f"llm.tokens.{name}", answer)


def refusal(code: ErrorCode) -> ErrorAnswer:
    return ErrorAnswer(id="", created=0, error=ErrorBody.of(HeadraceError(code, "why")))


@pytest.mark.parametrize(
    ("replies", "status", "told"),
    [
        ({"a": TokenCount(7)}, 200, 7),
        ({"a": refusal(ErrorCode.MODEL_NOT_FOUND), "b": TokenCount(8)}, 200, 8),
        ({"a": refusal(ErrorCode.UNAVAILABLE), "b": TokenCount(9)}, 200, 9),
        ({"a": None, "b": TokenCount(9)}, 200, 9),
        ({"a": refusal(ErrorCode.UNSUPPORTED_PARAMETER)}, 400, "invalid_request_error"),
        ({"a": refusal(ErrorCode.ENGINE_FAILED)}, 502, "api_error"),
        ({"a": refusal(ErrorCode.UNAVAILABLE)}, 503, "api_error"),
        ({"a": refusal(ErrorCode.MODEL_NOT_FOUND)}, 404, "not_found_error"),
        ({"a": refusal(ErrorCode.MODEL_NOT_FOUND), "b": refusal(ErrorCode.UNAVAILABLE)}, 503, "api_error"),
        ({}, 503, "api_error"),
    ],
)
async def test_tokens_are_counted_by_a_worker_that_has_the_model(
    serve: Serve, bus: Bus, replies: dict[str, TokenCount | ErrorAnswer | None], status: int, told: object
):
    async with serve() as client:
        await workers(bus, replies)

        async def heard() -> bool:
            listed = [each["id"] for each in (await client.get("/v1/models")).json()["data"]]
            return listed == ([*(f"model-{name}" for name in replies), "auto"] if replies else [])

        await eventually(heard)
        answer = await client.post(COUNT, json=CHAT)
        body = answer.json()
        assert (answer.status_code, body.get("input_tokens") or body["error"]["type"]) == (status, told)


async def test_a_model_that_only_ollama_has_is_not_counted(serve: Serve, bus: Bus):
    async with serve() as client:
        status = WorkerStatus("o", "ollama", "ready", ["qwen:1b"], Slots(0, 1), NONE, 0, 0, 0, 0, 0, at=0.0)
        await bus.publish("llm.worker.o", encode(status))

        async def refused() -> bool:
            return (await client.post(COUNT, json=CHAT | {"model": "qwen:1b"})).status_code == 400

        await eventually(refused)
