"""Clients that disconnect and come back, on a real pipeline or a gateway whose engine the test plays."""

from __future__ import annotations

import asyncio
import re

import httpx
import openai

from tests.pipeline.gateway.conftest import Engine, Serve
from tests.waiting import TIMEOUT_S, eventually

ASK = "/v1/chat/completions"
CHAT = {"messages": [{"role": "user", "content": "hello"}]}
KEY = {"Idempotency-Key": "job"}


async def gone(client: httpx.AsyncClient, count: int) -> None:
    """Wait until the gateway knows of at least so many clients that disconnected."""

    async def counted() -> bool:
        found = re.search(r"^headrace_http_gone_total (\d+)$", (await client.get("/metrics")).text, re.MULTILINE)
        return found is not None and int(found[1]) >= count

    await eventually(counted, what=f"{count} clients are gone")


async def open_calls(client: httpx.AsyncClient, count: int) -> None:
    async def counted() -> bool:
        return f"headrace_http_open {count}\n" in (await client.get("/metrics")).text

    await eventually(counted, what=f"{count} responses are open")


async def test_a_client_that_comes_back_within_the_grace_gets_its_answer(serve: Serve, engine: Engine):
    async with serve(http_grace_s=3600) as client:
        first = asyncio.create_task(client.post(ASK, json=CHAT, headers=KEY))
        assert await engine.next_id() == "job"
        first.cancel()
        await gone(client, 1)
        second = asyncio.create_task(client.post(ASK, json=CHAT, headers=KEY))
        await open_calls(client, 1)
        await engine.answer("job")
        answer = await second
        assert answer.json()["choices"][0]["message"]["content"] == "Hello there"
        assert engine.cancelled.empty()


async def test_a_client_that_does_not_come_back_has_its_request_cancelled_after_the_grace(serve: Serve, engine: Engine):
    async with serve(http_grace_s=0.2) as client:
        first = asyncio.create_task(client.post(ASK, json=CHAT, headers=KEY))
        await engine.next_id()
        first.cancel()
        async with asyncio.timeout(TIMEOUT_S):
            assert await engine.cancelled.get() == "job"


async def test_the_grace_is_counted_from_the_last_client_that_disconnected(serve: Serve, engine: Engine):
    async with serve(http_grace_s=3600) as client:
        for count in (1, 2):
            call = asyncio.create_task(client.post(ASK, json=CHAT, headers=KEY))
            await open_calls(client, 1)
            call.cancel()
            await gone(client, count)
        accepted = await client.post(ASK, json=CHAT, headers={**KEY, "Prefer": "respond-async"})
        assert accepted.status_code == 202
    # It is read later, so the gateway that stops cancels nothing.
    assert engine.cancelled.empty()


async def test_a_gateway_that_stops_keeps_no_request_for_a_client_that_is_gone(serve: Serve, engine: Engine):
    async with serve(http_grace_s=3600) as client:
        call = asyncio.create_task(client.post(ASK, json=CHAT, headers=KEY))
        await engine.next_id()
        call.cancel()
        await gone(client, 1)
    async with asyncio.timeout(TIMEOUT_S):
        assert await engine.cancelled.get() == "job"


async def test_openais_client_gets_its_answer_from_its_own_retry_after_a_timeout(serve: Serve, engine: Engine):
    async with serve(http_grace_s=3600) as client:
        url = f"{client.base_url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="any", timeout=0.3, max_retries=20) as gpt:
            asking = asyncio.create_task(
                gpt.chat.completions.create(model="auto", messages=CHAT["messages"], extra_headers=KEY)
            )
            await engine.next_id()
            await gone(client, 1)
            await engine.answer("job")
            assert (await asking).choices[0].message.content == "Hello there"
        assert engine.cancelled.empty()
