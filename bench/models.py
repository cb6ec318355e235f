"""Three models of one worker, and memory for two of them: `python -m bench.models`.

The demo model is served under three names. A person asks one model a HIGH question after another, first alone, and then
beside 300 requests at random for all three. The engine of another model is killed meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from bench.running import ALONE, up
from consumers.demo_model import PATH

NAMES = ("red", "green", "blue")
ASKED, *OTHERS = NAMES
PGREP = shutil.which("pgrep") or "pgrep"
HIGH_ALONE = 20
PAUSE_S = 0.2
# The weights of the demo model take 3.1 MB as float32.
BUDGET_BYTES = 7_000_000


class Wait(NamedTuple):
    """What one HIGH question waited for a slot, and for its first token, milliseconds."""

    queue_ms: float
    ttft_ms: float


def main() -> None:
    """Run the benchmark, and print what came of it."""
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--seed", type=int, default=27)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in NAMES:
            shutil.copytree(PATH, folder / "models" / model)
        paths = [str(folder / "models" / model) for model in NAMES]
        settings = ALONE | {"MODEL": json.dumps(paths), "MODELS_BYTES": str(BUDGET_BYTES)}
        with up(folder, settings) as here:
            asyncio.run(measure(folder, here, requests=options.requests, seed=options.seed))


async def measure(folder: Path, here: dict[str, str], *, requests: int, seed: int) -> None:
    """Ask alone, then beside the others."""
    chance = random.Random(seed)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=here["http"], timeout=600, limits=limits) as client:
        await ask(client, NAMES[1], "low")
        alone = [await high(client) for _ in range(HIGH_ALONE)]
        before, began_at = loads(folder), time.monotonic()
        asked = [(chance.choice(NAMES), chance.choice(("medium", "low"))) for _ in range(requests)]
        answering = asyncio.gather(*(ask(client, model, priority) for model, priority in asked))
        asking = asyncio.create_task(keep_asking(client))
        await asyncio.sleep(3.0)
        killed = kill_an_engine(here["pid"])
        answers = await answering
        took_s = time.monotonic() - began_at
        asking.cancel()
        beside = (await asyncio.gather(asking, return_exceptions=True))[0]
    own = sum(answer["model"] == model for answer, (model, _) in zip(answers, asked, strict=True))
    print(f"{requests} requests for {len(NAMES)} models, memory for 2: {own} answered by their own, in {took_s:.1f} s")
    print(f"loads: {loads(folder) - before}; requests by model: {dict(Counter(model for model, _ in asked))}")
    print(f"an engine process was killed meanwhile: {killed}")
    print(f"HIGH questions to {ASKED!r}, a loaded model:      queue p50   p95    first token p50   p95   (ms)")
    show("alone", alone)
    if isinstance(beside, list):
        show("beside them", beside)


async def keep_asking(client: httpx.AsyncClient) -> list[Wait]:
    """Ask until cancelled. Returns the waits."""
    waits = []
    try:
        while True:
            waits.append(await high(client))
    except asyncio.CancelledError:
        return waits


async def high(client: httpx.AsyncClient) -> Wait:
    """One HIGH question."""
    await asyncio.sleep(PAUSE_S)
    account = (await ask(client, ASKED, "high"))["headrace"]
    return Wait(account["queue_ms"], account["ttft_ms"])


async def ask(client: httpx.AsyncClient, model: str, priority: str) -> dict[str, Any]:
    """The answer to one question."""
    body = {"model": model, "messages": [{"role": "user", "content": "Count from 1 to 12."}], "max_tokens": 40}
    reply = await client.post("/v1/chat/completions", json=body, headers={"X-Priority": priority})
    answer: dict[str, Any] = reply.raise_for_status().json()
    return answer


def kill_an_engine(parent: str) -> bool:
    """Kill the engine process of a model that is not asked HIGH questions. Returns whether one ran."""
    worker = _children(parent, "pipeline.cli run mlx")
    engines = [pid for each in worker for pid in _children(each, f"models/({'|'.join(OTHERS)})")]
    if engines:
        os.kill(int(engines[-1]), signal.SIGKILL)
    return bool(engines)


def _children(parent: str | int, command: str) -> list[str]:
    found = subprocess.run([PGREP, "-P", str(parent), "-f", command], capture_output=True, text=True, check=False)
    return found.stdout.split()


def loads(folder: Path) -> int:
    """How many loads the worker has begun."""
    return (folder / "state" / "logs" / "mlx.log").read_text().count("Loading model")


def show(label: str, waits: Sequence[Wait]) -> None:
    """Print one row."""
    columns = []
    for values in zip(*waits, strict=True):
        cuts = statistics.quantiles(values, n=20) if len(values) > 1 else [values[0]] * 19
        columns.append(f"{cuts[9]:9.0f} {cuts[18]:6.0f}")
    print(f"  {label:<12} ({len(waits):3} questions) {'':>15} {columns[0]}   {'':>6}{columns[1]}")


if __name__ == "__main__":
    main()
