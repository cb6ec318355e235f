"""A request that crashes the engine each time, sent by OpenAI's client with its own retries."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.e2e.conftest import Pipeline, running
from tests.waiting import eventually

ENGINE = ("--engine", "simulated", "--engine-faults", "--simulated-answer-tokens", "20")
ALONE = ("--no-ollama-standin", "--ollama-host", "127.0.0.1:9")
POISON = [{"role": "user", "content": "[[fault:segfault@3]]"}]
GOOD = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    with running(tmp_path_factory.mktemp("fragile"), *ENGINE, *ALONE) as pipeline:
        yield pipeline


@pytest.mark.parametrize("stream", [False, True])
async def test_it_is_one_dead_letter_and_the_client_is_told_not_to_retry(fragile: Pipeline, stream: bool):
    async with (
        httpx.AsyncClient(base_url=fragile.http, timeout=60) as web,
        openai.AsyncOpenAI(base_url=f"{fragile.http}/v1", api_key="unused", max_retries=2) as client,
    ):
        before = {letter["id"] for letter in (await web.get("/queue/dead")).json()["data"]}

        async def ask() -> None:
            answer = await client.chat.completions.create(model="auto", messages=POISON, stream=stream)
            if stream:
                async for _ in answer:
                    pass

        with pytest.raises(openai.APIError) as raised:
            await ask()
        assert raised.value.code == "engine_failed"
        if not stream:
            assert raised.value.status_code == 502
            assert raised.value.response.headers["x-should-retry"] == "false"

        async def buried() -> list[dict]:
            letters = (await web.get("/queue/dead")).json()["data"]
            return [letter for letter in letters if letter["id"] not in before]

        # The gateway allows one client 20 calls for statistics a second.
        [letter] = await eventually(buried, every_s=0.1)
        # The reader and the letter agree.
        assert letter["message"] == raised.value.body["message"]
        good = await client.chat.completions.create(model="auto", messages=GOOD)
        assert good.choices[0].message.content
        assert len(await buried()) == 1

        async def counted() -> bool:
            stats = (await web.get("/queue/stats")).json()
            return stats["errors"].get("engine_failed", 0) == stats["dead"] == len(before) + 1

        await eventually(counted, what="one failed request for each letter", every_s=0.1)
