"""A model that reasons, through `headrace up`: reasoning apart from the answer in every dialect, and turned off."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from tests.consumers.engines import families
from tests.e2e.conftest import Asker, Pipeline, asking, chat, joined, running, text_of

pytest.importorskip("mlx_lm", reason="MLX is not installed")

THOUGHT, SAID = "Two and two make four.", "It is 4."
LONG = " ".join(f"Step {step} of it." for step in range(200))
REASONING, PLAIN, LONG_REASONING = range(3)
SCRIPTS = [f"{THOUGHT}\n</think>\n\n{SAID}", SAID, f"{LONG}\n</think>\n\n{SAID}"]
OFF = {
    "/v1/chat/completions": {"chat_template_kwargs": {"enable_thinking": False}},
    "/v1/responses": {"reasoning": {"effort": "none"}},
    "/v1/messages": {"thinking": {"type": "disabled"}},
    "/api/chat": {"think": False},
    "/api/generate": {"think": False},
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    folder = families.QWEN35.write(tmp_path_factory.mktemp("model") / "thinker", SCRIPTS)
    options = ("--model", str(folder), "--default-max-tokens", "6000")
    with running(
        tmp_path_factory.mktemp("reasoning"), *options, environ={"PYTHONPATH": families.scripted_path()}
    ) as up:
        yield up


@pytest.fixture
async def web(pipeline: Pipeline) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=pipeline.http, timeout=60) as client:
        yield client


@pytest.fixture
async def asker(pipeline: Pipeline) -> AsyncIterator[Asker]:
    async with asking(pipeline.url) as connected:
        yield connected


def body(path: str, script: int, **more: Any) -> dict[str, Any]:
    text = f"Play «{script}»."
    asked = {"/api/generate": {"prompt": text}, "/v1/responses": {"input": text}}.get(path, chat(text))
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    return {"model": "thinker", limit: 1000, "stream": False} | asked | more


def found_in(path: str, answer: dict[str, Any]) -> tuple[str, str]:
    """The reasoning and the text of a whole answer."""
    if path == "/v1/chat/completions":
        message = answer["choices"][0]["message"]
        assert message.get("reasoning") == message.get("reasoning_content")
        return message.get("reasoning_content", ""), message["content"]
    if path == "/v1/responses":
        texts = {item["type"]: item["content"][0]["text"] for item in answer["output"]}
        return texts.get("reasoning", ""), texts["message"]
    if path == "/v1/messages":
        blocks = {block["type"]: block for block in answer["content"]}
        return blocks.get("thinking", {}).get("thinking", ""), blocks["text"]["text"]
    if path == "/api/chat":
        return answer["message"].get("thinking", ""), answer["message"]["content"]
    return answer.get("thinking", ""), answer["response"]


def found_in_stream(path: str, text: str) -> tuple[str, str]:
    """The same of a stream, from its increments."""
    lines = (
        text.splitlines()
        if path.startswith("/api")
        else [line[6:] for line in text.splitlines() if line[:6] == "data: "]
    )
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    if path == "/v1/chat/completions":
        deltas = [choice["delta"] for event in events for choice in event["choices"]]
        return _join(deltas, "reasoning_content"), _join(deltas, "content")
    if path == "/v1/responses":
        return tuple(
            _join([event for event in events if event["type"] == f"response.{kind}_text.delta"], "delta")
            for kind in ("reasoning", "output")
        )
    if path == "/v1/messages":
        deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
        return _join(deltas, "thinking"), _join(deltas, "text")
    if path == "/api/chat":
        return _join([event["message"] for event in events], "thinking"), _join(
            [event["message"] for event in events], "content"
        )
    return _join(events, "thinking"), _join(events, "response")


def _join(parts: list[dict[str, Any]], name: str) -> str:
    return "".join(part.get(name) or "" for part in parts)


@pytest.mark.parametrize("path", OFF)
async def test_reasoning_is_apart_from_the_answer(web: httpx.AsyncClient, path: str):
    answer = await web.post(path, json=body(path, REASONING))
    assert answer.status_code == 200, answer.text
    assert found_in(path, answer.json()) == (THOUGHT, SAID)
    streamed = await web.post(path, json=body(path, REASONING, stream=True))
    assert found_in_stream(path, streamed.text) == (THOUGHT, SAID)


@pytest.mark.parametrize("path", OFF)
async def test_it_can_be_turned_off(web: httpx.AsyncClient, path: str):
    answer = await web.post(path, json=body(path, PLAIN, **OFF[path]))
    assert answer.status_code == 200, answer.text
    assert found_in(path, answer.json()) == ("", SAID)


async def test_the_tokens_of_reasoning_are_counted(web: httpx.AsyncClient):
    answer = (await web.post("/v1/chat/completions", json=body("/v1/chat/completions", REASONING))).json()
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] >= len(THOUGHT)
    answer = (await web.post("/v1/responses", json=body("/v1/responses", REASONING))).json()
    assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] >= len(THOUGHT)


async def test_an_answer_goes_on_in_its_reasoning_when_its_worker_dies(pipeline: Pipeline, asker: Asker):
    asked = await asker.ask("llm.request.high", body("", LONG_REASONING, stream=True, max_tokens=6000))

    def thought() -> str:
        chunks = {m["seq"]: m for m in asker.messages[asked] if m["object"] == "chat.completion.chunk"}
        return _join([chunks[seq]["choices"][0]["delta"] for seq in sorted(chunks)], "reasoning_content")

    await asker.until(lambda: bool(thought()))
    pipeline.kill("mlx")
    answer = await asker.answer(asked)
    assert answer["object"] == "chat.completion", answer
    message = answer["choices"][0]["message"]
    assert message["reasoning_content"] == thought() == LONG
    assert text_of(answer) == joined(asker.messages[asked]) == SAID
    assert asker.lasts(asked) == 1
