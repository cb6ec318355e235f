"""A rehearsal runs all that serving does, and leaves the batch as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from consumers.demo_model import PATH as DEMO

pytest.importorskip("mlx_lm", reason="MLX is not installed")
ROOT = Path(__file__).resolve().parents[5]

# Prints the rows and columns of each pass of a rehearsal, what is left in the batch, and what a sequence then says.
_REHEARSED = """
import json, sys
import mlx.core as mx
from mlx_lm.sample_utils import greedy_sampler
from consumers.engines.local.child.alone import LoneSequences
from consumers.engines.local.child.batch import MlxBatch
from consumers.engines.local.child.rehearsal import rehearse
from tests.consumers.engines.shapes import VOCABULARY, tiny

mx.disable_compile()
shape, kind, context = sys.argv[1:]
model = tiny(shape)
called, passes = type(model).__call__, set()

def noted(self, inputs, *args, **more):
    passes.add(inputs.shape)
    return called(self, inputs, *args, **more)

def said(batch):
    batch.add(99, [5, 6, 7, 8], greedy_sampler, [])
    tokens = [token for _, token in batch.read([(99, 4)])]
    for _ in range(8):
        tokens += [token for _, token in batch.step()]
    batch.remove(99)
    return tokens[:8]  # a slow step returns its own token, a quick one that of the step before

batch = LoneSequences(model) if kind == "alone" else MlxBatch(model, on_cpu=True)
before = said(batch)
type(model).__call__ = noted
rehearse(batch, VOCABULARY, int(context), [lambda: (greedy_sampler, [])])
type(model).__call__ = called
print(json.dumps([sorted(passes), batch.kv_bytes(), before, said(batch)]))
mx.clear_streams()
"""


def rehearsed(shape: str, kind: str = "batch", context: int = 2048) -> tuple[set[tuple[int, int]], int]:
    command = [sys.executable, "-c", _REHEARSED, shape, kind, str(context)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    passes, kv_bytes, before, after = json.loads(run.stdout)
    assert before == after
    return {(rows, tokens) for rows, tokens in passes}, kv_bytes


@pytest.mark.parametrize("shape", ["llama", "gemma3", "qwen3_5"])
def test_each_length_is_read_and_eight_sequences_decode(shape):
    passes, kv_bytes = rehearsed(shape)
    assert {(1, 16), (1, 32), (1, 64), (1, 128), (1, 256), (2, 7), (8, 1)} <= passes
    assert kv_bytes == 0


def test_a_short_context_is_not_exceeded():
    passes, _ = rehearsed("llama", context=48)
    assert max(tokens for _, tokens in passes) == 44
    assert (8, 1) in passes


def test_a_model_without_batches_reads_each_length():
    passes, _ = rehearsed("llama", "alone")
    assert {(1, 16), (1, 32), (1, 64), (1, 128), (1, 256), (1, 1)} <= passes


# A backend that takes this machine for one with a GPU. Prints what it says of its start and what is left in its batch.
_AT_THE_START = """
import json, logging, sys
import mlx.core as mx
from consumers.engines.local.child import mlx as backend
from pipeline.config import Config

logging.basicConfig()
backend.on_cuda = lambda: True
notes = []
started = backend.MlxBackend(Config(), sys.argv[1], notes.append)
print(json.dumps([notes, started.batch.kv_bytes()]))
started.close()
"""


def test_the_engine_rehearses_with_its_own_ways_to_sample():
    command = [sys.executable, "-c", _AT_THE_START, str(DEMO)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    notes, kv_bytes = json.loads(run.stdout)
    assert notes[-1].startswith("compiling kernels for this GPU")
    assert kv_bytes == 0
    assert "rehearsal failed" not in run.stderr
