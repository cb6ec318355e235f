"""Several models by the wire contract alone: each request is answered by its own, whatever is loaded or killed."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Asker, Pipeline, asking, chat, running
from tests.support import ROOT
from tests.waiting import eventually

TABLES = {
    "red": {"bytes": 10, "aliases": ["gpt-4o"]},
    "green": {"bytes": 10},
    "blue": {"bytes": 10, "path": "./models/blue"},
}
SIMULATED = {
    "HEADRACE_ENGINE": "simulated",
    "HEADRACE_SIMULATED_LOAD_S": "0.2",
    "HEADRACE_SIMULATED_TOKENS_PER_S": "4000",
    "HEADRACE_SIMULATED_ANSWER_TOKENS": "12",
    "HEADRACE_SLOTS": "4",
    "HEADRACE_MODELS_BYTES": "20",
    "HEADRACE_OLLAMA_STANDIN": "false",
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """Three models and a budget for two."""
    environ = SIMULATED | {"HEADRACE_MODEL": "red", "HEADRACE_MODELS": json.dumps(TABLES)}
    with running(tmp_path_factory.mktemp("models"), "--ollama-host", "none", environ=environ) as started:
        yield started


@pytest.fixture
async def client(pipeline: Pipeline) -> AsyncIterator[Asker]:
    async with asking(pipeline.url) as connected:
        yield connected


@contextmanager
def second_worker(pipeline: Pipeline, log: Path, tables: dict[str, object]) -> Iterator[None]:
    """A further worker, with other models."""
    command = [sys.executable, "-m", "pipeline.cli", "run", "mlx", "--nats-url", pipeline.url]
    models = {"HEADRACE_MODEL": next(iter(tables)), "HEADRACE_MODELS": json.dumps(tables)}
    environ = {**os.environ, **SIMULATED, **models, "PYTHONPATH": str(ROOT)}
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT, env=environ) as process:
        try:
            yield
        finally:
            process.send_signal(signal.SIGINT)


def engines(pipeline: Pipeline) -> list[int]:
    """The process ids of the engines of the first worker."""
    worker = str(pipeline.pid("pipeline.cli run mlx"))
    found = subprocess.run(
        ["pgrep", "-P", worker, "-f", "consumers.engines.local.child"], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in found.stdout.split()]


def loads(pipeline: Pipeline) -> int:
    return pipeline.log("mlx").count("Loading model")


async def test_three_hundred_requests_for_three_models_of_which_two_fit(pipeline: Pipeline, client: Asker):
    chance = random.Random(27)
    asked: dict[str, str] = {}
    for number in range(300):
        model, lane = chance.choice(list(TABLES)), chance.choice(["high", "medium", "low"])
        body = chat(f"Request {number}", model=model)
        asked[await client.ask(f"llm.request.{lane}", body, Nats_Msg_Id=f"models-{number}")] = model
        if number == 150:
            victim = (await eventually(lambda: engines(pipeline), what="an engine runs"))[0]
            os.kill(victim, signal.SIGKILL)
    answers = await client.answers(list(asked))
    assert {answer["id"]: answer["model"] for answer in answers} == asked
    assert Counter(client.lasts(request_id) for request_id in asked) == {1: 300}
    assert loads(pipeline) < len(asked) / 2


async def test_the_lists_show_names_aliases_and_what_is_loaded(pipeline: Pipeline, client: Asker):
    names = ["red", "gpt-4o", "green", "blue", "auto"]
    listed = await asyncio.to_thread(httpx.get, f"{pipeline.http}/v1/models")
    assert [each["id"] for each in listed.json()["data"]] == names
    answer = await client.answer(await client.ask("llm.request.high", chat("x", model="gpt-4o")))
    assert answer["model"] == "red"

    async def loaded() -> set[str]:
        said = await asyncio.to_thread(httpx.get, f"{pipeline.http}/api/ps")
        return {each["name"] for each in said.json()["models"]}

    async def shows_red() -> bool:
        return {"red", "gpt-4o"} <= await loaded()

    await eventually(shows_red, what="red is shown as loaded", every_s=0.1)
    assert len(await loaded() - {"gpt-4o"}) <= 2
    shown = await asyncio.to_thread(httpx.post, f"{pipeline.http}/api/show", json={"model": "gpt-4o"})
    assert shown.json()["details"]["parent_model"] == "red"
    missing = await client.answer(await client.ask("llm.request.high", chat("x", model="pink")))
    assert missing["error"]["code"] == "model_not_found"


async def test_with_two_workers_each_request_goes_where_its_model_is(pipeline: Pipeline, client: Asker, tmp_path: Path):
    tables = {"black": {"bytes": 10}, "green": {"bytes": 10}}
    statuses: dict[str, dict] = {}

    async def on_status(message) -> None:
        status = json.loads(message.data)
        if status["engine"] == "mlx":
            statuses[status["worker"]] = status

    await client.nc.subscribe("llm.worker.*", cb=on_status)
    with second_worker(pipeline, tmp_path / "second.log", tables):
        await eventually(
            lambda: sum(status["state"] == "ready" for status in statuses.values()) == 2, what="two workers are ready"
        )
        asked = {}
        for number in range(60):
            model = ("red", "green", "black")[number % 3]
            asked[await client.ask("llm.request.medium", chat("x", model=model), Nats_Msg_Id=f"two-{number}")] = model
        answers = await client.answers(list(asked))
        assert {answer["id"]: answer["model"] for answer in answers} == asked
        sets = sorted(sorted(status["models"]) for status in statuses.values())
        assert sets == [["black", "green"], ["blue", "gpt-4o", "green", "red"]]
