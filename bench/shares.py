"""How closely the service of backlogged lanes follows their weights, over every window of some seconds.

    python -m bench.shares [--seconds S] [--window S] [--model DIR]

Each lane always has requests waiting. Their answers stream; the benchmark counts the tokens of each lane by second,
and compares the lanes' parts of every window with the weights. Each answer has the same length in one run, and a random
one in the other.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import nats

from bench.running import ALONE, up
from pipeline.aio import Background
from pipeline.config import Config
from pipeline.core.scheduler import shares
from pipeline.wire.answers import Chunk, decode_answer, is_last
from pipeline.wire.subjects import MSG_ID, Priority, reply_subject

WAITING = 48
WARM_UP_S = 3.0
PROMPT = "Tell me a story about a dog."
SIMULATED = {"ENGINE": "simulated", "SIMULATED_TOKENS_PER_S": "2000", "SIMULATED_ANSWER_TOKENS": "1000"}
LENGTHS = {"64 tokens each": (64, 64), "16 to 112 tokens": (16, 112)}


class Load:
    """Keeps every lane full, and counts the tokens of each by second."""

    def __init__(self, client: Any, lengths: tuple[int, int]) -> None:
        self._client = client
        self._lengths = lengths
        self._random = random.Random(1)
        self._stream = client.jetstream()
        self._asked = 0
        self._asking = Background()
        self.served: dict[int, Counter[Priority]] = {}

    async def ask(self, priority: Priority) -> None:
        """Publish one request."""
        self._asked += 1
        body = {"prompt": PROMPT, "stream": True, "max_tokens": self._random.randint(*self._lengths)}
        headers = {MSG_ID: f"{priority.value}-{self._asked}"}
        await self._stream.publish(f"llm.request.{priority.value}", msgspec.json.encode(body), headers=headers)

    async def heard(self, message: Any) -> None:
        """Count a chunk, or replace a request that has ended."""
        answer = decode_answer(message.data)
        priority = Priority(answer.id.partition("-")[0])
        if isinstance(answer, Chunk):
            second = self.served.setdefault(int(time.monotonic()), Counter())
            second[priority] += len(answer.choices[0].token_ids)
        elif is_last(answer):
            self._asking.start(self.ask(priority), what="a new request")


def windows(served: dict[int, Counter[Priority]], began: int, seconds: int, window: int) -> list[dict[Priority, float]]:
    """Each priority's part of the tokens, for every window of whole seconds."""
    parts = []
    for first in range(began, began + seconds - window + 1):
        total = sum((served.get(second, Counter()) for second in range(first, first + window)), Counter[Priority]())
        parts.append({priority: total[priority] / max(1, total.total()) for priority in Priority})
    return parts


async def measured(url: str, lengths: tuple[int, int], seconds: int, window: int) -> list[dict[Priority, float]]:
    """Keep the lanes full for so many seconds."""
    client = await nats.connect(url)
    load = Load(client, lengths)
    await client.subscribe(reply_subject("*"), cb=load.heard)
    for _ in range(WAITING):
        await asyncio.gather(*map(load.ask, Priority))
    await asyncio.sleep(WARM_UP_S)
    began = int(time.monotonic()) + 1
    await asyncio.sleep(seconds + 1.5)
    await client.close()
    return windows(load.served, began, seconds, window)


def main() -> int:
    """Returns 0: the deviations are printed."""
    parser = argparse.ArgumentParser(prog="python -m bench.shares", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=30, metavar="S", help="time of each run (default: 30)")
    parser.add_argument("--window", type=int, default=10, metavar="S", help="length of a window (default: 10)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model's folder (default: the simulated engine)")
    given = parser.parse_args()
    weights = shares(Config().weights, Config().floor_share)
    engine = {"MODEL": str(given.model.resolve())} if given.model else SIMULATED
    print(f"each priority's part of the tokens, in percent, over every window of {given.window} s\n")
    print(f"{'':<18} {'':>8} {'weight':>7} {'least':>7} {'mean':>7} {'most':>7} {'off by':>7}")
    for name, lengths in LENGTHS.items():
        with tempfile.TemporaryDirectory() as folder, up(Path(folder), ALONE | engine) as here:
            parts = asyncio.run(measured(here["nats"], lengths, given.seconds, given.window))
        for priority in Priority:
            found, weight = [100 * part[priority] for part in parts], 100 * weights[priority]
            mean, off = sum(found) / len(found), max(abs(part - weight) for part in found)
            figures = f"{weight:7.1f} {min(found):7.1f} {mean:7.1f} {max(found):7.1f} {off:7.1f}"
            print(f"{name:<18} {priority.value:>8} {figures}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
