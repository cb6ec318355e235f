"""How well the pipeline predicts the wait of a queued request.

    python -m bench.predictions [--requests N] [--load X] [--model DIR]

Requests of all priorities arrive at random times (Poisson), at a multiple of what the engine can do, with answers of
random lengths. Each one's position and wait are asked for as soon as it is stored. The table compares the predicted
wait with the time until a worker began it. Requests that would wait less than half a second are left out. Further
requests arrive until the last measured one has begun.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import nats

from bench.running import ALONE, up
from pipeline.wire.answers import Status, decode_answer, is_last
from pipeline.wire.messages import Position
from pipeline.wire.subjects import MSG_ID, QUEUE_POSITION, Priority, reply_subject

PARTS = {Priority.HIGH: 0.2, Priority.MEDIUM: 0.4, Priority.LOW: 0.4}
LENGTHS = (16, 112)
LEAST_WAIT_S = 0.5
WARM_UP = 60
TOKENS_PER_S = 1000.0
SIMULATED = {"ENGINE": "simulated", "SIMULATED_TOKENS_PER_S": f"{TOKENS_PER_S:g}", "SIMULATED_ANSWER_TOKENS": "1000"}


class Arrivals:
    """Sends requests, and notes what was predicted for each and what became of it."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._stream = client.jetstream()
        self._random = random.Random(1)
        self._stored: dict[str, float] = {}
        self._ended: set[str] = set()
        self._changed = asyncio.Event()
        self.predicted: dict[str, float] = {}
        self.waited: dict[str, float] = {}

    async def send(self, number: int, *, measured: bool = True) -> None:
        """Store one request, and ask for its wait if it is measured."""
        priority = self._random.choices(list(PARTS), list(PARTS.values()))[0]
        name = f"{priority.value}-{number}"
        body = {"prompt": "Tell me a story.", "stream": True, "max_tokens": self._random.randint(*LENGTHS)}
        await self._stream.publish(
            f"llm.request.{priority.value}", msgspec.json.encode(body), headers={MSG_ID: name}, timeout=30
        )
        if not measured:
            return
        answer = await self._client.request(QUEUE_POSITION, name.encode(), timeout=30)
        position = msgspec.json.decode(answer.data, type=Position)
        self._stored[name] = time.monotonic()
        if position.state == "queued" and isinstance(position.eta_ms, float):
            self.predicted[name] = position.eta_ms / 1000

    async def heard(self, message: Any) -> None:
        """A message of an answer."""
        answer = decode_answer(message.data)
        if isinstance(answer, Status) and answer.state == "started":
            self.waited[answer.id] = time.monotonic()
            self._changed.set()
        elif is_last(answer):
            self._ended.add(answer.id)
            self._changed.set()

    def results(self, priority: Priority) -> list[tuple[float, float]]:
        """Pairs of predicted and real wait, in seconds."""
        pairs = [
            (predicted, self.waited[name] - self._stored[name])
            for name, predicted in self.predicted.items()
            if name.startswith(priority.value) and name in self.waited
        ]
        return [(predicted, waited) for predicted, waited in pairs if max(predicted, waited) >= LEAST_WAIT_S]

    async def all_ended(self, count: int) -> None:
        """Wait until so many requests have ended."""
        while len(self._ended) < count:
            self._changed.clear()
            await self._changed.wait()

    async def all_began(self) -> None:
        """Wait until each request whose wait was predicted has begun or ended."""
        while self.predicted.keys() - self.waited.keys() - self._ended:
            self._changed.clear()
            await self._changed.wait()


async def arrive(
    arrivals: Arrivals, numbers: Iterable[int], gaps: random.Random, per_s: float, *, measured: bool
) -> None:
    """Send requests with these numbers at random times."""
    async with asyncio.TaskGroup() as sending:
        for number in numbers:
            sending.create_task(arrivals.send(number, measured=measured))
            await asyncio.sleep(gaps.expovariate(per_s))


async def measured(url: str, requests: int, per_s: float) -> Arrivals:
    """Let requests arrive until the measured ones have begun."""
    client = await nats.connect(url)
    arrivals, gaps = Arrivals(client), random.Random(2)
    await client.subscribe(reply_subject("*"), cb=arrivals.heard)
    await asyncio.gather(*map(arrivals.send, range(WARM_UP)))
    await arrivals.all_ended(WARM_UP)
    arrivals.predicted.clear()
    numbers = itertools.count(WARM_UP)
    await arrive(arrivals, itertools.islice(numbers, requests), gaps, per_s, measured=True)
    more = asyncio.create_task(arrive(arrivals, numbers, gaps, per_s, measured=False))
    await arrivals.all_began()
    more.cancel()
    await asyncio.wait([more])
    await client.close()
    return arrivals


def row(name: str, pairs: Sequence[tuple[float, float]]) -> None:
    """Print the errors of one lane."""
    if len(pairs) < 2:
        print(f"{name:<8} {len(pairs):6}")
        return
    errors = [abs(predicted - waited) / max(waited, LEAST_WAIT_S) for predicted, waited in pairs]
    ratio = statistics.median(predicted / max(waited, LEAST_WAIT_S) for predicted, waited in pairs)
    middle, late = statistics.median(errors), statistics.quantiles(errors, n=10)[-1]
    wait = statistics.median(waited for _, waited in pairs)
    print(f"{name:<8} {len(pairs):6} {wait:8.1f} s {ratio:8.2f} {100 * middle:8.0f} % {100 * late:8.0f} %", flush=True)


def main() -> int:
    """Returns 0: the errors are printed."""
    parser = argparse.ArgumentParser(prog="python -m bench.predictions", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=1000, metavar="N", help="how many (default: 1000)")
    parser.add_argument("--load", type=float, default=1.5, metavar="X", help="times the capacity (default: 1.5)")
    parser.add_argument("--tokens-per-s", type=float, default=TOKENS_PER_S, metavar="R", help="the engine's capacity")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model's folder (default: the simulated engine)")
    given = parser.parse_args()
    per_s = given.load * given.tokens_per_s / (sum(LENGTHS) / 2)
    engine = {"MODEL": str(given.model.resolve())} if given.model else SIMULATED
    with tempfile.TemporaryDirectory() as folder, up(Path(folder), ALONE | engine) as here:
        arrivals = asyncio.run(measured(here["nats"], given.requests, per_s))
    print(f"{given.requests} requests at {given.load:g} times the capacity\n")
    print(f"{'':<8} {'count':>6} {'wait':>10} {'pred/real':>8} {'median':>8} {'p90':>10} (errors)")
    for priority in Priority:
        row(priority.value, arrivals.results(priority))
    row("all", [pair for priority in Priority for pair in arrivals.results(priority)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
