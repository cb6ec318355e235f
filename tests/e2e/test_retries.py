"""Clients that give up and send the same request again, with a pipeline that takes its time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Pipeline, asking, chat, running
from tests.waiting import eventually

ASK = "/v1/chat/completions"
# One answer at a time, of 2 s each.
SLOW = ("--engine", "simulated", "--slots", "1", "--simulated-answer-tokens", "40", "--simulated-tokens-per-s", "20")
ALONE = ("--no-ollama-standin", "--ollama-host", "127.0.0.1:9")


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    with running(
        tmp_path_factory.mktemp("slow"), *SLOW, *ALONE, "--http-grace-s", "0.05", "--http-statistics-per-s", "0"
    ) as pipeline:
        yield pipeline


@pytest.fixture
async def web(slow: Pipeline) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=slow.http, timeout=60) as client:
        yield client


async def state(web: httpx.AsyncClient, request_id: str) -> dict[str, Any]:
    return (await web.get(f"/queue/requests/{request_id}")).json()


async def given_up(web: httpx.AsyncClient, key: str, state_before: str) -> None:
    """A client that disconnects while its request is queued or running, and whose request ends as cancelled."""
    call = asyncio.create_task(web.post(ASK, json=chat("hello"), headers={"Idempotency-Key": key}))

    async def there() -> bool:
        return (await state(web, key)).get("state") == state_before

    async def cancelled() -> bool:
        return (await state(web, key)).get("answer", {}).get("object") == "error"

    await eventually(there, what=f"{key} is {state_before}")
    call.cancel()
    await eventually(cancelled, what=f"{key} is cancelled")


@pytest.mark.parametrize("before", ["running", "queued"])
async def test_a_request_that_was_cancelled_for_its_client_begins_anew(web: httpx.AsyncClient, before: str):
    key = f"anew-{before}"
    ahead = [f"ahead-{number}" for number in range(5)] if before == "queued" else []
    for name in ahead:
        later = {"Prefer": "respond-async", "Idempotency-Key": name}
        assert (await web.post(ASK, json=chat("first"), headers=later)).status_code == 202
    await given_up(web, key, before)
    for name in ahead:
        await web.delete(f"/queue/requests/{name}")
    calls = [web.post(ASK, json=chat("hello"), headers={"Idempotency-Key": key}) for _ in range(2)]
    one, other = await asyncio.gather(*calls)
    assert [one.status_code, other.status_code] == [200, 200], one.text + other.text
    # One request, answered once, and a later call gets the same.
    later = await web.post(ASK, json=chat("hello"), headers={"Idempotency-Key": key})
    assert one.json() == other.json() == later.json()
    assert one.json()["headrace"]["attempts"] == 1


async def test_it_can_begin_anew_more_than_once_and_its_record_is_its_own(web: httpx.AsyncClient, slow: Pipeline):
    for _ in range(2):
        await given_up(web, "twice", "running")
    answer = await web.post(ASK, json=chat("hello"), headers={"Idempotency-Key": "twice"})
    assert answer.status_code == 200, answer.text
    async with asking(slow.url) as asker:

        async def its_own() -> bool:
            info = await asker.js.stream_info("LLM_REPLIES", subjects_filter="llm.reply.twice")
            return info.state.subjects == {"llm.reply.twice": 1}

        # The cancelled request's messages are purged once the new one's first is stored; a client may read it sooner.
        await eventually(its_own, what="the record holds the answer alone")
