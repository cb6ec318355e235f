"""Quotas of API keys over HTTP: refusals in each dialect, headers, parallel callers, two gateways, a restart."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from pipeline.broker.usage import NoteFeed
from pipeline.engine import Work
from pipeline.gateway.identity import make_key
from pipeline.gateway.quotas import KeyQuotas
from pipeline.wire.answers import Usage
from pipeline.wire.messages import encode
from pipeline.wire.subjects import MSG_ID, USED, Priority
from pipeline.wire.usage import UsageNote, UsageNotes
from tests.consumers.monitor.conftest import monitor
from tests.pipeline.worker.conftest import ScriptedEngine, start
from tests.waiting import eventually

__all__ = ["monitor", "start"]

OPEN = {"http_answers_per_s": 0, "http_statistics_per_s": 0, "http_lists_per_s": 0}
SAID = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 10}


def made(name: str, **fields):
    """A key, and its entry."""
    secret, entry = make_key(name)
    return {"authorization": f"Bearer {secret}"}, type(entry)(name=name, hash=entry.hash, **fields)


class Spending(ScriptedEngine):
    """Answers each request at once, or when the test says so, with an account of so many tokens."""

    tokens = 15
    at_once = True

    async def submit(self, work: Work):
        generation = await super().submit(work)
        if self.at_once:
            self.finish(generation)
        return generation

    def finish(self, generation) -> None:
        usage = Usage(self.tokens - 2, 2, self.tokens)
        generation.say("ok", finish_reason="stop", usage=usage)


async def post(web, by, path="/v1/chat/completions", **body):
    return await web.post(path, json=SAID | body, headers=by)


async def left(web, by, what="tokens") -> int:
    return int((await web.get("/v1/models", headers=by)).headers[f"x-ratelimit-remaining-{what}"])


async def test_each_response_tells_what_is_left(serve, start):
    await start(Spending())
    by, entry = made("alice", tokens_per_minute=100, requests_per_minute=5)
    free, unlimited = made("bob")
    async with serve(http_keys=[entry, unlimited], **OPEN) as web:
        said = await post(web, by)
        assert said.status_code == 200, said.text
        limits = {name: value for name, value in said.headers.items() if name.startswith("x-ratelimit")}
        assert limits["x-ratelimit-limit-requests"] == "5"
        assert limits["x-ratelimit-remaining-requests"] == "4"
        assert limits["x-ratelimit-limit-tokens"] == "100"
        assert {"x-ratelimit-reset-tokens", "x-ratelimit-reset-requests", "x-ratelimit-remaining-tokens"} <= set(limits)
        await eventually(lambda: _is(left(web, by), 85), what="the account replaces the estimate")
        streamed = await post(web, by, stream=True)
        assert "x-ratelimit-remaining-tokens" in streamed.headers
        assert "x-ratelimit-limit-tokens" not in (await post(web, free)).headers


async def _is(value, expected) -> bool:
    return await value == expected


async def test_a_refusal_has_the_form_of_each_dialect(serve, start):
    await start(Spending())
    by, entry = made("alice", requests_per_minute=1)
    async with serve(http_keys=[entry], **OPEN) as web:
        assert (await post(web, by)).status_code == 200
        refused = await post(web, by)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert "1 requests per minute" in refused.json()["error"]["message"]
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        anthropic = await post(web, by, "/v1/messages")
        assert anthropic.status_code == 429
        assert anthropic.json()["error"]["type"] == "rate_limit_error"
        assert anthropic.headers["anthropic-ratelimit-requests-remaining"] == "0"
        assert anthropic.headers["anthropic-ratelimit-requests-reset"].endswith("Z")
        ollama = await post(web, by, "/api/chat")
        assert ollama.status_code == 429
        assert isinstance(ollama.json()["error"], str)


async def test_a_day_that_is_used_up_is_an_insufficient_quota_for_requests_and_batches(serve, start):
    engine = Spending()
    engine.tokens = 100
    await start(engine)
    by, entry = made("alice", tokens_per_day=100)
    async with serve(http_keys=[entry], **OPEN) as web:
        assert (await post(web, by)).status_code == 200
        await eventually(lambda: _is(left(web, by), 0), what="the account is there")
        refused = await post(web, by)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == refused.json()["error"]["type"] == "insufficient_quota"
        assert refused.headers["x-should-retry"] == "false"
        order = {"input_file_id": "file-x", "endpoint": "/v1/chat/completions", "completion_window": "1h"}
        assert (await web.post("/v1/batches", json=order, headers=by)).json()["error"]["code"] == "insufficient_quota"


async def test_twenty_parallel_callers_exceed_a_limit_by_at_most_one_request_each(serve, start):
    engine = Spending(slots=8)
    engine.tokens = 40  # more than twice what is estimated
    await start(engine)
    by, entry = made("alice", tokens_per_minute=400)
    async with serve(http_keys=[entry], **OPEN) as web:
        answered = []

        async def caller() -> None:
            while (said := await post(web, by)).status_code == 200:
                answered.append(said.json()["usage"]["total_tokens"])
            assert said.json()["error"]["code"] == "rate_limit_exceeded"

        await asyncio.gather(*(caller() for _ in range(20)))
        used = sum(answered)
        assert 400 - 40 <= used <= 400 + 20 * 40
        await eventually(lambda: _is(left(web, by), 0), what="the accounts are there")
    print(f"20 callers, limit 400 tokens: {used} used in {len(answered)} requests of 40")


async def test_two_gateways_share_a_limit(serve, start):
    engine = Spending(slots=8)
    engine.at_once = False
    await start(engine)
    by, entry = made("alice", tokens_per_minute=100, requests_per_minute=3)
    async with AsyncExitStack() as stack:
        one, other = [await stack.enter_async_context(serve(http_keys=[entry], **OPEN)) for _ in range(2)]
        running = asyncio.create_task(post(one, by, max_tokens=80))
        await eventually(lambda: _is(left(one, by, "requests"), 2), what="the first one is let in")
        await eventually(lambda: _is(left(other, by, "requests"), 2), what="the other gateway hears of it")
        assert (await post(other, by, max_tokens=80)).status_code == 429
        (generation,) = await eventually(lambda: list(engine.running))
        engine.finish(generation)
        assert (await running).status_code == 200
        for web in (one, other):
            await eventually(lambda web=web: _is(left(web, by), 85), what="both have the account")


async def test_an_account_that_comes_twice_counts_once_also_for_a_gateway_that_starts_between(serve, bus):
    by, entry = made("alice", tokens_per_minute=100, tokens_per_day=1000)

    async def store(*names: str) -> None:
        notes = {f"{name}@1": UsageNote(name, "done", Priority.LOW, key="alice", completion=10) for name in names}
        await bus.store(USED, encode(UsageNotes(notes)), headers={MSG_ID: "+".join(names)})

    async with serve(http_keys=[entry], **OPEN) as first:
        await store("a", "b")
        await eventually(lambda: _is(left(first, by), 80), what="both are counted")
        async with serve(http_keys=[entry], **OPEN) as second:
            await eventually(lambda: _is(left(second, by), 80), what="the other gateway has read them")
            await store("b", "a", "c")
            await store("d")
            for web in (first, second):
                await eventually(lambda web=web: _is(left(web, by), 60), what="the new ones are counted")


async def test_a_key_that_gets_its_limit_while_accounts_are_read_knows_what_it_used(bus, monkeypatch):
    (_, alice), (_, bob) = (made(name, tokens_per_minute=100) for name in ("alice", "bob"))
    quotas, after = KeyQuotas(bus, [alice]), NoteFeed.after

    async def changed_meanwhile(feed, sequence):
        async for stored in after(feed, sequence):
            if stored.sequence == 3:
                quotas.use([alice, bob])
            yield stored

    monkeypatch.setattr(NoteFeed, "after", changed_meanwhile)
    await quotas.start()
    await eventually(lambda: not quotas._outdated.is_set(), what="the accounts are read")
    for number, key in enumerate(["alice", "bob", "alice", "alice"], 1):
        note = UsageNote(f"r{number}", "done", Priority.LOW, key=key, completion=10)
        await bus.store(USED, encode(note), headers={MSG_ID: f"r{number}@1"})
    remaining = "x-ratelimit-remaining-tokens"
    await eventually(lambda: quotas.headers(bob)[remaining] == "90" if quotas.headers(bob) else False)
    await eventually(lambda: quotas.headers(alice)[remaining] == "70")
    quotas.stop()


async def test_a_gateway_that_starts_knows_what_was_used(serve, start, monitor):
    await monitor()
    await start(Spending())
    by, entry = made("alice", tokens_per_day=100)
    recent = made("bob", tokens_per_minute=100)
    keys = [entry, recent[1]]
    async with serve(http_keys=keys, **OPEN) as web:
        for each in (by, recent[0]):
            assert (await post(web, each)).status_code == 200
            await eventually(lambda each=each: _is(left(web, each), 85))
    async with serve(http_keys=keys, **OPEN) as web:
        for each in (by, recent[0]):
            await eventually(lambda each=each: _is(left(web, each), 85), what="the accounts are read")


@pytest.mark.parametrize("choices", [1, 2])
async def test_a_request_that_is_not_stored_reserves_nothing(serve, start, bus, choices):
    by, entry = made("alice", tokens_per_minute=100)
    async with serve(http_keys=[entry], **OPEN, lane_max_messages=1) as web:
        await bus.store("llm.request.medium", b"x", headers={"Nats-Msg-Id": "first"})
        assert (await post(web, by, n=choices)).status_code == 503
        assert await left(web, by) == 100
