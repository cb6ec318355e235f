"""A draft model beside the demo model: answers are the model's own, whatever the draft proposes."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from consumers.engines.local.process import EngineProcess
from consumers.models.names import located
from pipeline.config import Config
from pipeline.core.drafting import MEASURED_STEPS
from pipeline.engine import Work
from pipeline.wire.constraints import ResponseFormat
from pipeline.wire.requests import ChatRequest
from pipeline.wire.subjects import Priority
from tests.consumers.engines.conformance import Answer, read, until, until_ready
from tests.consumers.engines.processes import engine_of
from tests.waiting import eventually

pytest.importorskip("mlx_lm", reason="MLX is not installed")
pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOT = Path(__file__).resolve().parents[5]
PROMPTS = ["Count from 1 to 40.", "Count from 3 to 30.", "What is 3 + 4?", "Why is the sky blue?"]
TOKENS = 60
JSON = msgspec.convert({"type": "json_object"}, ResponseFormat)

# Writes the demo model with noise in its weights, and models of some shapes with the demo model's tokenizer.
_DRAFTS = """
import json, shutil, sys
from pathlib import Path
import mlx.core as mx
from tests.consumers.engines.shapes import write

demo, root = Path(sys.argv[1]), Path(sys.argv[2])
noisy = shutil.copytree(demo, root / "noisy")
mx.random.seed(3)
for file in noisy.glob("*.safetensors"):
    weights = mx.load(str(demo / file.name))
    changed = {name: value * (1 + 0.3 * mx.random.normal(value.shape)) for name, value in weights.items()}
    file.unlink()
    mx.save_safetensors(str(file), {name: value.astype(weights[name].dtype) for name, value in changed.items()})
for shape in sys.argv[3:]:
    (root / shape).mkdir()
    write(shape, root / shape)
