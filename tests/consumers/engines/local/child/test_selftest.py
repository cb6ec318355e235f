"""Models that cannot be computed in batches, and what becomes of requests to them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from consumers.models.names import located
from pipeline.wire.requests import ChatRequest
from tests.consumers.engines.conformance import ask

pytest.importorskip("mlx_lm", reason="MLX is not installed")
ROOT = Path(__file__).resolve().parents[5]

PROMPTS = [("one two three four five six seven eight nine ten " * 3)[: 6 + 17 * number] for number in range(8)]
TOKENS = 12

# Prints what the test finds in each of some models; with a last argument, in models whose padding is not masked.
_TESTED = """
import json, sys
import mlx.core as mx
from mlx_lm.models import cache
from consumers.engines.local.child.selftest import fault_of_batches
from tests.consumers.engines.shapes import VOCABULARY, tiny

mx.disable_compile()
*shapes, broken = sys.argv[1:]
masked = cache.BatchKVCache.make_mask

def unmasked(self, *args, **more):
    padding, self.left_padding = self.left_padding, mx.zeros_like(self.left_padding)
    try:
        return masked(self, *args, **more)
    finally:
        self.left_padding = padding

if broken == "broken":
    cache.BatchKVCache.make_mask = unmasked
print(json.dumps({shape: fault_of_batches(tiny(shape), VOCABULARY, on_cpu=True) for shape in shapes}))
mx.clear_streams()
"""

# An engine whose steps fail in batches, though the test found nothing. Requests that were lost come again together.
_FAILS_LATER = """
import json, queue, sys
from consumers.engines.local.child.batch import MlxBatch
from consumers.engines.local.child.loop import Begin, EngineLoop
from consumers.engines.local.child.mlx import MlxBackend
from consumers.engines.local.protocol import Reset, Step
from pipeline.config import Config
from pipeline.engine import Work
from pipeline.wire.requests import ChatRequest

stepped = MlxBatch.step

def step(self):
    if len(self._rows) > 1:
        raise ValueError("no two at once")
    return stepped(self)

config = Config()
backend = MlxBackend(config, sys.argv[1], lambda note: None)
assert backend.facts.alone == ""
MlxBatch.step = step
commands, sent, tokens = queue.SimpleQueue(), [], {key: [] for key in range(3)}
loop = EngineLoop(backend, commands, sent.append, config)

def begin(epoch):
    for key in tokens:
        request = ChatRequest(prompt="Count from 1 to 40.", max_tokens=12, temperature=0)
        work = Work(id=str(key), request=request, model="", seed=1, resume_tokens=tokens[key])
        commands.put(Begin(epoch, backend.prepare(key, work), None))

begin(0)
resets, ended, counted = [], set(), []
while len(ended) < len(tokens):
    loop.turn()
    for frame in sent:
        if isinstance(frame, Reset):
            resets.append([frame.facts.alone, frame.facts.slots, frame.facts.reuse])
            begin(frame.epoch)
        elif isinstance(frame, Step):
            counted.append(frame.stats.prompt_tokens)
            for key, piece in frame.pieces:
                tokens[key] += piece.token_ids
                if piece.finish_reason:
                    ended.add(key)
    sent.clear()
print(json.dumps([resets, counted, *tokens.values()]))
backend.close()
"""

TOGETHER = [
    "llama",
    "qwen3",
    "gpt2",
    "phi3",
    "gemma3",
    "gpt_oss",
    "deepseek_v3",
    "mamba2",
    "lfm2",
    "qwen3_5",
    "recurrent_gemma",
]


def run(*command: str) -> list:
    command = (sys.executable, *command)
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line[:1] in "[{"]


def test_models_that_can_be_batched_pass():
    (faults,) = run("-c", _TESTED, *TOGETHER, "whole")
    assert faults == dict.fromkeys(TOGETHER, "")


def test_padding_that_is_not_masked_is_found():
    (faults,) = run("-c", _TESTED, "llama", "gpt2", "lfm2", "broken")
    assert all("other scores than alone" in fault for fault in faults.values())


def test_an_engine_whose_batches_fail_twice_goes_on_one_request_at_a_time():
    ((resets, counted, *answers),) = run("-c", _FAILS_LATER, located("demo"))
    assert resets == [["", 0, "segments"], ["ValueError: no two at once", 1, ""]]
    assert counted == sorted(counted)
    assert [len(tokens) for tokens in answers] == [12] * 3
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize(("shape", "cause"), [("gemma2", "reshape"), ("llama4", "ChunkedKVCache")])
async def test_eight_at_once_get_the_answers_that_each_gets_alone(start, tmp_path, shape, cause):
    expected = await asyncio.to_thread(
        run, "-m", "tests.consumers.engines.shapes", shape, str(tmp_path), str(TOKENS), *PROMPTS
    )
    requests = [ChatRequest(prompt=prompt, raw=True, max_tokens=TOKENS, temperature=0) for prompt in PROMPTS]
    async with start("mlx", model=str(tmp_path)) as engine:
        status = engine.status()
        assert (status.slots_total, status.suspends) == (1, True)
        assert "one request at a time" in status.alone
        assert cause in status.alone
        answers = await asyncio.gather(*(ask(engine, request) for request in requests))
        assert [answer.restarted for answer in answers] == [0] * 8
        assert [answer.token_ids for answer in answers] == expected
