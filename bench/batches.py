"""A long batch as OpenAI's client sends it, while the parts of the pipeline are killed in turn.

    python -m bench.batches [--lines N] [--questions N] [--every-s S] [--kills N] [--away-s S] [--tokens-per-s N]
                            [--model DIR]

It asks HIGH a short question every half second (`--every-s`), alone and beside the batch, and compares the times to the
first text. Then it kills gateway, engine's worker, monitor and the role `batches` in turn with SIGKILL. With
`--away-s`, the gateway stands still from then on for that long, and is killed. At the end each line must be in the
output or the error file once. It samples the memory of every process.

Without `--model` the simulated engine runs. By default it is fast, so that many lines end. To compare HIGH's times,
give it the speed of a model: `--tokens-per-s 100`. With a real model on a CPU, ask less often: `--every-s 4`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openai import APIError, AsyncOpenAI
from openai.types import Batch

from bench.isolation import QUESTION, answer, caller, quantile
from bench.running import ALONE, up

SIMULATED = {"ENGINE": "simulated", "SIMULATED_PREFILL_TOKENS_PER_S": "2000"}
ROLES = ("gateway", "mlx", "monitor", "batches")
EVERY_S = 0.5
KILL_EVERY_S = 6.0
TOKENS = 8
ENDPOINT = "/v1/chat/completions"
_PATIENCE_S = 5.0
_FINAL = ("completed", "failed", "expired", "cancelled")


def write_lines(path: Path, count: int) -> None:
    """An input file; every hundredth line names a model that nothing has."""
    with path.open("w") as file:
        for number in range(count):
            body = {"messages": [{"role": "user", "content": f"Name {number} things."}], "max_tokens": TOKENS}
            if number % 100 == 99:
                body["model"] = "no-such-model"
            line = {"custom_id": f"line-{number}", "method": "POST", "url": ENDPOINT, "body": body}
            file.write(json.dumps(line) + "\n")


def children() -> dict[str, int]:
    """The process ids of the roles under this process, by name."""
    rows = [line.split(None, 2) for line in _ps("-axo", "pid=,ppid=,args=").splitlines()]
    mine, found = {str(os.getpid())}, dict[str, int]()
    for _ in range(4):
        mine |= {pid for pid, parent, *_ in rows if parent in mine}
    for pid, _, args in (row for row in rows if len(row) == 3 and row[0] in mine):
        name = next((role for role in (*ROLES, "router", "ollama") if f"pipeline.cli run {role}" in args), "")
        name = name or ("nats-server" if "nats-server" in args.split()[0] else "")
        name = name or ("engine" if "engines.local.child" in args else "")
        if name:
            found[name] = int(pid)
    return found


def _ps(*options: str) -> str:
    return subprocess.run(["/bin/ps", *options], capture_output=True, text=True, check=False).stdout


class Memory:
    """Samples of each role's resident memory, in MiB."""

    def __init__(self) -> None:
        self.samples: dict[str, list[float]] = defaultdict(list)

    def sample(self) -> None:
        """Take one sample of each process."""
        for name, pid in children().items():
            if listed := _ps("-o", "rss=", "-p", str(pid)).strip():
                self.samples[name].append(int(listed) / 1024)

    def report(self) -> Iterator[str]:
        """A line for each process: what it had in the first and in the last fifth of the samples, and at most."""
        for name, values in sorted(self.samples.items()):
            fifth = max(1, len(values) // 5)
            first, last = sum(values[:fifth]) / fifth, sum(values[-fifth:]) / fifth
            yield f"{name:>12}  {first:7.1f} {last:7.1f} {max(values):7.1f}"


async def questions(url: str, count: int, every_s: float) -> list[float]:
    """The times to the first text of HIGH questions, one asked every so many seconds."""
    times: list[float] = []

    async def ask() -> None:
        client = caller(url, QUESTION, "high", TOKENS)
        await client.open()
        times.append((await answer(client))[0])
        client.close()

    asked = []
    for _ in range(count):
        asked.append(asyncio.create_task(ask()))
        await asyncio.sleep(every_s)
    await asyncio.gather(*asked)
    return times


async def ended(client: AsyncOpenAI, batch_id: str, memory: Memory) -> Batch:
    """The batch once it has ended. The gateway may be away meanwhile."""
    shown = time.monotonic()
    impatient = client.with_options(timeout=_PATIENCE_S, max_retries=0)
    while True:
        await asyncio.to_thread(memory.sample)
        try:
            batch = await impatient.batches.retrieve(batch_id)
        except APIError:
            await asyncio.sleep(0.5)
            continue
        if batch.status in _FINAL:
            return batch
        if time.monotonic() - shown > 20:
            shown = time.monotonic()
            print(f"  {batch.status}: {batch.request_counts}", flush=True)
        await asyncio.sleep(1.0)


async def kill_in_turn(kills: int) -> None:
    """Kill the roles with SIGKILL, one after another."""
    for number in range(kills):
        await asyncio.sleep(KILL_EVERY_S)
        role = ROLES[number % len(ROLES)]
        if (pid := children().get(role)) is not None:
            print(f"  kill -9 {role}", flush=True)
            os.kill(pid, signal.SIGKILL)


async def stand_still(for_s: float) -> None:
    """Stop the gateway for a time, and kill it then. `headrace up` starts another one."""
    if for_s and (pid := children().get("gateway")) is not None:
        print(f"  kill -STOP gateway, for {for_s:.0f} s", flush=True)
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(for_s)
        print("  kill -9 gateway", flush=True)
        os.kill(pid, signal.SIGKILL)


async def read(client: AsyncOpenAI, batch: Batch) -> tuple[Counter[str], Counter[str]]:
    """How often each custom_id is in the two files, and how the lines ended."""
    seen, how = Counter[str](), Counter[str]()
    for file_id in (batch.output_file_id, batch.error_file_id):
        if file_id is None:
            continue
        content = await client.files.content(file_id)
        for line in content.text.splitlines():
            row = json.loads(line)
            seen[row["custom_id"]] += 1
            body = row["response"] and row["response"]["body"]
            error = row["error"] or (body or {}).get("error") or {"code": "answered"}
            how[error["code"]] += 1
    return seen, how


async def run(url: str, folder: Path, options: argparse.Namespace) -> bool:
    """One whole batch. Returns whether every line is there once."""
    client, memory = AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=5), Memory()
    alone = await questions(url, options.questions, options.every_s)
    write_lines(folder / "input.jsonl", options.lines)
    file = await client.files.create(file=folder / "input.jsonl", purpose="batch")
    started = time.monotonic()
    batch = await client.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h")
    waiting = asyncio.create_task(ended(client, batch.id, memory))
    await asyncio.sleep(3)
    beside = await questions(url, options.questions, options.every_s)

    async def disturb() -> None:
        await kill_in_turn(options.kills)
        await stand_still(options.away_s)

    disturbing = asyncio.create_task(disturb())
    batch = await waiting
    disturbing.cancel()
    took_s = time.monotonic() - started
    seen, how = await read(client, batch)
    once = set(seen) == {f"line-{number}" for number in range(options.lines)} and set(seen.values()) == {1}
    print(f"\n{batch.status} after {took_s:.0f} s: {batch.request_counts}; {dict(how)}")
    print(f"each line once: {'yes' if once else 'NO'}")
    print("\nHIGH's first text, seconds      p50    p95")
    for name, times in (("alone", alone), ("beside the batch", beside)):
        print(f"{name:>26}   {quantile(times, 0.5):6.3f} {quantile(times, 0.95):6.3f}")
    print(f"{'p95, ratio':>26}   {'':6} {quantile(beside, 0.95) / quantile(alone, 0.95):6.2f}")
    print("\nmemory, MiB     first    last    most")
    print("\n".join(memory.report()))
    return once