mx.clear_streams()
"""


@pytest.fixture(scope="module")
def drafts(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("drafts")
    command = [sys.executable, "-c", _DRAFTS, located("demo"), str(root), "llama", "gemma3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    other = Path(shutil.copytree(located("demo"), root / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 2560, "content": "<another>"})
    (other / "tokenizer.json").unlink()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    return root


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def plain(start):
    async with start("mlx") as process:
        yield process


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(start, drafts):
    async with start("mlx", draft_model=str(drafts / "noisy")) as process:
        yield process


def work(prompt: str, priority: Priority = Priority.MEDIUM, **more) -> Work:
    settings = {"max_tokens": TOKENS, "temperature": 0, **more}
    return Work("r", ChatRequest(prompt=prompt, **settings), "", seed=1, priority=priority)


async def ask(engine: EngineProcess, prompt: str, priority: Priority = Priority.MEDIUM, **more) -> Answer:
    return await read(await engine.submit(work(prompt, priority, **more)))


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.8, "seed": 4}, {"temperature": 1.0, "top_p": 0.9, "seed": 5}]
)
async def test_an_answer_is_that_of_the_model_without_a_draft(engine, plain, sampling):
    for prompt in PROMPTS:
        answer, expected = await ask(engine, prompt, **sampling), await ask(plain, prompt, **sampling)
        assert (answer.token_ids, answer.finish_reason) == (expected.token_ids, expected.finish_reason)
        assert answer.usage.completion_tokens == expected.usage.completion_tokens
    # The first block of plain steps is followed by one with proposals.
    status = engine.status()
    assert 0 < status.accepted_tokens < status.drafted_tokens


async def test_a_draft_that_knows_nothing_changes_no_answer(start, drafts, plain):
    async with start("mlx", draft_model=str(drafts / "llama")) as engine:
        for prompt in PROMPTS[:2]:
            assert (await ask(engine, prompt)).token_ids == (await ask(plain, prompt)).token_ids
        assert engine.status().drafted_tokens > 0


async def test_answers_that_are_written_together_are_those_of_the_model_too(engine, plain):
    answers = await asyncio.gather(*(ask(engine, prompt) for prompt in PROMPTS))
    expected = [await ask(plain, prompt) for prompt in PROMPTS]
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]


async def test_the_limit_of_an_answer_is_met_exactly(engine):
    for limit in (1, 2, 3, 9, 10, 11, 12, 14, 17):
        answer = await ask(engine, PROMPTS[0], max_tokens=limit)
        assert answer.usage.completion_tokens == limit
        assert answer.finish_reason == "length"


async def test_a_later_turn_takes_over_the_cache_of_a_drafted_answer(engine, plain):
    prompt = "Count from 1 to 30, and then tell me why the sky is blue in the morning and red in the evening."
    first = await ask(engine, prompt)
    turns = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "What is 3 + 4?"},
    ]
    second = await read(await engine.submit(turn(turns)))
    assert second.usage.prompt_tokens_details.cached_tokens > first.usage.prompt_tokens
    assert second.token_ids == (await read(await plain.submit(turn(turns)))).token_ids


def turn(messages: list[dict[str, str]]) -> Work:
    return Work("r", ChatRequest(messages=messages, max_tokens=TOKENS, temperature=0), "", seed=1)


async def test_scores_are_those_of_the_model(engine, plain):
    scores, expected = [(await ask(each, PROMPTS[1], logprobs=True)).scores for each in (engine, plain)]
    assert [score.token for score in scores] == [score.token for score in expected]
    assert [score.logprob for score in scores] == pytest.approx([score.logprob for score in expected], abs=1e-3)


@pytest.mark.parametrize(
    "more", [{"exact": True}, {"frequency_penalty": 0.5}, {"response_format": JSON}], ids=["exact", "penalty", "form"]
)
async def test_nothing_is_proposed_where_it_would_be_wrong(engine, plain, more):
    before = engine.status().drafted_tokens
    answer, expected = await ask(engine, PROMPTS[0], **more), await ask(plain, PROMPTS[0], **more)
    assert answer.token_ids == expected.token_ids
    assert engine.status().drafted_tokens == before


async def test_a_drafted_answer_goes_on_after_a_preemption_a_cancel_and_a_crash(start, drafts, plain):
    expected = [(await ask(plain, prompt)).token_ids for prompt in PROMPTS[:2]]
    async with start("mlx", draft_model=str(drafts / "noisy"), slots=1) as engine:
        low, answer = await engine.submit(work(PROMPTS[0], Priority.LOW)), Answer()
        while len(answer.token_ids) <= MEASURED_STEPS:
            answer.add(await low.next())
        high = await ask(engine, PROMPTS[1], Priority.HIGH)
        cancelled = await engine.submit(work(PROMPTS[1], Priority.HIGH))
        await cancelled.next()
        await cancelled.close()
        drafted, pid = engine.status().drafted_tokens, engine.child_pid
        if answer.finish_reason is None:
            os.kill(pid, signal.SIGKILL)
            await eventually(lambda: engine.child_pid not in (pid, None))
            await until_ready(engine)
        while answer.finish_reason is None:
            answer.add(await low.next())
        assert high.token_ids == expected[1]
        assert answer.token_ids == expected[0]
        assert engine.status().drafted_tokens >= drafted


@pytest.mark.parametrize(
    ("draft", "more", "reason"),
    [
        ("other", {}, "The draft model has other tokens than the model."),
        ("gemma3", {}, "The draft model has caches that cannot be cut (RotatingKVCache)."),
        ("noisy", {"kv_bits": 4, "kv_group_size": 32}, "A draft model needs a model that is computed in batches"),
    ],
)
async def test_a_draft_that_cannot_be_one_is_refused(drafts, draft, more, reason):
    async with engine_of(Config(engine="mlx", model="demo", draft_model=str(drafts / draft), **more)) as engine:
        assert reason in await engine.load_failed()
        await until(engine, lambda: engine.status().state == "down")
