"""Calls of the Responses API at a gateway, with a real broker and real HTTP; the test plays the engine."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from pipeline.gateway.identity import make_key
from pipeline.wire.answers import ErrorAnswer, ErrorBody
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.subjects import STREAM_REQUESTS
from tests.pipeline.gateway.answers import COMPLETION, TOOL_CHUNK, TOOL_COMPLETION
from tests.pipeline.gateway.conftest import Engine, Serve
from tests.waiting import TIMEOUT_S

PATH = "/v1/responses"
CALL = {"input": "hello"}
STREAM = {**CALL, "stream": True}
FAILED = ErrorAnswer(id="", created=0, error=ErrorBody.of(HeadraceError(ErrorCode.ENGINE_FAILED, "It failed.")))


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n") if line.startswith("data: ")]


def text_of(response: dict[str, Any]) -> str:
    return response["output"][0]["content"][0]["text"]


async def published(engine: Engine) -> dict[str, Any]:
    """The newest request on the lane."""
    found = await engine.bus.last_message(STREAM_REQUESTS, "llm.request.medium")
    assert found is not None
    return json.loads(found[1])


async def answered(client: httpx.AsyncClient, engine: Engine, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    asking = asyncio.create_task(client.post(PATH, json=body, headers=headers))
    request_id = await engine.next_id()
    await engine.answer(request_id)
    response = await asking
    assert response.status_code == 200, response.text
    assert response.json()["id"] == response.headers["x-request-id"] == request_id
    return response.json()


async def test_a_call_is_published_as_a_chat_and_answered_as_a_response(serve: Serve, engine: Engine):
    async with serve() as client:
        response = await answered(client, engine, {**CALL, "instructions": "Be brief."})
        assert text_of(response) == "Hello there"
        assert [turn["role"] for turn in (await published(engine))["messages"]] == ["system", "user"]


async def test_a_stream_has_numbered_events_and_ends_without_more(serve: Serve, engine: Engine):
    async with serve() as client:
        asking = asyncio.create_task(client.post(PATH, json=STREAM))
        request_id = await engine.next_id()
        await engine.answer(request_id)
        response = await asking
        assert response.headers["content-type"].startswith("text/event-stream")
        found = events(response.text)
        assert [event["sequence_number"] for event in found] == list(range(len(found)))
        assert found[0]["type"] == "response.created"
        assert found[-1]["type"] == "response.completed"
        assert {event["response"]["id"] for event in found if "response" in event} == {request_id}
        assert response.text.endswith("}\n\n")


async def test_what_was_asked_for_whole_may_be_streamed_afterwards(serve: Serve, engine: Engine):
    async with serve() as client:
        first = asyncio.create_task(client.post(PATH, json=CALL, headers={"Idempotency-Key": "again"}))
        await engine.write(await engine.next_id(), COMPLETION)
        await first
        again = await client.post(PATH, json=STREAM, headers={"Idempotency-Key": "again"})
        assert text_of(events(again.text)[-1]["response"]) == "Hello there"


async def test_while_nobody_answers_the_response_is_in_progress(
    serve: Serve, engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.gateway.answering.KEEP_ALIVE_S", 0.05)
    async with serve() as client, client.stream("POST", PATH, json=STREAM) as response:
        data = (line async for line in response.aiter_lines() if line.startswith("data: "))
        early = [json.loads((await anext(data)).removeprefix("data: ")) for _ in range(3)]
        assert [event["type"] for event in early] == ["response.created", *["response.in_progress"] * 2]
        request_id = await engine.next_id()
        assert {event["response"]["id"] for event in early} == {request_id}
        await engine.answer(request_id)
        late = [json.loads(line.removeprefix("data: ")) async for line in data]
        assert [event["sequence_number"] for event in early + late] == list(range(3 + len(late)))
        assert late[-1]["type"] == "response.completed"


async def test_who_hangs_up_has_the_request_cancelled(serve: Serve, engine: Engine):
    async with serve() as client:
        for body in (CALL, STREAM):
            asking = asyncio.create_task(client.post(PATH, json=body))
            request_id = await engine.next_id()
            asking.cancel()
            async with asyncio.timeout(TIMEOUT_S):
                assert await engine.cancelled.get() == request_id


async def test_who_does_not_wait_may_go(serve: Serve, engine: Engine):
    async with serve() as client:
        accepted = await client.post(PATH, json=STREAM, headers={"Prefer": "respond-async"})
        assert (accepted.status_code, accepted.json()["id"]) == (202, await engine.next_id())


@pytest.mark.parametrize("body", [CALL, STREAM])
async def test_an_error_before_the_first_word_has_its_status(serve: Serve, engine: Engine, body: dict[str, Any]):
    async with serve() as client:
        asking = asyncio.create_task(client.post(PATH, json=body))
        await engine.write(await engine.next_id(), FAILED)
        answer = await asking
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "engine_failed")


async def test_an_error_in_the_middle_comes_in_the_stream(serve: Serve, engine: Engine):
    async with serve() as client:
        asking = asyncio.create_task(client.post(PATH, json=STREAM))
        await engine.write(await engine.next_id(), *engine.chunks(["begun"]), FAILED)
        found = events((await asking).text)
        assert [event["type"] for event in found[-2:]] == ["error", "response.failed"]
        assert found[-2]["error"]["message"] == found[-1]["response"]["error"]["message"] == "It failed."


async def test_a_body_that_is_not_valid_is_refused_in_openais_envelope(serve: Serve, engine: Engine):
    async with serve() as client:
        for body in (b"", b"[]", b'{"input": ', b'{"input": null}', b"hello"):
            answer = await client.post(PATH, content=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request"), body


# ---- a conversation that goes on


async def test_a_response_is_continued_by_its_id(serve: Serve, engine: Engine):
    async with serve() as client:
        asking = asyncio.create_task(client.post(PATH, json={**STREAM, "instructions": "Be brief."}))
        first = await engine.next_id()
        await engine.write(first, TOOL_CHUNK, TOOL_COMPLETION)
        await asking
        output = {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}
        second = await answered(client, engine, {"previous_response_id": first, "input": [output]})
        assert second["previous_response_id"] == first
        third = await answered(client, engine, {"previous_response_id": second["id"], "input": "Thanks."})
        turns = (await published(engine))["messages"]
        assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "assistant", "user"]
        assert turns[1]["tool_calls"][0]["id"] == turns[2]["tool_call_id"] == "call_1"
        assert [turns[3]["content"], turns[4]["content"]] == ["Hello there", "Thanks."]
        # Earlier responses can be continued as well.
        assert third["id"] != (await answered(client, engine, {"previous_response_id": first, "input": "x"}))["id"]


async def test_a_reference_to_an_item_is_read_from_its_record(serve: Serve, engine: Engine):
    async with serve() as client:
        first = await answered(client, engine, {**CALL, "store": False})
        reference = {"type": "item_reference", "id": first["output"][0]["id"]}
        thanks = {"role": "user", "content": "Thanks."}
        await answered(client, engine, {"input": [{"role": "user", "content": "hello"}, reference, thanks]})
        assert [turn["content"] for turn in (await published(engine))["messages"]] == [
            "hello",
            "Hello there",
            "Thanks.",
        ]
        unknown = {"type": "item_reference", "id": "msg_unknown_0"}
        answer = await client.post(PATH, json={"input": [unknown, thanks]})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input")


async def test_a_response_without_an_answer_that_is_kept_is_not_continued(serve: Serve, engine: Engine):
    async with serve() as client:

        async def is_refused(previous: str) -> bool:
            answer = await client.post(PATH, json={**CALL, "previous_response_id": previous})
            assert answer.status_code == 400
            error = answer.json()["error"]
            return error["param"] == "previous_response_id" and "Send the whole conversation" in error["message"]

        assert await is_refused("resp_unknown")
        assert await is_refused("no id at all")
        unkept = await answered(client, engine, {**CALL, "store": False})
        assert await is_refused(unkept["id"])
        waiting = await client.post(PATH, json=CALL, headers={"Prefer": "respond-async"})
        assert await is_refused(waiting.json()["id"])
        await engine.write(await engine.next_id(), FAILED)
        assert await is_refused(waiting.json()["id"])


async def test_a_key_continues_its_own_responses_only(serve: Serve, engine: Engine):
    (secret, alice), (other, bob) = make_key("alice"), make_key("bob")
    async with serve(http_keys=(alice, bob)) as client:
        mine, theirs = [{"Authorization": f"Bearer {each}"} for each in (secret, other)]
        first = await answered(client, engine, CALL, **mine)
        body = {**CALL, "previous_response_id": first["id"]}
        assert (await client.post(PATH, json=body, headers=theirs)).status_code == 400
        assert (await answered(client, engine, body, **mine))["previous_response_id"] == first["id"]
