"""The accounts of use over HTTP, and that each way in counts each request once."""

from __future__ import annotations

import asyncio
import json

import pytest

from consumers.batches.batches import Batches
from pipeline.gateway.identity import make_key
from pipeline.process.lifecycle import Lifecycle
from pipeline.process.role import role
from tests.consumers.monitor.conftest import monitor
from tests.pipeline.worker.conftest import ScriptedEngine, start
from tests.waiting import TIMEOUT_S, eventually

__all__ = ["monitor", "start"]


def made(name: str, **fields):
    """A key, and its entry."""
    secret, entry = make_key(name)
    return secret, type(entry)(name=name, hash=entry.hash, **fields)


ALICE, ALICE_ENTRY = made("alice", tenant="acme")
BOB, BOB_ENTRY = made("bob", tenant="acme")
CAROL, CAROL_ENTRY = made("carol")
ROOT, ROOT_ENTRY = made("root", operator=True)
KEYS = [ALICE_ENTRY, BOB_ENTRY, CAROL_ENTRY, ROOT_ENTRY]
CHAT = {"messages": [{"role": "user", "content": "x"}]}


def by(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def usage(web, key=ROOT, *, requests: int, tenant: str | None = None):
    """The accounts of the day, once they count so many requests."""

    async def counted():
        day = (await web.get("/queue/usage", headers=by(key))).json()["day"]
        return (
            day
            if sum(day["total"]["requests"].get(k, 0) for k in ("done", "failed", "cancelled")) == requests
            else None
        )

    return await eventually(counted, what=f"{requests} requests are counted", every_s=0.1)


class Answering(ScriptedEngine):
    """Answers each request with "ok", two tokens after a prompt of three."""

    async def submit(self, work):
        generation = await super().submit(work)
        generation.finish("ok")
        return generation


@pytest.fixture
async def pipeline(serve, monitor, start):
    """A gateway with four keys, a monitor and a worker."""
    await monitor()
    await start(Answering(slots=8))
    async with serve(http_keys=KEYS, http_answers_per_s=0, http_statistics_per_s=0) as web:
        yield web


async def test_every_way_in_counts_each_request_once_for_its_tenant_and_its_key(pipeline, bus, config):
    for key in (ALICE, ALICE, BOB, CAROL):
        said = await pipeline.post("/v1/chat/completions", json=CHAT, headers=by(key))
        assert said.status_code == 200, said.text
    assert (await pipeline.post("/v1/chat/completions", json={**CHAT, "n": 2}, headers=by(CAROL))).status_code == 200
    await bus.store("llm.request.low.t.bolt", b"x", headers={"Nats-Msg-Id": "t.bolt.one"})
    await bus.store("llm.request.low", b"x", headers={"Nats-Msg-Id": "two"})
    asked = await bus.request("llm.ask.high", b"x", timeout_s=TIMEOUT_S)
    assert json.loads(asked.data)["object"] == "chat.completion"
    day = await usage(pipeline, requests=9)
    assert {each["tenant"]: each["requests"]["done"] for each in day["tenants"]} == {
        "acme": 3,
        "carol": 3,
        "bolt": 1,
        "default": 2,
    }
    assert {each["key"]: each["requests"]["done"] for each in day["keys"]} == {"alice": 2, "bob": 1, "carol": 3}
    assert day["total"]["tokens"] == {"prompt": 27, "completion": 18}


async def test_the_lines_of_a_batch_are_charged_to_its_key(pipeline, config):
    async with role("batches", config) as me:
        lifecycle = Lifecycle("batches", drain_timeout_s=5)
        lifecycle.report = lambda *_, **__: None
        running = asyncio.create_task(Batches(me, config).run(lifecycle))
        line = {"method": "POST", "url": "/v1/chat/completions", "body": CHAT}
        lines = "\n".join(json.dumps({"custom_id": str(n), **line}) for n in range(3))
        form = {"files": {"file": ("x.jsonl", lines)}, "data": {"purpose": "batch"}, "headers": by(ALICE)}
        stored = (await pipeline.post("/v1/files", **form)).json()
        order = {"input_file_id": stored["id"], "endpoint": line["url"], "completion_window": "1h"}
        assert (await pipeline.post("/v1/batches", json=order, headers=by(ALICE))).status_code == 200
        day = await usage(pipeline, requests=3)
        lifecycle.stop()
        await asyncio.wait_for(running, 20)
    (alice,) = day["keys"]
    assert (alice["tenant"], alice["key"], alice["requests"]) == ("acme", "alice", {"done": 3, "batch": 3})


async def test_a_key_sees_its_tenant_and_itself_and_an_operator_sees_all(pipeline):
    for key in (ALICE, BOB, CAROL):
        await pipeline.post("/v1/chat/completions", json=CHAT, headers=by(key))
    assert len((await usage(pipeline, requests=3))["tenants"]) == 2
    mine = await usage(pipeline, ALICE, requests=2)
    assert [each["tenant"] for each in mine["tenants"]] == ["acme"]
    assert [each["key"] for each in mine["keys"]] == ["alice"]
    assert (await pipeline.get("/queue/usage")).status_code == 401
    text = (await pipeline.get("/metrics", headers=by(ALICE))).text
    assert 'headrace_usage_tokens_total{tenant="acme",kind="prompt"} 6' in text
    assert 'headrace_usage_key_requests_total{tenant="acme",key="alice",outcome="done"} 1' in text
    assert "carol" not in text
    assert "bob" not in text
    assert "carol" in (await pipeline.get("/metrics", headers=by(ROOT))).text


async def test_without_a_monitor_the_accounts_are_unavailable(serve):
    async with serve() as web:
        assert (await web.get("/queue/usage")).status_code == 503
        assert (await web.get("/metrics")).status_code == 200


async def test_a_key_of_a_tenant_is_refused_when_all_tenants_together_have_the_most(serve, monitor, bus):
    it = await monitor()
    await bus.store("llm.request.medium.t.other", b"x", headers={"Nats-Msg-Id": "t.other.r1"})
    async with serve(http_keys=KEYS, tenants_max_messages=1, http_answers_per_s=0) as web:
        headers = {"prefer": "respond-async"}

        async def answer(key):
            return await web.post("/v1/chat/completions", json=CHAT, headers=headers | by(key))

        async def known():
            return it.load.loads["mlx"].queued_tenants.medium == 1

        await eventually(known)

        async def refused():
            found = await answer(ALICE)
            return found if found.status_code == 503 else None

        error = (await eventually(refused, what="the gateway has heard of the load")).json()["error"]
        assert error["code"] == "queue_full"
        assert "tenants_max_messages" in error["message"]
        assert (await answer(ROOT)).status_code == 202, "the default tenant has lanes of its own"
