"""Tokens per second of headrace against mlx-lm's own `BatchGenerator`, in one run.

    python -m bench.throughput [--model DIR] [--repeats N] [--threads N]

Four workloads, each sent at once over HTTP: short questions at HIGH and at LOW, long answers, and a mixture. The
generator gets the same prompts and lengths, all inserted at once, in a process that does nothing else. The two take
turns; the table has the medians. Answers are greedy.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import httpx

from bench.bare import CORES, PROMPTS, Job, default_model, run
from bench.running import ALONE, up

QUESTIONS = (
    "What is the capital of Japan?",
    "What color is the sky?",
    "What is two plus three?",
    "How many days are in a week?",
    "What do bees make?",
    "Who wrote Hamlet?",
    "What is the chemical symbol for water?",
    "What animal says meow?",
)


class Workload(NamedTuple):
    """Requests that are sent at once."""

    name: str
    priority: str
    job: Job


WORKLOADS = (
    Workload("8 short questions, HIGH", "high", Job([*QUESTIONS], [16] * 8)),
    Workload("8 short questions, LOW", "low", Job([*QUESTIONS], [16] * 8)),
    Workload("8 long answers, LOW", "low", Job([*PROMPTS], [128] * 8)),
    Workload("32 mixed, LOW", "low", Job([*QUESTIONS, *PROMPTS] * 2, ([16] * 8 + [32, 64, 96, 128] * 2) * 2)),
)


async def through_headrace(url: str, workload: Workload) -> float:
    """Tokens per second of all answers together."""
    async with httpx.AsyncClient(base_url=url, timeout=None, trust_env=False) as client:  # noqa: S113 - a model is slow

        async def one(prompt: str, tokens: int) -> int:
            body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "temperature": 0}
            answer = await client.post("/v1/chat/completions", json=body, headers={"X-Priority": workload.priority})
            return int(answer.raise_for_status().json()["usage"]["completion_tokens"])

        began_at = time.perf_counter()
        counts = await asyncio.gather(*map(one, workload.job.prompts, workload.job.tokens))
        return sum(counts) / (time.perf_counter() - began_at)


def main() -> int:
    """Returns 0: the ratios are printed."""
    parser = argparse.ArgumentParser(prog="python -m bench.throughput", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model's folder (default: SmolLM2)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each (default: 3)")
    parser.add_argument("--slots", type=int, default=0, metavar="N", help="most slots (default: found)")
    parser.add_argument("--threads", type=int, default=CORES, metavar="N", help="threads of MLX (default: all cores)")
    given = parser.parse_args()
    model = given.model.resolve() if given.model else default_model()
    own = {"MODEL": str(model), "SLOTS": str(given.slots), "MLX_THREADS": str(given.threads)}
    bare: list[list[float]] = [[] for _ in WORKLOADS]
    ours: list[list[float]] = [[] for _ in WORKLOADS]
    for _ in range(given.repeats):
        for found, took in zip(
            bare, run(model, [workload.job for workload in WORKLOADS], threads=given.threads), strict=True
        ):
            found.append(took.tokens_per_s)
        with tempfile.TemporaryDirectory() as folder, up(Path(folder), ALONE | own) as here:
            asyncio.run(through_headrace(here["http"], WORKLOADS[0]))
            for found, workload in zip(ours, WORKLOADS, strict=True):
                found.append(asyncio.run(through_headrace(here["http"], workload)))
    print(f"tokens/s, median of {given.repeats}; {given.slots or 'found'} slots, {given.threads} threads\n")
    print(f"{'':<26} {'headrace':>9} {'bare':>7} {'ratio':>6}")
    for workload, one, other in zip(WORKLOADS, ours, bare, strict=True):
        middle, limit = statistics.median(one), statistics.median(other)
        print(f"{workload.name:<26} {middle:9.1f} {limit:7.1f} {middle / limit:6.2f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
