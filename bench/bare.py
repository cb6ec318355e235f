"""mlx-lm's own `BatchGenerator`, without a server: what the benchmarks compare headrace with.

It runs in a process of its own (`python -m bench.bare`), with the BLAS library, the threads and the type of weights
that headrace's engine has on this machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct, to_builtins

from bench.running import ROOT
from consumers.engines.local.blas import selected, threads_environment
from consumers.engines.local.child import float32
from consumers.engines.local.child.speed import load_blas, on_cpu
from consumers.engines.local.cuda import kernels_environment
from consumers.models.known import SMOLLM2
from consumers.models.store import MLX, Store
from pipeline.core.cores import usable_cores
from pipeline.machine import cpu_count, cpu_quota

CORES = usable_cores(cpu_count(), cpu_quota())
# What the benchmarks ask for long answers.
PROMPTS = (
    "Tell me a story about a dog that lost its way home.",
    "Explain why the sky is blue.",
    "Write a letter to a friend who has moved to another city.",
    "Describe how bread is made, step by step.",
    "What should a traveller see in Rome?",
    "Explain a computer to a person who has never seen one.",
    "Write about a day at the sea.",
    "How do trees survive the winter?",
)


class Job(Struct):
    """Prompts that are inserted at once, and the length of each answer in tokens. All answers are greedy."""

    prompts: list[str]
    tokens: list[int]


class Took(Struct):
    """Seconds until the first token and until the last, and the number of tokens."""

    first_s: float
    whole_s: float
    tokens: int

    @property
    def tokens_per_s(self) -> float:
        """Of all answers together."""
        return self.tokens / self.whole_s


def default_model() -> Path:
    """The MLX folder of the default model, which `headrace pull` stores."""
    folder = Store().folder(SMOLLM2.name) / MLX
    if not folder.is_dir():
        raise SystemExit(
            f"The model {SMOLLM2.name} is not stored. Run `headrace pull {SMOLLM2.name}`, or name a folder."
        )
    return folder


def run(model: Path, jobs: Sequence[Job], *, blas: str = "auto", threads: int = CORES, full: bool = True) -> list[Took]:
    """Run jobs one after another on a model that is loaded once.

    Args:
        model: the model's folder.
        jobs: what to generate.
        blas: as the setting `blas`.
        threads: threads of the BLAS library.
        full: whether weights are float32 on a CPU.
    """
    library = asyncio.run(selected(blas, threads))
    given = [str(model), library.library if library else "", full, to_builtins(list(jobs))]
    done = subprocess.run(
        [sys.executable, "-m", "bench.bare"],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | threads_environment(threads) | kernels_environment(),
    )
    return [Took(*found) for found in json.loads(done.stdout.splitlines()[-1])]


def _generate(model: Any, prompts: list[list[int]], tokens: list[int], stops: set[int]) -> tuple[float, float, int]:
    from mlx_lm.generate import BatchGenerator

    began_at, first_s, count, left = time.perf_counter(), 0.0, 0, len(prompts)
    batch = BatchGenerator(model, stop_tokens=[[token] for token in sorted(stops)])
    batch.insert(prompts, tokens)
    while left:
        _, responses = batch.next()
        if responses and not count:
            first_s = time.perf_counter() - began_at
        count += len(responses)
        left -= sum(response.finish_reason is not None for response in responses)
    took_s = time.perf_counter() - began_at
    batch.close()
    return first_s, took_s, count


def main() -> None:
    """Read the model and the jobs from standard input, and print a list of figures as JSON."""
    folder, blas, full, jobs = json.load(sys.stdin)
    load_blas(blas)
    import mlx.core as mx
    import mlx_lm

    if on_cpu():
        mx.disable_compile()
    model, tokenizer = mlx_lm.load(folder)[:2]
    if on_cpu() and full:
        float32.convert(model)

    def encoded(prompt: str) -> list[int]:
        return list(tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True))

    def job(prompts: list[str], tokens: list[int]) -> tuple[float, float, int]:
        return _generate(model, [encoded(prompt) for prompt in prompts], tokens, set(tokenizer.eos_token_ids))

    # Memory is allocated. A GPU's kernels are compiled, of which there are several for different prompts.
    for one in [{"prompts": ["Hello."], "tokens": [4]}] if on_cpu() else jobs:
        job(one["prompts"], one["tokens"])
    print(json.dumps([job(one["prompts"], one["tokens"]) for one in jobs]))
    mx.clear_streams()


if __name__ == "__main__":
    main()
