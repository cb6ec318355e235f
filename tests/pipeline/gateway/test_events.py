"""A request's messages as server-sent events, where the monitor and the record do not agree on whether it has ended."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from pipeline.broker.jetstream import Bus
from pipeline.wire.messages import Position
from pipeline.wire.subjects import QUEUE_POSITION
from tests.pipeline.gateway.answers import COMPLETION
from tests.pipeline.gateway.conftest import Engine, Serve


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.gateway.queue._ASK_AGAIN_S", 0.05)


async def monitor(bus: Bus, state: Callable[[], str]) -> None:
    """Play the monitor."""

    async def answer(_: str, body: bytes) -> bytes:
        return msgspec.json.encode(Position(body.decode(), state()))

    await bus.serve("test", "positions", {QUEUE_POSITION: answer}, queue="test")
    await bus.nc.flush()


def contents(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


@pytest.mark.parametrize("before", ["queued", "running"])
async def test_an_end_that_the_monitor_has_not_heard_of_is_sent_once_it_has(
    serve: Serve, engine: Engine, bus: Bus, before: str
):
    said = iter([before, before, before])
    await monitor(bus, lambda: next(said, "finished"))
    await engine.answer("job")
    async with serve() as client:
        text = (await client.get("/queue/requests/job/events")).text
    assert contents(text)[-1]["object"] == "chat.completion"
    assert [part.get("seq") for part in contents(text)[:-1]] == list(range(len(contents(text)) - 1))
    assert next(said, None) is None


async def test_the_end_of_an_earlier_request_of_the_same_id_is_not_sent(serve: Serve, engine: Engine, bus: Bus):
    await monitor(bus, lambda: "running")
    await engine.write("job", msgspec.structs.replace(COMPLETION, created=1))
    async with serve() as client, client.stream("GET", "/queue/requests/job/events") as response:
        text, written = "", False
        async for part in response.aiter_text():  # a part may hold several keep-alives
            text += part
            if text.count(": waiting") >= 3 and not written:
                written = True
                await engine.write("job", COMPLETION)
    assert [part["created"] for part in contents(text)] == [COMPLETION.created]
