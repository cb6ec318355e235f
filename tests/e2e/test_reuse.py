"""The prompt cache over HTTP: what a second turn has not computed, in every API, and who shares it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Pipeline
from tests.waiting import eventually

NOTE = "The river runs past the mill, under the stone bridge and down to the sea. " * 8


def turns(topic: str) -> list[dict[str, Any]]:
    """A chat whose beginning no other test has."""
    return [
        {"role": "system", "content": f"You talk about {topic}. {NOTE}"},
        {"role": "user", "content": "What is the capital of France?"},
    ]


@pytest.fixture
async def web(embedded: Pipeline) -> Any:
    async with httpx.AsyncClient(base_url=embedded.http, timeout=60) as client:
        yield client


async def answered(web: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = await web.post(path, json={"temperature": 0, **body})
    return dict(answer.raise_for_status().json())


async def test_a_second_turn_says_how_much_of_its_prompt_was_cached(web: httpx.AsyncClient):
    messages = turns("rivers")
    first = await answered(web, "/v1/chat/completions", {"messages": messages})
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] < 40
    messages += [first["choices"][0]["message"], {"role": "user", "content": "And of Italy?"}]
    second = await answered(web, "/v1/chat/completions", {"messages": messages})
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["prompt_tokens"] - 8
    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]


async def test_every_api_tells_it_in_its_own_words(web: httpx.AsyncClient):
    messages = turns("mills")
    chat = await answered(web, "/v1/chat/completions", {"messages": messages})
    prompt_tokens = chat["usage"]["prompt_tokens"]
    again = await answered(web, "/v1/responses", {"input": messages})
    assert again["usage"]["input_tokens_details"]["cached_tokens"] == prompt_tokens - 1
    assert again["usage"]["input_tokens"] == prompt_tokens
    system, user = messages
    body = {"model": "auto", "max_tokens": 20, "system": system["content"], "messages": [user]}
    usage = (await answered(web, "/v1/messages", body))["usage"]
    assert (usage["cache_read_input_tokens"], usage["input_tokens"]) == (prompt_tokens - 1, 1)
    # Ollama counts the whole prompt, cached or not.
    ollama = await answered(web, "/api/chat", {"model": "auto", "messages": messages, "stream": False})
    assert ollama["prompt_eval_count"] == prompt_tokens

    async def cached_by_the_worker() -> bool:
        text = (await web.get("/metrics")).text
        counts = [line.split() for line in text.splitlines() if line.startswith("headrace_prompt_tokens_cached_total")]
        return any(float(value) >= 3 * (prompt_tokens - 1) for _, value in counts)

    await eventually(cached_by_the_worker)
