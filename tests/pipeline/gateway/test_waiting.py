"""What clients hear while their requests wait, in each dialect; a fake monitor says where they stand."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest

from pipeline.broker.jetstream import Bus
from pipeline.wire.answers import ErrorAnswer, ErrorBody
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import Position
from pipeline.wire.subjects import QUEUE_POSITION
from tests.pipeline.gateway.conftest import Engine, Serve

TURN = [{"role": "user", "content": "hello"}]
STREAMS = {
    "/v1/chat/completions": {"messages": TURN, "stream": True},
    "/v1/completions": {"prompt": "hello", "stream": True},
    "/v1/responses": {"input": "hello", "stream": True},
    "/v1/messages": {"messages": TURN, "stream": True, "max_tokens": 9},
    "/api/chat": {"model": "auto", "messages": TURN},
    "/api/generate": {"model": "auto", "prompt": "hello"},
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.gateway.answering.KEEP_ALIVE_S", 0.05)
    monkeypatch.setattr("pipeline.gateway.answering.STATUS_S", 0.05)


async def standing(bus: Bus, position: int) -> None:
    """Play the monitor: every request is queued behind so many others."""

    async def answer(_: str, body: bytes) -> bytes:
        return msgspec.json.encode(Position(body.decode(), "queued", position, 1500.0))

    await bus.serve("test", "positions", {QUEUE_POSITION: answer}, queue="test")


def statuses(text: str) -> list[dict[str, Any]]:
    """The `headrace.status` messages of a stream of any dialect."""
    lines = [line.removeprefix("data: ") for line in text.splitlines()]
    parts = [json.loads(line) for line in lines if line.startswith("{")]
    found = [part if "object" in part else part.get("headrace") for part in parts]
    return [one for one in found if one and one.get("object") == "headrace.status"]


@pytest.mark.parametrize("path", STREAMS)
async def test_a_stream_says_where_its_request_stands_if_that_is_wanted(
    serve: Serve, engine: Engine, bus: Bus, path: str
):
    await standing(bus, 3)
    async with (
        serve() as client,
        client.stream("POST", path, json=STREAMS[path], headers={"X-Headrace-Status": "1"}) as response,
    ):
        request_id = await engine.next_id()
        parts = response.aiter_text()
        text = ""
        while len(statuses(text)) < 2:
            text += await anext(parts)
        assert {key: statuses(text)[1][key] for key in ("id", "state", "position", "eta_ms")} == {
            "id": request_id,
            "state": "queued",
            "position": 3,
            "eta_ms": 1500.0,
        }
        await engine.answer(request_id)
        rest = "".join([part async for part in parts])
        assert "Hello" in rest


@pytest.mark.parametrize("path", STREAMS)
async def test_otherwise_it_says_only_that_it_is_alive(serve: Serve, engine: Engine, bus: Bus, path: str):
    await standing(bus, 3)
    async with serve() as client, client.stream("POST", path, json=STREAMS[path]) as response:
        parts = response.aiter_text()
        text = await anext(parts)
        await engine.answer(await engine.next_id())
        text += "".join([part async for part in parts])
        assert not statuses(text)


async def test_without_a_monitor_a_stream_with_statuses_says_that_it_is_alive(serve: Serve, engine: Engine):
    path = "/v1/chat/completions"
    async with (
        serve() as client,
        client.stream("POST", path, json=STREAMS[path], headers={"X-Headrace-Status": "1"}) as response,
    ):
        lines = response.aiter_lines()
        assert await anext(lines) == ": waiting"
        await engine.answer(await engine.next_id())
        assert [line async for line in lines][-2] == "data: [DONE]"


WHOLE = {path: {**body, "stream": False} for path, body in STREAMS.items()}


@pytest.mark.parametrize("path", WHOLE)
async def test_a_whole_response_begins_with_white_space_if_that_is_wanted(serve: Serve, engine: Engine, path: str):
    async with (
        serve() as client,
        client.stream("POST", path, json=WHOLE[path], headers={"X-Headrace-Keep-Alive": "1"}) as response,
    ):
        parts = response.aiter_text()
        assert (await anext(parts)).strip() == ""
        await engine.answer(await engine.next_id())
        assert "Hello there" in json.dumps(json.loads("".join([part async for part in parts])))


async def test_an_error_behind_white_space_has_the_status_200_and_its_envelope(serve: Serve, engine: Engine):
    path = "/v1/chat/completions"
    async with (
        serve() as client,
        client.stream("POST", path, json=WHOLE[path], headers={"X-Headrace-Keep-Alive": "1"}) as response,
    ):
        parts = response.aiter_text()
        await anext(parts)
        error = ErrorBody.of(HeadraceError(ErrorCode.ENGINE_FAILED, "it failed"))
        await engine.write(await engine.next_id(), ErrorAnswer(id="", created=0, error=error))
        assert json.loads("".join([part async for part in parts]))["error"]["code"] == "engine_failed"
        assert response.status_code == 200


async def test_a_whole_response_otherwise_has_a_length(serve: Serve, engine: Engine):
    async with serve() as client:
        asking = asyncio.create_task(client.post("/api/chat", json=WHOLE["/api/chat"]))
        await engine.answer(await engine.next_id())
        assert "content-length" in (await asking).headers
