"""LoRA adapters that requests choose by name, with the demo model."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import pytest_asyncio

from consumers.engines.local.process import EngineProcess
from consumers.models.names import located
from pipeline.config import Config
from pipeline.engine import Work
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatRequest
from pipeline.wire.subjects import Priority
from tests.consumers.engines.conformance import Answer, read, until, until_ready
from tests.consumers.engines.processes import engine_of
from tests.waiting import eventually

pytest.importorskip("mlx_lm", reason="MLX is not installed")
pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOT = Path(__file__).resolve().parents[5]
PROMPTS = ["Count from 1 to 40.", "Count from 3 to 12.", "What is 3 + 4?", "Count from 5 to 20."]
TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, list[list[int]]]:
    """What mlx-lm writes after each prompt with each adapter, by name. It writes the adapters first."""
    program = "tests.consumers.engines.local.child.adapters"
    command = [sys.executable, "-m", program, located("demo"), str(folder), *PROMPTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert len({str(said[name]) for name in ("", "one", "two")}) == 3
    return said


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(start, folder, alone):
    async with start("mlx", adapters={name: str(folder / name) for name in alone if name}) as process:
        yield process


async def ask(engine: EngineProcess, adapter: str, prompt: str, priority: Priority = Priority.MEDIUM, **more) -> Answer:
    settings = {"max_tokens": TOKENS, "temperature": 0, **more}
    request = ChatRequest(prompt=prompt, model=adapter or None, **settings)
    work = Work("r", request, engine.resolve(adapter or None), seed=1, priority=priority)
    return await read(await engine.submit(work))


def tokens(answer: Answer, expected: list[int]) -> list[int]:
    """The tokens of an answer, without the one that ended it."""
    assert len(answer.token_ids) <= len(expected) + 1
    return answer.token_ids[: len(expected)]


async def test_a_mixed_batch_says_what_each_adapter_says_alone(engine, alone):
    asked = [(name, at) for name in alone for at in range(len(PROMPTS))]
    answers = await asyncio.gather(*(ask(engine, name, PROMPTS[at]) for name, at in asked))
    assert {each: tokens(answer, alone[each[0]][each[1]]) for each, answer in zip(asked, answers, strict=True)} == {
        each: alone[each[0]][each[1]] for each in asked
    }


async def test_an_adapter_is_a_model_name(engine, alone):
    assert engine.status().models == ["headrace-demo", "one", "two", "peft"]
    assert engine.resolve(None) == "headrace-demo"
    assert engine.resolve("TWO") == "two"
    with pytest.raises(HeadraceError) as caught:
        engine.resolve("three")
    assert caught.value.code == ErrorCode.MODEL_NOT_FOUND
    assert "headrace-demo, one, two, peft" in caught.value.message


async def test_no_adapter_uses_what_another_one_computed(engine, alone):
    prompt = "Why is the sky blue, and why is it red in the evening and grey on other days? Say it shortly."
    first = {name: await ask(engine, name, prompt) for name in ("", "one", "two")}
    again = {name: await ask(engine, name, prompt) for name in first}
    assert [answer.usage.prompt_tokens_details.cached_tokens for answer in first.values()] == [0, 0, 0]
    assert all(answer.usage.prompt_tokens_details.cached_tokens > 0 for answer in again.values())
    assert [answer.text for answer in again.values()] == [answer.text for answer in first.values()]


async def test_an_exact_request_with_an_adapter_says_the_same_beside_others(engine, alone):
    def exact():
        return ask(engine, "one", PROMPTS[0], temperature=0.9, seed=7, exact=True)

    by_itself = await exact()
    beside, *_ = await asyncio.gather(exact(), *(ask(engine, name, PROMPTS[1]) for name in alone))
    assert beside.token_ids == by_itself.token_ids


async def test_an_adapter_stays_with_its_request_through_a_preemption_and_a_crash(start, folder, alone):
    options = {"adapters": {"one": str(folder / "one")}, "slots": 1}
    async with start("mlx", **options) as engine:
        request = ChatRequest(prompt=PROMPTS[0], max_tokens=TOKENS, temperature=0)
        low = await engine.submit(Work("low", request, "one", seed=1, priority=Priority.LOW))
        answer = Answer()
        answer.add(await low.next())
        high = await ask(engine, "", PROMPTS[1], Priority.HIGH)
        pid = engine.child_pid
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: engine.child_pid not in (pid, None))
        await until_ready(engine)
        while answer.finish_reason is None:
            answer.add(await low.next())
        assert tokens(high, alone[""][1]) == alone[""][1]
        assert tokens(answer, alone["one"][0]) == alone["one"][0]


async def test_an_adapter_that_is_not_there_is_refused_by_name(tmp_path):
    config = {"engine": "mlx", "model": "demo", "adapters": {"x": str(tmp_path / "missing")}}
    async with engine_of(Config(**config)) as engine:
        refused = await engine.load_failed()
        await until(engine, lambda: engine.status().state == "down")
    assert f'There is no folder {tmp_path}/missing for the adapter "x".' in refused


async def test_an_adapter_can_be_a_part_of_the_model(start, folder, alone):
    async with start("mlx", adapter_path=str(folder / "one")) as engine:
        assert engine.status().models == ["headrace-demo"]
        for at in (0, 1):
            answer = await ask(engine, "", PROMPTS[at])
            assert tokens(answer, alone["one"][at]) == alone["one"][at]
