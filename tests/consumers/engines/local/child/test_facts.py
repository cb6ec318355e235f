"""What is known of models of many shapes: the context length, and the memory that their caches take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from consumers.engines.local.child.context import context_tokens
from pipeline.core.kv import KvSize
from tests.consumers.engines.shapes import SHAPES

pytest.importorskip("mlx_lm", reason="MLX is not installed")
ROOT = Path(__file__).resolve().parents[5]
LENGTH = 640
ROWS = 2

# Prints, for each shape, its context length, the size of its cache, and the bytes of real ones: of one sequence, and of
# a batch that has read as many tokens, for each of its rows.
_MEASURED = """
import json, sys
import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import greedy_sampler
from consumers.engines.local.child.alone import LoneSequences
from consumers.engines.local.child.batch import MlxBatch
from consumers.engines.local.child.context import context_tokens
from consumers.engines.local.child.memory import measured_size
from tests.consumers.engines.shapes import SHAPES, tiny

mx.disable_compile()
length, rows = int(sys.argv[1]), int(sys.argv[2])

def real(batch, rows):
    for key in range(rows):
        batch.add(key, [1] * length, greedy_sampler, [])
    batch.read([(key, length) for key in range(rows)])
    batch.step()
    batch.step()
    nbytes = batch.kv_bytes() / rows
    batch.close()
    return nbytes

for shape, config in SHAPES.items():
    model = tiny(shape)
    nbytes = [real(LoneSequences(model), 1)]
    if shape not in ("gemma2", "llama4"):
        nbytes.append(real(MlxBatch(model, on_cpu=True), rows))
    print(json.dumps([shape, context_tokens(config, model, None), measured_size(model), nbytes]))
mx.clear_streams()
"""

CONTEXTS = {
    "llama": 2048,
    "qwen3": 40960,
    "gpt2": 1024,
    "phi3": 131072,
    "gemma2": 8192,
    "gemma3": 131072,
    "gpt_oss": 131072,
    "llama4": 10_485_760,
    "deepseek_v3": 163840,
    "mamba2": 2056,
    "lfm2": 128000,
    "qwen3_5": 262144,
    "recurrent_gemma": 4096,
}


class Measured(NamedTuple):
    """A shape: its context length, the bytes that `LENGTH` tokens are expected to take, and those of real caches."""

    shape: str
    context: int
    expected: int
    real: list[float]


def measured_shapes() -> list[Measured]:
    """Each shape, with real caches: of one sequence, and of a row of a batch where it can be batched."""
    command = [sys.executable, "-c", _MEASURED, str(LENGTH), str(ROWS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return [
        Measured(shape, context, KvSize(per_token, fixed, tuple(map(tuple, windows))).padded(LENGTH), real)
        for shape, context, (per_token, fixed, windows), real in rows
    ]


def test_contexts_and_sizes_are_those_of_real_models():
    rows = measured_shapes()
    assert {row.shape: row.context for row in rows} == CONTEXTS
    assert set(CONTEXTS) == set(SHAPES)
    for row in rows:
        for nbytes in row.real:
            assert nbytes == pytest.approx(row.expected, rel=0.05), row.shape


MODEL = SimpleNamespace()


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"model_type": "new", "n_positions": 2048}, 2048),
        ({"model_type": "new", "max_seq_len": 2048}, 2048),
        ({"model_type": "new", "text_config": {"max_position_embeddings": 512}, "max_position_embeddings": 64}, 512),
        # Linear scaling multiplies the length, Llama 3's does not.
        ({"model_type": "new", "max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 4}}, 8192),
        (
            {
                "model_type": "new",
                "max_position_embeddings": 8192,
                "rope_scaling": {"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 1024},
            },
            8192,
        ),
        # YaRN stretches the original length; some configurations state the result, some the original.
        (
            {
                "model_type": "new",
                "max_position_embeddings": 1000,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000},
            },
            4000,
        ),
        (
            {
                "model_type": "new",
                "max_position_embeddings": 4000,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000},
            },
            4000,
        ),
        ({"model_type": "new", "max_position_embeddings": None}, 4096),
        ({"model_type": "new", "max_position_embeddings": 10**30}, 4096),
        ({"model_type": "gemma3_text"}, 131072),
    ],
)
def test_the_context_is_what_the_configuration_states(config, tokens):
    assert context_tokens(config, MODEL, None) == tokens


def test_the_tokenizers_limit_counts_where_nothing_else_is_stated():
    tokenizer = SimpleNamespace(model_max_length=777)
    assert context_tokens({"model_type": "new"}, MODEL, tokenizer) == 777
    assert context_tokens({"model_type": "new", "n_positions": 2048}, MODEL, tokenizer) == 2048
    assert context_tokens({"model_type": "new"}, SimpleNamespace(args=SimpleNamespace(n_ctx=99)), tokenizer) == 99
