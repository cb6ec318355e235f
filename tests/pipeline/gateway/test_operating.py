"""An operator over HTTP and by command: pauses, and changes of priority; who can, and what is kept of it."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import msgspec
import pytest

from pipeline import cli
from pipeline.broker import operator
from pipeline.commands import batch, send
from pipeline.gateway.identity import make_key
from pipeline.wire.pauses import PauseCall
from pipeline.wire.subjects import Priority
from tests.consumers.batches.conftest import desk as desk  # noqa: PLC0414 - a fixture
from tests.consumers.batches.conftest import line
from tests.consumers.monitor.conftest import ask_service, position
from tests.consumers.monitor.conftest import monitor as monitor  # noqa: PLC0414 - a fixture
from tests.pipeline.gateway.conftest import Serve
from tests.pipeline.worker.conftest import Client
from tests.waiting import eventually

SECRET, KEY = make_key("alice")
BOSS_SECRET, BOSS = make_key("boss")
KEYS = [KEY, msgspec.structs.replace(BOSS, operator=True)]
BODY = b'{"prompt":"x"}'


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


@pytest.fixture
async def queued(bus: Any, monitor: Any) -> Any:
    """Stores a request, and waits until its position is known."""
    await monitor()
    client = Client(bus)

    async def store(request_id: str, lane: str = "low", **headers: str) -> None:
        await client.ask(request_id, BODY, lane, **headers)

        async def known() -> bool:
            return (await position(bus, request_id))["state"] == "queued"

        await eventually(known, what=f"{request_id} is queued")

    return store


async def test_a_lane_is_paused_and_resumed_and_the_log_says_by_whom(serve: Serve, queued: Any):
    async with serve(http_keys=KEYS) as client:
        boss = bearer(BOSS_SECRET)
        answer = await client.post("/queue/pause", json={"priority": "low", "reason": "demo"}, headers=boss)
        assert answer.status_code == 200
        (pause,) = answer.json()["pauses"]
        assert (pause["priority"], pause["by"], pause["reason"]) == ("low", "key boss", "demo")
        await queued("boss-a")

        async def shown() -> Any:
            return (await client.get("/queue/requests/boss-a", headers=boss)).json()

        async def is_paused() -> bool:
            return (await shown()).get("paused", False)

        await eventually(is_paused, what="the request is shown as paused")
        assert (await shown())["eta_ms"] is None
        answer = await client.post("/queue/resume", json={"priority": "low"}, headers=boss)
        assert answer.json()["pauses"] == []
        assert [entry["action"] for entry in answer.json()["log"]] == ["pause", "resume"]
        assert (await client.get("/queue/paused", headers=boss)).json() == answer.json()


async def test_only_an_operator_may(serve: Serve, queued: Any):
    await queued("alice-a")
    async with serve(http_keys=KEYS) as client:
        alice = bearer(SECRET)
        for path, body in (
            ("/queue/pause", {"priority": "low"}),
            ("/queue/resume", {"priority": "low"}),
            ("/queue/priority", {"priority": "high", "tenant": "default"}),
            ("/queue/requests/alice-a/priority", {"priority": "high"}),
        ):
            assert (await client.post(path, json=body, headers=alice)).status_code == 403
        await client.post("/queue/pause", json={"tenant": "acme"}, headers=bearer(BOSS_SECRET))
        await client.post("/queue/pause", json={"tenant": "default"}, headers=bearer(BOSS_SECRET))
        seen = (await client.get("/queue/paused", headers=alice)).json()
        assert [(pause["tenant"], pause.get("by")) for pause in seen["pauses"]] == [("default", None)]
        assert seen["log"] == []


async def test_a_request_is_moved_and_the_answer_says_what_cannot_be(serve: Serve, bus: Any, queued: Any):
    await queued("mine")
    async with serve() as client:
        answer = await client.post("/queue/requests/mine/priority", json={"priority": "high"})
        assert (answer.status_code, answer.json()["moved"]) == (200, 1)
        again = await client.post("/queue/requests/mine/priority", json={"priority": "high"})
        assert again.status_code == 409
        assert "already has this priority" in again.json()["error"]["message"]
        assert (await client.post("/queue/requests/nobody/priority", json={"priority": "high"})).status_code == 404
        assert (await client.post("/queue/pause", json={})).status_code == 400
        assert (await client.post("/queue/pause", json={"priority": "urgent"})).status_code == 400
        everything = await client.post("/queue/priority", json={"priority": "medium", "tenant": "default"})
        assert everything.json() == {"object": "headrace.moved", "priority": "medium", "moved": 1, "left": {}}


async def test_a_misspelt_or_empty_field_does_not_make_a_call_concern_more(serve: Serve, bus: Any, queued: Any):
    await queued("mine")
    async with serve() as client:
        for path, body, param in (
            ("/queue/pause", {"lane": "low", "tenant": "default"}, "lane"),
            ("/queue/resume", {"lane": "low", "tenant": "default"}, "lane"),
            ("/queue/priority", {"priority": "high", "tenant": "default", "id": "other"}, "id"),
            ("/queue/priority", {"priority": "high", "tenant": "default", "batch": ""}, "batch"),
            ("/queue/requests/mine/priority", {"priority": "high", "tenant": "default"}, "tenant"),
        ):
            answer = await client.post(path, json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert (await client.get("/queue/paused")).json()["pauses"] == []
    assert (await position(bus, "mine"))["state"] == "queued"


async def test_without_a_monitor_the_answer_is_unavailable(serve: Serve, bus: Any):
    async with serve() as client:
        assert (await client.post("/queue/pause", json={"priority": "low"})).status_code == 503


@pytest.fixture
def run(config: Any, capsys: pytest.CaptureFixture[str]) -> Any:
    async def command(*args: str) -> tuple[int, str, str]:
        code = await asyncio.to_thread(cli.main, [*args, "--nats-url", config.nats_url])
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


async def test_the_commands_pause_list_and_resume(run: Any, bus: Any, queued: Any):
    code, out, _ = await run("pause", "low", "--tenant", "acme", "--reason", "the \x1b[1mdemo")
    assert code == 0
    assert out.startswith("Lane low of tenant acme: paused by ")
    assert "(the \\x1b[1mdemo)" in out
    assert (await run("paused"))[1] == out
    assert json.loads((await run("paused", "--json"))[1])["pauses"][0]["tenant"] == "acme"
    code, out, err = await run("resume", "low")
    assert (code, err) == (1, "headrace: Lane low is not paused. `headrace paused` lists the pauses.\n")
    assert (await run("resume", "low", "--tenant", "acme"))[1] == "Nothing is paused.\n"
    log = (await run("paused", "--log"))[1].splitlines()
    assert [": resumed by" in line for line in log] == [False, True]
    assert (await run("pause"))[0] == 2
    assert (await ask_service(bus, "llm.queue.stats"))["paused"] == []


async def test_the_command_moves_requests(run: Any, queued: Any):
    await queued("mine")
    await queued("line", Llm_Batch="batch_1")
    assert (await run("move", "mine", "high"))[:2] == (0, "1 request moved to high\n")
    assert await run("move", "mine", "high") == (1, "0 requests moved to high\n", "1 not moved: have this priority\n")
    assert (await run("move", "medium", "--batch", "batch_1"))[1] == "1 request moved to medium\n"
    code, _, err = await run("move", "nobody", "high")
    assert (code, "No queued request" in err) == (1, True)
    assert (await run("move", "high"))[0] == 2
    for call in (["", "low", "--tenant", "default"], ["low", "--batch", "", "--tenant", "default"]):
        code, out, err = await run("move", *call)
        assert (code, out, "must not be empty" in err) == (2, "", True)


@pytest.mark.parametrize("scope", [{"priority": Priority.LOW}, {"tenant": "default"}])
async def test_send_says_that_an_operator_has_paused_its_request(
    bus: Any, queued: Any, capsys: pytest.CaptureFixture[str], scope: dict[str, Any]
):
    await operator.pause(bus, PauseCall(**scope))
    sending = asyncio.ensure_future(send._send(send.Sending(text="hi", priority="low"), bus))
    said = io.StringIO()

    async def told() -> bool:
        said.write(capsys.readouterr().err)
        return "paused this request" in said.getvalue()

    await eventually(told, what="the command says that the request is paused")
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending


async def test_batch_says_that_an_operator_has_paused_the_lane(
    bus: Any, queued: Any, desk: Any, capsys: pytest.CaptureFixture[str], tmp_path: Any
):
    await operator.pause(bus, PauseCall(Priority.LOW, reason="the demo"))
    order = await desk.create(line("a"))
    following = asyncio.ensure_future(batch._shown(order, batch.Results.beside(str(tmp_path / "in.jsonl")), bus))
    said = io.StringIO()

    async def told() -> bool:
        said.write(capsys.readouterr().err)
        return "Lane low: paused at " in said.getvalue()

    await eventually(told, what="the command says that the lane is paused")
    assert "(the demo)" in said.getvalue()
    following.cancel()
    with pytest.raises(asyncio.CancelledError):
        await following