@contextmanager
def pipeline(options: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """Run `headrace up` for the duration of the block. The port stays the same, so that a new gateway is found."""
    simulated = SIMULATED | {"SIMULATED_TOKENS_PER_S": str(options.tokens_per_s)}
    engine = {"MODEL": str(options.model)} if options.model else simulated
    own = {
        "DRAIN_TIMEOUT_S": "1",
        "HTTP_ANSWERS_PER_S": "0",
        "HTTP_STATISTICS_PER_S": "0",
        "HTTP_PORT": str(options.port),
    }
    with tempfile.TemporaryDirectory() as folder, up(Path(folder), ALONE | engine | own) as here:
        yield here["http"], Path(folder)


def main() -> int:
    """Returns 0 if every line has one result."""
    parser = argparse.ArgumentParser(prog="python -m bench.batches", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lines", type=int, default=10_000, metavar="N", help="lines of the batch (default: 10000)")
    parser.add_argument("--questions", type=int, default=40, metavar="N", help="HIGH questions alone and beside it")
    parser.add_argument(
        "--every-s",
        type=float,
        default=EVERY_S,
        metavar="S",
        help="seconds between them; a real model needs more",
    )
    parser.add_argument("--kills", type=int, default=12, metavar="N", help="how many processes are killed")
    parser.add_argument("--away-s", type=float, default=0.0, metavar="S", help="how long the gateway is away, seconds")
    parser.add_argument("--model", type=Path, metavar="DIR", help="folder of a model; else the simulated engine runs")
    parser.add_argument("--tokens-per-s", type=int, default=1000, metavar="N", help="of the simulated engine")
    parser.add_argument("--port", type=int, default=8477, metavar="PORT", help="of the gateway (default: 8477)")
    options = parser.parse_args()
    with pipeline(options) as (url, folder):
        return int(not asyncio.run(run(url, folder, options)))


if __name__ == "__main__":
    sys.exit(main())
