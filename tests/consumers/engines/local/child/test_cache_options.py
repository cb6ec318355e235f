"""Quantized and bounded KV caches: what mlx-lm says with them, their sizes, and models that cannot have them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import pytest_asyncio

from consumers.models.names import located
from pipeline.core.kv import KV_STEP_TOKENS, KvSize
from pipeline.engine import Work
from pipeline.wire.requests import ChatRequest
from pipeline.wire.subjects import Priority
from tests.consumers.engines.conformance import Answer, read

pytest.importorskip("mlx_lm", reason="MLX is not installed")
pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOT = Path(__file__).resolve().parents[5]
PROMPTS = ["Count from 1 to 40.", "Count from 3 to 12.", "What is 3 + 4?"]
TOKENS = 40
QUANTIZED = {"kv_bits": 2, "kv_group_size": 32, "quantized_kv_start": 12}
BOUNDED = {"max_kv_size": 12}

# Prints what mlx-lm writes after each prompt with caches of a kind, given as arguments of `generate_step`.
_ALONE = """
import json, sys
from itertools import takewhile
import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import RotatingKVCache

mx.disable_compile()
model, tokenizer = load(sys.argv[1])
options, tokens, *prompts = json.loads(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]
most = options.pop("max_kv_size", 0)
for prompt in prompts:
    encoded = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    if most:
        options["prompt_cache"] = [RotatingKVCache(most, keep=4) for _ in model.layers]
    said = (int(token) for token, _ in generate_step(mx.array(encoded), model, max_tokens=tokens, **options))
    print(json.dumps(list(takewhile(lambda token: token not in tokenizer.eos_token_ids, said))))
mx.clear_streams()
"""

# Prints for caches of several kinds of one sequence: the size that is measured, and the real bytes at some lengths.
_SIZES = """
import json, sys
import mlx.core as mx
from mlx_lm.sample_utils import greedy_sampler
from consumers.engines.local.child.alone import LoneSequences
from consumers.engines.local.child.cache_options import CacheOptions
from consumers.engines.local.child.memory import measured_size
from tests.consumers.engines.shapes import tiny

mx.disable_compile()
for shape, *kind in json.loads(sys.argv[1]):
    model, options, sizes = tiny(shape), CacheOptions(*kind), []
    for length in json.loads(sys.argv[2]):
        lone = LoneSequences(model, options)
        lone.add(0, [1] * length, greedy_sampler, [])
        lone.read([(0, length)])
        lone.step()
        sizes.append([length + 1, lone.kv_bytes()])
        lone.close()
    print(json.dumps([measured_size(model, options), sizes]))
mx.clear_streams()
"""

# Prints why each of some models is refused with caches of a kind; empty if it is not.
_REFUSED = """
import json, sys
import mlx.core as mx
from consumers.engines.local.child.backend import LoadError
from consumers.engines.local.child.cache_options import CacheOptions
from pipeline.config import Config
from tests.consumers.engines.shapes import tiny

mx.disable_compile()
for shape, options in json.loads(sys.argv[1]):
    try:
        CacheOptions.of(Config(**options)).check(tiny(shape))
        print(json.dumps(""))
    except LoadError as error:
        print(json.dumps(str(error)))
mx.clear_streams()
"""


def run(program: str, *arguments: str) -> list:
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def alone(options: dict[str, int]) -> list[list[int]]:
    return run(_ALONE, located("demo"), json.dumps(options), str(TOKENS), *PROMPTS)


def request(prompt: str) -> ChatRequest:
    return ChatRequest(prompt=prompt, max_tokens=TOKENS, temperature=0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(start):
    async with start("mlx", **QUANTIZED) as process:
        yield process


async def test_answers_with_a_quantized_cache_are_those_of_mlx_lm(engine):
    expected = alone(QUANTIZED)
    assert expected != alone({})
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        answer = await read(await engine.submit(Work("r", request(prompt), "", seed=1)))
        assert answer.token_ids[: len(tokens)] == tokens


async def test_such_a_model_runs_one_request_at_a_time_and_says_why(engine):
    status = engine.status()
    assert status.slots_total == 1
    assert status.alone == ("one request at a time (kv_bits is 2, and mlx-lm does not batch quantized KV caches)")


async def test_a_request_with_a_quantized_cache_goes_on_after_a_more_urgent_one(engine):
    low = await engine.submit(Work("low", request(PROMPTS[0]), "", seed=1, priority=Priority.LOW))
    answer = Answer()
    answer.add(await low.next())
    await read(await engine.submit(Work("high", request(PROMPTS[1]), "", seed=1, priority=Priority.HIGH)))
    while answer.finish_reason is None:
        answer.add(await low.next())
    tokens = alone(QUANTIZED)[0]
    assert answer.token_ids[: len(tokens)] == tokens


async def test_answers_with_a_bounded_cache_are_those_of_mlx_lm(start):
    expected = alone(BOUNDED)
    assert expected != alone({})
    async with start("mlx", **BOUNDED) as engine:
        assert "max_kv_size is 12" in engine.status().alone
        for prompt, tokens in zip(PROMPTS, expected, strict=True):
            answer = await read(await engine.submit(Work("r", request(prompt), "", seed=1)))
            assert answer.token_ids[: len(tokens)] == tokens


async def test_the_size_of_a_cache_is_measured_as_it_is():
    kinds = [["llama", 8, 32, 0], ["llama", 4, 32, 0], ["llama", 4, 32, 600], ["llama", 0, 64, 0, 300]]
    kinds += [["qwen3_5", 4, 32, 0], ["lfm2", 8, 32, 0]]
    lengths = [40, 500, 800]
    found = run(_SIZES, json.dumps(kinds), json.dumps(lengths))
    for kind, (size, sizes) in zip(kinds, found, strict=True):
        known = KvSize(size[0], size[1], tuple((most, each) for most, each in size[2]))
        for tokens, nbytes in sizes:
            # A bounded cache grows in whole steps from any length.
            assert nbytes <= known.padded(tokens + (KV_STEP_TOKENS if kind[4:] else 0)), (kind, tokens)
            # Beyond the length from which it is quantized, a cache is smaller than it was just before.
            assert nbytes >= known.of(tokens) or tokens > kind[3] > 0, (kind, tokens)
    plain, quantized = found[3][0], found[1][0]
    assert plain[2][0][1] > 4 * quantized[0] > 0


async def test_models_that_cannot_have_such_caches_are_refused_by_name():
    kv_bits, bounded, group = {"kv_bits": 4, "kv_group_size": 32}, {"max_kv_size": 100}, {"kv_bits": 4}
    asked = [
        ("llama", kv_bits),
        ("gemma3", kv_bits),
        ("mamba2", kv_bits),
        ("llama", group),
        ("gemma3", bounded),
        ("llama", kv_bits | bounded),
    ]
    usable, windows, recurrent, odd, own, both = run(_REFUSED, json.dumps(asked))
    assert usable == ""
    assert "cannot be quantized to 4 bits" in windows
    assert "mlx-lm quantizes no KV cache of this model" in recurrent
    assert "cannot be quantized to 4 bits in groups of 64" in odd
    assert "max_kv_size does not apply to this model" in own
    assert "Set kv_bits or max_kv_size." in both
