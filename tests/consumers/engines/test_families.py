"""Models in the shape of families, in the engine's process."""

from __future__ import annotations

import asyncio

import pytest

from consumers.engines.local.process import EngineProcess
from pipeline.config import Config
from pipeline.wire.requests import ChatRequest
from tests.consumers.engines import families
from tests.consumers.engines.conformance import ask, until_ready
from tests.consumers.engines.processes import engine_of

pytest.importorskip("mlx_lm", reason="MLX is not installed")


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", families.scripted_path())


def engine_with(folder) -> EngineProcess:
    return engine_of(Config(engine="mlx", model=str(folder), step_timeout_s=30.0))


@pytest.mark.parametrize("family", [families.LLAMA3, families.GEMMA4], ids=lambda family: family.name)
async def test_a_model_of_a_family_plays_the_script_that_a_message_names(tmp_path, family):
    scripts = ["Paris is the capital of France.", "Ça va: 3 + 4 = 7, naïve 🙂 answer."]
    async with engine_with(family.write(tmp_path / family.name, scripts)) as engine:
        await until_ready(engine)
        asked = [ChatRequest(prompt=f"Play «{index}».", max_tokens=200) for index in (0, 1, 1, 0)]
        answers = await asyncio.gather(*(ask(engine, request) for request in asked))
    assert [answer.text for answer in answers] == [scripts[0], scripts[1], scripts[1], scripts[0]]
    assert {answer.finish_reason for answer in answers} == {"stop"}
