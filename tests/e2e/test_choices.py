"""Calls with several choices: each is a request of its own, and the client gets one response."""

from __future__ import annotations

import httpx
import openai
import pytest

from tests.e2e.conftest import Pipeline

PROMPTS = ["What is the capital of France?", "What is the capital of Japan?"]
AS_CHAT = {"raw": False}
ANSWERS = ["The capital of France is Paris.", "The capital of Japan is Tokyo."]


async def test_several_prompts_are_answered_in_their_order(embedded: Pipeline) -> None:
    async with openai.AsyncOpenAI(base_url=f"{embedded.http}/v1", api_key="any") as client:
        whole = await client.completions.create(model="auto", prompt=PROMPTS, temperature=0, extra_body=AS_CHAT)
        assert [(choice.index, choice.text) for choice in whole.choices] == list(enumerate(ANSWERS))
        assert whole.usage is not None
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens > 30
        texts, ids = ["", ""], set()
        stream = await client.completions.create(
            model="auto",
            prompt=PROMPTS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=AS_CHAT,
        )
        async for part in stream:
            ids.add(part.id)
            usage = part.usage
            for choice in part.choices:
                texts[choice.index] += choice.text
        assert texts == ANSWERS
        assert len(ids) == 1
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens) == (
            whole.usage.prompt_tokens,
            whole.usage.completion_tokens,
        )


async def test_choices_of_a_chat_are_drawn_apart(embedded: Pipeline) -> None:
    async with openai.AsyncOpenAI(base_url=f"{embedded.http}/v1", api_key="any") as client:
        answer = await client.chat.completions.create(
            model="auto",
            messages=[{"role": "user", "content": "x"}],
            n=3,
            seed=7,
            temperature=50,
            max_tokens=12,
        )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "n": 33}, "n"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "n": 1.5}, "n"),
        ("/v1/completions", {"prompt": ["x"] * 17, "n": 2}, "prompt"),
        ("/v1/completions", {"prompt": [[1, 2], [3]]}, "prompt"),
        ("/v1/completions", {"prompt": []}, "prompt"),
    ],
)
async def test_what_cannot_be_several_choices_is_refused(embedded: Pipeline, path: str, body: object, param: str):
    async with httpx.AsyncClient(base_url=embedded.http) as web:
        answer = await web.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_an_error_of_one_choice_is_the_responses(embedded: Pipeline) -> None:
    async with httpx.AsyncClient(base_url=embedded.http, timeout=60) as web:
        answer = await web.post("/v1/completions", json={"prompt": ["x", "word " * 20_000]})
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        later = await web.post("/v1/completions", json={"prompt": PROMPTS}, headers={"Prefer": "respond-async"})
        assert later.status_code == 400
