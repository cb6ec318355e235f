"""A burst of HTTP connections, a tenth of them HIGH: when each priority gets its first text, and what was lost.

    python -m bench.burst [--connections N] [--engine simulated|mlx] [--url URL]

All clients connect at once, in a mixed order, and each streams one answer. What is counted begins when the burst
begins, so the wait for the connection counts too. Without `--url` it starts a headrace of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from bench.running import ALONE, Client, up
from pipeline.process.files import raise_limit
from pipeline.process.lifecycle import loop_factory

GOAL = 0.25
_HIGH_EVERY = 10
_TIMEOUT_S = 300.0
_PATH = "/v1/chat/completions"


@dataclass
class Burst:
    """What became of the clients. Times in seconds since the burst began, by priority."""

    first_s: dict[str, list[float]] = field(default_factory=lambda: {"high": [], "low": []})
    whole_s: dict[str, list[float]] = field(default_factory=lambda: {"high": [], "low": []})
    lost: Counter[str] = field(default_factory=Counter)

    @property
    def ratio(self) -> float:
        """HIGH's median first text as a part of LOW's."""
        return statistics.median(self.first_s["high"]) / statistics.median(self.first_s["low"])


async def one(url: str, priority: str, body: bytes, began_at: float, burst: Burst) -> None:
    """Connect, stream one answer, and note when its first text came."""
    client = Client(url, _PATH, body, {"x-priority": priority})
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            await client.open()
            status = await client.begin()
            if status != 200:
                burst.lost[f"status {status}"] += 1
                return
            seen, first_at = b"", 0.0
            while b"[DONE]" not in seen:
                read = await client.read()
                if not read:
                    burst.lost["ended early"] += 1
                    return
                seen += read
                if not first_at and b'"content":"' in seen.replace(b'"content":""', b""):
                    first_at = time.perf_counter()
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        burst.lost[type(error).__name__] += 1
        return
    finally:
        if hasattr(client, "_writer"):
            client.close()
    burst.first_s[priority].append(first_at - began_at)
    burst.whole_s[priority].append(time.perf_counter() - began_at)


async def measure(url: str, connections: int, max_tokens: int) -> Burst:
    """Send the burst, and wait for its end."""
    burst = Burst()
    message = {"role": "user", "content": "What is 2 + 3?"}
    body = json.dumps({"messages": [message], "stream": True, "max_tokens": max_tokens}).encode()
    began_at = time.perf_counter()
    priorities = ("high" if number % _HIGH_EVERY == 0 else "low" for number in range(connections))
    await asyncio.gather(*(one(url, priority, body, began_at, burst) for priority in priorities))
    return burst


def report(burst: Burst) -> None:
    for priority, first_s in burst.first_s.items():
        if len(first_s) > 1:
            cut, whole = statistics.quantiles(first_s, n=20), statistics.median(burst.whole_s[priority])
            print(
                f"{priority:5} {len(first_s):5} answered, first text p50 {cut[9]:6.2f} s, p95 {cut[18]:6.2f} s, "
                f"whole p50 {whole:6.2f} s"
            )
    print(f"lost: {dict(burst.lost) or 'none'}")
    met = "met" if burst.ratio <= GOAL else "missed"
    print(f"HIGH's first text p50 is {burst.ratio:.2f} of LOW's (goal: {GOAL}: {met})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=2000, help="how many at once (default: 2000)")
    parser.add_argument("--engine", choices=["simulated", "mlx"], default="simulated", help="(default: simulated)")
    parser.add_argument("--model", default="demo", help="the model of --engine mlx (default: demo)")
    parser.add_argument("--max-tokens", type=int, default=16, help="of each answer (default: 16)")
    parser.add_argument("--url", help="base URL of a running headrace")
    options = parser.parse_args()
    raise_limit()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        settings = ALONE | {"ENGINE": options.engine, "MODEL": options.model, "HTTP_ANSWERS_PER_S": "0"}
        settings["HTTP_CONNECTIONS"] = str(options.connections + 100)
        url = options.url or stack.enter_context(up(Path(name), settings))["http"]
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            report(runner.run(measure(url, options.connections, options.max_tokens)))


if __name__ == "__main__":
    main()
