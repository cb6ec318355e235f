"""Answers of a given form through `headrace up`, in every dialect that asks for them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import jsonschema_rs
import openai
import pytest

from tests.e2e.conftest import Asker, Pipeline

COLOUR = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "shade": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["colour", "shade"],
}
USER = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = {"name": "answer", "description": "Give the answer.", "parameters": COLOUR}
TOOL = {"type": "function", "function": ANSWER}
NAMED = {"type": "function", "function": {"name": "answer"}}
NOT = {"type": "json_schema", "schema": {"not": {}}}


@pytest.fixture
async def web(embedded: Pipeline) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=embedded.http, timeout=60) as client:
        yield client


@pytest.fixture
async def gpt(embedded: Pipeline) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{embedded.http}/v1", api_key="any", max_retries=0) as client:
        yield client


def valid(text: str) -> bool:
    return jsonschema_rs.is_valid(COLOUR, json.loads(text))


async def posted(web: httpx.AsyncClient, path: str, **body: Any) -> dict[str, Any]:
    answer = await web.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "c", "schema": COLOUR, "strict": True}}},
        {"response_format": {"type": "json_object", "schema": COLOUR}},
        {"structured_outputs": {"json": COLOUR}},
        {"guided_json": COLOUR},
        {"guided_json": json.dumps(COLOUR)},
    ],
    ids=["openai", "llama.cpp", "vllm", "older-vllm", "text"],
)
async def test_chat_completions(web: httpx.AsyncClient, form: dict[str, Any]):
    answer = await posted(web, "/v1/chat/completions", messages=USER, **form)
    assert valid(answer["choices"][0]["message"]["content"])
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_a_text_completion(web: httpx.AsyncClient):
    answer = await posted(web, "/v1/completions", prompt="x", guided_choice=["yes", "no"])
    assert answer["choices"][0]["text"] in ("yes", "no")


@pytest.mark.parametrize("stream", [False, True])
async def test_responses(gpt: openai.AsyncOpenAI, stream: bool):
    form = {"format": {"type": "json_schema", "name": "c", "schema": COLOUR, "strict": True}}
    answer = await gpt.responses.create(model="auto", input="x", text=form, stream=stream)
    if stream:
        answer = [event async for event in answer][-1].response
    assert valid(answer.output_text)


async def test_messages(web: httpx.AsyncClient):
    form = {"format": {"type": "json_schema", "schema": COLOUR}}
    answer = await posted(web, "/v1/messages", model="auto", max_tokens=200, messages=USER, output_config=form)
    assert valid(answer["content"][0]["text"])


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
async def test_ollama(web: httpx.AsyncClient, path: str):
    asked = {"messages": USER} if path == "/api/chat" else {"prompt": "x"}
    answer = await posted(web, path, model="headrace-demo", format=COLOUR, stream=False, **asked)
    assert valid(answer["message"]["content"] if path == "/api/chat" else answer["response"])


async def test_nats(asker: Asker):
    body = {"prompt": "x", "structured_outputs": {"regex": "[A-F]{4}-[0-9]{2}"}}
    answer = await asker.answer(await asker.ask("llm.request.high", body))
    text = answer["choices"][0]["message"]["content"]
    assert len(text) == 7
    assert text[4] == "-"


@pytest.mark.parametrize("choice", ["required", NAMED])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_forced_call_of_openais(gpt: openai.AsyncOpenAI, choice: Any, stream: bool):
    asked = {"model": "auto", "messages": USER, "tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False}
    if stream:
        parts = [part async for part in await gpt.chat.completions.create(**asked, stream=True)]
        calls = [call.function for part in parts for each in part.choices for call in each.delta.tool_calls or ()]
        name, arguments = calls[0].name, "".join(call.arguments or "" for call in calls)
    else:
        (call,) = (await gpt.chat.completions.create(**asked)).choices[0].message.tool_calls
        name, arguments = call.function.name, call.function.arguments
    assert name == "answer"
    assert valid(arguments)


async def test_a_forced_call_of_responses(gpt: openai.AsyncOpenAI):
    tool = {"type": "function", **ANSWER, "strict": True}
    answer = await gpt.responses.create(
        model="auto", input="x", tools=[tool], tool_choice={"type": "function", "name": "answer"}
    )
    (call,) = answer.output
    assert (call.type, call.name) == ("function_call", "answer")
    assert valid(call.arguments)


@pytest.mark.parametrize(
    "choice", [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "answer"}]
)
async def test_a_forced_call_of_messages(web: httpx.AsyncClient, choice: dict[str, Any]):
    tool = {"name": "answer", "input_schema": COLOUR}
    answer = await posted(
        web, "/v1/messages", model="auto", max_tokens=200, messages=USER, tools=[tool], tool_choice=choice
    )
    (call,) = answer["content"]
    assert (call["type"], call["name"], answer["stop_reason"]) == ("tool_use", "answer", "tool_use")
    assert valid(json.dumps(call["input"]))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": USER, "guided_json": {"type": "array", "uniqueItems": True}}),
        (
            "/v1/responses",
            {"input": "x", "text": {"format": {"type": "json_schema", "name": "c", "schema": {"not": {}}}}},
        ),
        (
            "/v1/messages",
            {"messages": USER, "max_tokens": 9, "output_format": {"type": "json_schema", "schema": {"not": {}}}},
        ),
        ("/api/chat", {"messages": USER, "model": "headrace-demo", "format": {"not": {}}}),
    ],
)
async def test_a_form_that_cannot_be_compiled_has_status_400_and_its_reason(
    web: httpx.AsyncClient, path: str, body: dict[str, Any], stream: bool
):
    answer = await web.post(path, json={"model": "auto", **body, "stream": stream})
    assert answer.status_code == 400, answer.text
    assert "is not supported: the JSON schema uses" in answer.text
