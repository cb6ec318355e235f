"""What a HIGH question feels of the LOW answers beside it, against a model that answers nothing else.

    python -m bench.isolation [--model DIR] [--low N ...] [--low-tokens N] [--questions N] [--every-s S] [--slots N]

N callers ask LOW for 96 tokens (`--low-tokens`) again and again, through the gateway of `headrace up`. Meanwhile a
caller asks HIGH a short question every two seconds (`--every-s`). The benchmark measures the time to the first text of
each question. It compares them with mlx-lm's own `BatchGenerator`, alone and without a server, which reads the same
prompt and samples one token.

Without `--model` the simulated engine runs. The same question through the same gateway, without LOW callers, takes the
place of the bare generator.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.bare import Job, run
from bench.running import ALONE, Client, up

QUESTION = "What is the capital of France?"
TASK = "Write a long story about a river and the people who live beside it."
LOW_TOKENS = 96
EVERY_S = 2.0
BARE_RUNS = 15
GOALS = (1.2, 1.6)
PATH = "/v1/chat/completions"
# mlx_lm.server writes a space.
_TEXT = re.compile(rb'"content": ?"[^"]')

SIMULATED = {
    "ENGINE": "simulated",
    "SIMULATED_TOKENS_PER_S": "50",
    "SIMULATED_PREFILL_TOKENS_PER_S": "140",
    "SIMULATED_ANSWER_TOKENS": "1000",
}


def quantile(values: Sequence[float], part: float) -> float:
    """The value below which this part of values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def alone_s(model: Path) -> list[float]:
    """Seconds from the prompt to its first token, in a process that does nothing else."""
    return [took.first_s for took in run(model, [Job([QUESTION], [8])] * BARE_RUNS)]


def caller(url: str, prompt: str, priority: str, tokens: int) -> Client:
    body = {"messages": [{"role": "user", "content": prompt}], "stream": True, "max_tokens": tokens}
    return Client(url, PATH, json.dumps(body).encode(), {"X-Priority": priority})


async def answer(client: Client, on_text: Callable[[int], None] = lambda _: None) -> tuple[float, int]:
    """Ask and read to the end. Returns the seconds to the first text, and the number of chunks with text.

    `on_text` is called with the number of chunks with text in each part that is read.
    """
    started, first, chunks, tail = time.perf_counter(), 0.0, 0, b""
    if await client.begin() != 200:
        raise SystemExit("The gateway rejected a request.")
    while b"[DONE]" not in tail:
        part = await client.read()
        if not part:
            raise SystemExit("The gateway closed a stream.")
        found = len(_TEXT.findall(part))
        if found and not chunks:
            first = time.perf_counter() - started
        chunks += found
        on_text(found)
        tail = (tail + part)[-32:]
    if not chunks:
        raise SystemExit("An answer had no text.")
    return first, chunks


async def endless(url: str, number: int, tokens: int, counts: list[int]) -> None:
    client = caller(url, f"{TASK} Chapter {number}.", "low", tokens)
    await client.open()

    def count(chunks: int) -> None:
        counts[number] += chunks

    while True:
        await answer(client, count)


async def beside(url: str, low: int, tokens: int, questions: int, every_s: float) -> tuple[list[float], float]:
    """The times to the first text of the HIGH questions, and LOW's chunks of text per second meanwhile."""
    counts = [0] * max(1, low)
    tasks = [asyncio.create_task(endless(url, number, tokens, counts)) for number in range(low)]
    await asyncio.sleep(3 * EVERY_S)
    times: list[float] = []
    asked: list[asyncio.Task[None]] = []

    async def ask() -> None:
        client = caller(url, QUESTION, "high", 16)
        await client.open()
        times.append((await answer(client))[0])
        client.close()

    started, before = time.perf_counter(), sum(counts)
    for _ in range(questions):
        asked.append(asyncio.create_task(ask()))
        await asyncio.sleep(every_s)
        if broken := next((task for task in tasks if task.done()), None):
            broken.result()
    await asyncio.gather(*asked)
    rate = (sum(counts) - before) / (time.perf_counter() - started)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return times, rate


def report(name: str, times: list[float], alone: float, rate: float) -> bool:
    """Print one row. Returns whether both goals are met."""
    middle, high = quantile(times, 0.5), quantile(times, 0.95)
    met = middle <= GOALS[0] * alone and high <= GOALS[1] * alone
    print(
        f"{name:>10}  {middle:7.3f} {high:7.3f} {max(times):7.3f}   {middle / alone:5.2f} {high / alone:5.2f}   "
        f"{rate:6.1f}   {'met' if met else 'missed'}",
        flush=True,
    )
    return met


def main() -> int:
    """Returns 0: the goals are printed beside what was measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.isolation", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="folder of a model; by default the simulated engine runs"
    )
    parser.add_argument("--low", type=int, nargs="+", default=[0, 4, 8, 24], metavar="N", help="LOW callers")
    parser.add_argument("--low-tokens", type=int, default=LOW_TOKENS, metavar="N", help="tokens of a LOW answer")
    parser.add_argument("--every-s", type=float, default=EVERY_S, metavar="S", help="seconds between HIGH questions")
    parser.add_argument("--questions", type=int, default=22, metavar="N", help="HIGH questions beside each")
    parser.add_argument("--slots", type=int, default=0, metavar="N", help="most slots of the engine (default: found)")
    options = parser.parse_args()
    engine = {"MODEL": str(options.model)} if options.model else SIMULATED
    own = {"SLOTS": str(options.slots), "HTTP_ANSWERS_PER_S": "0", "DRAIN_TIMEOUT_S": "1"}

    def measured(low: int) -> tuple[list[float], float]:
        with tempfile.TemporaryDirectory() as folder, up(Path(folder), ALONE | engine | own) as here:
            return asyncio.run(beside(here["http"], low, options.low_tokens, options.questions, options.every_s))

    alone = alone_s(options.model) if options.model else measured(0)[0]
    middle = statistics.median(alone)
    print(f"alone: median {middle:.3f} s, longest {max(alone):.3f} s ({len(alone)} runs)")
    print(f"HIGH's first text, seconds; goals {GOALS[0]} and {GOALS[1]} times as long as alone\n")
    print(f"{'LOW':>10}  {'p50':>7} {'p95':>7} {'max':>7}   {'p50 x':>5} {'p95 x':>5}   {'LOW/s':>6}")
    for low in options.low:
        times, rate = measured(low)
        report(str(low), times, middle, rate)
    if options.model:
        again = alone_s(options.model)
        print(f"\nbare generator again: median {statistics.median(again):.3f} s, longest {max(again):.3f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
