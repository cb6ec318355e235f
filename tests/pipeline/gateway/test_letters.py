"""Dead letters over HTTP, each caller's own."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from pipeline.broker import topology
from pipeline.broker.connection import BusError, Unreachable
from pipeline.broker.jetstream import Bus
from pipeline.config import Config
from pipeline.core.envelope import Envelope
from pipeline.core.letters import letter_headers
from pipeline.gateway.identity import make_key
from pipeline.gateway.queue import answered
from pipeline.gateway.statuses import HttpError
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.subjects import DEAD, STREAM_DEAD, TENANT, Priority, Task
from tests.pipeline.gateway.conftest import Engine, Serve

SECRET, KEY = make_key("alice")
OTHER_SECRET, OTHER = make_key("bob")
BOSS_SECRET, BOSS = make_key("boss")
OPERATOR = msgspec.structs.replace(BOSS, operator=True)
CRASH = HeadraceError(ErrorCode.ENGINE_FAILED, "it crashed the engine")


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


@pytest.fixture
def bury(bus: Bus):
    async def store(
        request_id: str, body: bytes = b'{"prompt": "why"}', *, sequence: int = 1, tenant: str = ""
    ) -> None:
        envelope = Envelope(request_id, Priority.LOW, Task.UNTRIAGED, 1000.5, 3)
        own = {TENANT: tenant} if tenant else {}
        subject = "llm.request.low"
        headers = letter_headers(
            envelope, own, subject=subject, sequence=sequence, error=CRASH, attempts=3, trace_id=""
        )
        await bus.store(f"{DEAD}.low", body, headers=headers)

    return store


async def ids(client: Any, headers: dict[str, str] | None = None) -> list[str]:
    return [row["id"] for row in (await client.get("/queue/dead", headers=headers)).json()["data"]]


async def test_without_letters_the_list_is_empty(serve: Serve, bus: Bus):
    async with serve() as client:
        listed = await client.get("/queue/dead")
        assert (listed.status_code, listed.json()) == (200, {"object": "list", "data": [], "total": 0})


async def test_the_list_has_the_latest_first_and_says_what_of_they_died(serve: Serve, bury: Any):
    await bury("r1")
    await bury("r2")
    async with serve() as client:
        listed = (await client.get("/queue/dead")).json()
        assert [row["id"] for row in listed["data"]] == ["r2", "r1"]
        row = listed["data"][0]
        assert (row["code"], row["message"], row["attempts"]) == ("engine_failed", "it crashed the engine", 3)
        assert row["priority"] == "low"
        assert 0 <= row["age_s"] < 60


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (b'{"prompt": "why", "n": 1}', {"prompt": "why", "n": 1}),
        (b"a plain question", "a plain question"),
        (b'{"prompt": ', '{"prompt": '),
        (b"\xff<script>", "\\xff<script>"),
    ],
)
async def test_a_letter_is_shown_whole(serve: Serve, bury: Any, body: bytes, shown: object):
    await bury("r1", body, tenant="me")
    async with serve() as client:
        letter = (await client.get("/queue/dead/r1")).json()
        assert (letter["object"], letter["id"], letter["request"]) == ("headrace.dead", "r1", shown)
        assert letter["headers"] == {TENANT: "me"}


async def test_a_replay_queues_the_request_again_and_takes_the_letter_away(serve: Serve, bury: Any, engine: Engine):
    await bury("r1")
    async with serve() as client:
        replayed = await client.post("/queue/dead/r1/replay")
        assert replayed.status_code == 202
        assert (replayed.json()["id"], replayed.json()["subject"]) == ("r1", "llm.request.low")
        assert replayed.json()["events_url"] == "/queue/requests/r1/events"
        assert await engine.next_subject() == "llm.request.low"
        assert await ids(client) == []
        assert (await client.post("/queue/dead/r1/replay")).status_code == 404


async def test_of_two_letters_under_one_id_the_latest_is_replayed_and_both_are_purged(
    serve: Serve, bury: Any, bus: Bus
):
    await bury("r1", b"first")
    await bury("r1", b"second", sequence=2)
    async with serve() as client:
        assert (await client.get("/queue/dead/r1")).json()["request"] == "second"
        purged = await client.delete("/queue/dead/r1")
        assert purged.json() == {"object": "headrace.purged", "id": "r1", "purged": 2}
        assert (await bus.stream_state(STREAM_DEAD)).messages == 0


async def test_on_a_full_lane_the_letter_stays(serve: Serve, bury: Any, bus: Bus, config: Config):
    await topology.apply(bus.js, msgspec.structs.replace(config, lane_max_messages=1))
    await bus.store("llm.request.low", b"x", headers={"Nats-Msg-Id": "first"})
    await bury("r1")
    async with serve(lane_max_messages=1) as client:
        refused = await client.post("/queue/dead/r1/replay")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
        assert "retry-after" in refused.headers
        assert await ids(client) == ["r1"]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_an_id_that_no_letter_has_is_not_found(serve: Serve, bus: Bus, method: str):
    async with serve() as client:
        answer = await client.request(method, "/queue/dead/ghost")
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "id")


async def test_a_tenant_reaches_its_own_letters_and_no_others(serve: Serve, bury: Any, bus: Bus):
    await bury("alice-job", tenant="alice")
    await bury("bob-work", tenant="bob")
    await bury("nobodys")
    async with serve(http_keys=[KEY, OTHER, OPERATOR]) as client:
        assert (await client.get("/queue/dead")).status_code == 401
        assert await ids(client, bearer(SECRET)) == ["alice-job"]
        assert await ids(client, bearer(BOSS_SECRET)) == ["nobodys", "bob-work", "alice-job"]
        for path in ("bob-work", "work", "nobodys"):
            for method, more in (("GET", ""), ("POST", "/replay"), ("DELETE", "")):
                answer = await client.request(method, f"/queue/dead/{path}{more}", headers=bearer(SECRET))
                assert answer.status_code == 404, (method, path)
        assert (await bus.stream_state(STREAM_DEAD)).messages == 3
        # By the id that was given, or the whole one.
        assert (await client.get("/queue/dead/job", headers=bearer(SECRET))).json()["id"] == "alice-job"
        assert (await client.delete("/queue/dead/alice-job", headers=bearer(SECRET))).status_code == 200
        assert (await client.post("/queue/dead/bob-work/replay", headers=bearer(BOSS_SECRET))).status_code == 202
        assert await ids(client, bearer(BOSS_SECRET)) == ["nobodys"]


@pytest.mark.parametrize("error", [BusError("refused"), Unreachable("away")])
async def test_whatever_the_broker_cannot_do_is_a_503_that_says_when_to_come_back(error: BusError):
    async def asked() -> None:
        raise error

    with pytest.raises(HttpError) as caught:
        await answered(asked())
    assert (caught.value.status, caught.value.code, caught.value.retry_after_s) == (503, ErrorCode.UNAVAILABLE, 1)
