"""OpenAI's Responses API at `headrace up`, with the demo model on MLX, spoken over plain HTTP."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Pipeline

PATH = "/v1/responses"
FRANCE = {"input": "What is the capital of France?", "temperature": 0}
WEATHER = {"type": "function", "name": "get_weather", "parameters": {"type": "object", "properties": {}}}
ASK_WEATHER = {"input": "What is the weather in Paris?", "tools": [WEATHER], "temperature": 0}


@pytest.fixture
async def web(embedded: Pipeline) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=embedded.http, timeout=60) as client:
        yield client


async def stream(web: httpx.AsyncClient, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = await web.post(PATH, json={**body, "stream": True})
    lines = answer.text.split("\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


async def test_a_stream_brings_the_text_that_the_whole_response_has(web: httpx.AsyncClient):
    whole = (await web.post(PATH, json=FRANCE, headers={"X-Priority": "high"})).json()
    events = await stream(web, FRANCE)
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == whole["output"][0]["content"][0]["text"] == "The capital of France is Paris."
    streamed = events[-1]["response"]["usage"]
    for name in ("input_tokens", "output_tokens"):  # the prompt cache has served the second one
        assert streamed[name] == whole["usage"][name]
    assert whole["usage"]["total_tokens"] == whole["usage"]["input_tokens"] + whole["usage"]["output_tokens"] > 0
    assert (whole["headrace"]["priority"], whole["headrace"]["engine"]) == ("high", "mlx")


async def test_a_tool_is_called_and_its_output_answered_by_id_and_by_the_whole_conversation(web: httpx.AsyncClient):
    first = (await web.post(PATH, json=ASK_WEATHER)).json()
    [call] = first["output"]
    assert (call["type"], call["name"], json.loads(call["arguments"])) == (
        "function_call",
        "get_weather",
        {"city": "Paris"},
    )
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "It is sunny, 20 degrees."}
    question = {"role": "user", "content": ASK_WEATHER["input"]}
    by_id = await web.post(PATH, json={**ASK_WEATHER, "input": [output], "previous_response_id": first["id"]})
    by_all = await web.post(PATH, json={**ASK_WEATHER, "input": [question, call, output]})
    said = [answer.json()["output"][0]["content"][0]["text"] for answer in (by_id, by_all)]
    assert said[0] == said[1]
    assert "sunny" in said[0]


async def test_a_limit_and_a_form_that_the_engine_cannot_force_are_told(web: httpx.AsyncClient):
    cut = (await web.post(PATH, json={**FRANCE, "max_output_tokens": 2})).json()
    assert (cut["status"], cut["incomplete_details"]["reason"]) == ("incomplete", "max_output_tokens")
    form = {"type": "json_schema", "name": "list", "schema": {"type": "array", "uniqueItems": True}}
    refused = await web.post(PATH, json={**FRANCE, "text": {"format": form}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "text.format")
