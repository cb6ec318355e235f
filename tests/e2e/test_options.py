"""The options of a model's load through `headrace up`: adapters as models of their own names, and a draft model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from consumers.models.names import located
from tests.e2e.conftest import ROOT, Pipeline, asking, chat, running, text_of
from tests.waiting import eventually

pytest.importorskip("mlx_lm", reason="MLX is not installed")

QUESTION = "Count from 1 to 40."


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    folder = tmp_path_factory.mktemp("adapters")
    program = "tests.consumers.engines.local.child.adapters"
    command = [sys.executable, "-m", program, located("demo"), str(folder), QUESTION]
    subprocess.run(command, capture_output=True, check=True, cwd=ROOT, timeout=120)
    adapters = json.dumps({name: str(folder / name) for name in ("one", "two")})
    options = ("--model", "demo", "--adapters", adapters, "--draft-model", "demo", "--ollama-host", "none")
    with running(tmp_path_factory.mktemp("options"), *options) as up:
        yield up


@pytest.fixture
async def web(pipeline: Pipeline) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=pipeline.http, timeout=60) as client:
        yield client


async def answered(web: httpx.AsyncClient, model: str) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 60}
    return dict((await web.post("/v1/chat/completions", json=body)).raise_for_status().json())


async def test_adapters_stand_in_the_lists_of_models(web: httpx.AsyncClient):
    listed = (await web.get("/v1/models")).raise_for_status().json()["data"]
    assert {"headrace-demo", "one", "two"} <= {model["id"] for model in listed}
    tags = (await web.get("/api/tags")).raise_for_status().json()["models"]
    assert {"one", "two"} <= {model["name"].removesuffix(":latest") for model in tags}
    assert (await web.post("/api/show", json={"model": "one"})).is_success


async def test_a_request_gets_the_adapter_that_it_names(web: httpx.AsyncClient, pipeline: Pipeline):
    answers = {name: await answered(web, name) for name in ("headrace-demo", "one", "two")}
    assert {name: answer["model"] for name, answer in answers.items()} == {name: name for name in answers}
    texts = {name: answer["choices"][0]["message"]["content"] for name, answer in answers.items()}
    assert len(set(texts.values())) == 3
    assert (await answered(web, "auto"))["choices"][0]["message"]["content"] == texts["headrace-demo"]
    async with asking(pipeline.url) as asker:
        request = await asker.ask("llm.request.high", chat(QUESTION, model="two", temperature=0, max_tokens=60))
        assert text_of(await asker.answer(request)) == texts["two"]


async def test_an_unknown_adapter_is_an_unknown_model(web: httpx.AsyncClient):
    refused = await web.post("/v1/chat/completions", json={"model": "three", **chat(QUESTION)})
    assert refused.status_code == 404
    assert "headrace-demo, one, two" in refused.json()["error"]["message"]


async def test_what_the_draft_model_has_brought_is_a_metric(web: httpx.AsyncClient):
    await answered(web, "auto")

    async def counted() -> bool:
        lines = [line.split() for line in (await web.get("/metrics")).text.splitlines()]
        found = {name.partition("{")[0]: float(value) for name, value in (line for line in lines if len(line) == 2)}
        names = ("headrace_draft_tokens_accepted_total", "headrace_draft_tokens_total")
        right, proposed = (found.get(name, 0.0) for name in names)
        return 0 < right <= proposed

    await eventually(counted)
