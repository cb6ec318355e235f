"""Whether one client that floods the lists slows what others ask for.

    python -m bench.flood [--seconds S] [--rate N] [--slices N]

`headrace up` as it is by default, with three API keys. One client calls `/api/tags` N times a second from a process of
its own, far above its limit. A second one asks for `/queue/stats` ten times a second, a third one has one chat after
another answered. Slices with the flood and slices without it alternate, so that what else the machine does falls on
both; S is the time under flood.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from bench.running import ALONE, Client, Reply, up
from pipeline.gateway.identity import make_key
from pipeline.lifecycle import loop_factory

CONNECTIONS = 8
STATISTICS_EVERY_S = 0.1
GOAL_P99_MS = 50.0
LISTS, STATS, CHAT = "/api/tags", "/queue/stats", "/v1/chat/completions"
QUESTION = json.dumps({"messages": [{"role": "user", "content": "What is 2 + 3?"}], "temperature": 0}).encode()
NAMES = ("flood", "stats", "chat")


@dataclass
class Found:
    """What was measured: response times in ms by (call, with flood), and what the flood was answered.

    Attributes:
        refused: how many of all other calls were not answered with status 200.
        flood: how many calls of the flood got which status.
        without_retry_after: how many of its 429 did not say when to come back.
    """

    times_ms: dict[tuple[str, bool], list[float]] = field(default_factory=dict)
    refused: int = 0
    flood: Counter[str] = field(default_factory=Counter)
    without_retry_after: int = 0
    flooded_s: float = 0.0

    def add(self, name: str, reply: Reply, *, flooded: bool) -> None:
        """One call that is not of the flood."""
        self.refused += reply.status != 200
        self.times_ms.setdefault((name, flooded), []).append(reply.whole_s * 1e3)


def keys() -> tuple[dict[str, str], str]:
    """Three new API keys by name, and the setting that knows them."""
    made = {name: make_key(name) for name in NAMES}
    return {name: key for name, (key, _) in made.items()}, msgspec.json.encode([e for _, e in made.values()]).decode()


async def call(client: Client, until: float, pause_s: float, note: Callable[[Reply], None]) -> None:
    """One call after another, one every pause_s at most."""
    due = time.perf_counter()
    while (now := time.perf_counter()) < until:
        if now < due:
            await asyncio.sleep(due - now)
        note(await client.ask())
        due = max(due + pause_s, time.perf_counter() - pause_s)


async def flood(url: str, key: str, rate: float, seconds: float) -> None:
    """The flooding process: calls, and prints what it was answered as JSON."""
    answers: Counter[str] = Counter()
    without = 0

    def note(reply: Reply) -> None:
        nonlocal without
        answers[str(reply.status)] += 1
        without += reply.status == 429 and b"retry-after" not in reply.head

    until = time.perf_counter() + seconds
    await asyncio.gather(
        *(_connected(url, LISTS, None, key, until, CONNECTIONS / rate, note) for _ in range(CONNECTIONS))
    )
    print(json.dumps({"answers": answers, "without_retry_after": without}))


async def _connected(
    url: str,
    path: str,
    body: bytes | None,
    key: str,
    until: float,
    pause_s: float,
    note: Callable[[Reply], None],
) -> None:
    client = Client(url, path, body, {"authorization": f"Bearer {key}"})
    await client.open()
    await call(client, until, pause_s, note)
    client.close()


async def slice_of(found: Found, url: str, secrets: dict[str, str], seconds: float, rate: float) -> None:
    """One slice, flooded where there is a rate."""
    flooding: Awaitable[tuple[bytes, bytes]] | None = None
    if rate:
        options = ["--flood", url, "--rate", str(rate), "--seconds", str(seconds)]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bench.flood", *options, stdout=-1, stdin=-1, cwd=Path(__file__).parent.parent
        )
        flooding = asyncio.ensure_future(process.communicate(secrets["flood"].encode()))
    until = time.perf_counter() + seconds

    def note(name: str) -> Callable[[Reply], None]:
        return lambda reply: found.add(name, reply, flooded=bool(rate))

    await asyncio.gather(
        _connected(url, STATS, None, secrets["stats"], until, STATISTICS_EVERY_S, note(STATS)),
        _connected(url, CHAT, QUESTION, secrets["chat"], until, 0.0, note(CHAT)),
    )
    if flooding is not None:
        said = json.loads((await flooding)[0])
        found.flood.update(said["answers"])
        found.without_retry_after += said["without_retry_after"]
        found.flooded_s += seconds


async def measure(url: str, secrets: dict[str, str], *, seconds: float, rate: float, slices: int) -> Found:
    """Slices in turns."""
    found = Found()
    await slice_of(Found(), url, secrets, 1.0, 0.0)  # what is cold counts for nobody
    for _ in range(slices):
        await slice_of(found, url, secrets, seconds / slices, 0.0)
        await slice_of(found, url, secrets, seconds / slices, rate)
    return found


def report(found: Found) -> None:
    print(f"{'':24} {'p50 ms':>8} {'p95':>8} {'p99':>8} {'slowest':>8} {'calls':>8}")
    for (name, flooded), times in sorted(found.times_ms.items()):
        cut = statistics.quantiles(times, n=100)
        label = f"{name.rpartition('/')[2]} {'under flood' if flooded else 'in peace'}"
        print(f"{label:24} {cut[49]:8.1f} {cut[94]:8.1f} {cut[98]:8.1f} {max(times):8.1f} {len(times):8}")
    calls = found.flood.total()
    refused = found.flood["429"]
    rate = calls / found.flooded_s
    print(f"\nflood: {calls} calls in {found.flooded_s:.0f} s, {rate:.0f} a second, by status {dict(found.flood)}")
    print(f"{refused - found.without_retry_after} of {refused} refusals say when to come back")
    print(f"{found.refused} of all other calls were not answered")
    p99_ms = statistics.quantiles(found.times_ms[STATS, True], n=100)[98]
    verdict = "met" if p99_ms <= GOAL_P99_MS else "missed"
    print(f"statistics under flood: p99 {p99_ms:.1f} ms (goal: {GOAL_P99_MS:.0f} ms: {verdict})")
    peace, flooded = (statistics.median(found.times_ms[CHAT, flooded]) for flooded in (False, True))
    print(f"chat under flood: {flooded / peace:.2f} times its median in peace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="under flood (default: 30)")
    parser.add_argument("--rate", type=float, default=400.0, help="calls a second of the flood (default: 400)")
    parser.add_argument("--slices", type=int, default=5, help="of each kind (default: 5)")
    parser.add_argument("--flood", metavar="URL", help=argparse.SUPPRESS)  # be the flood; the key is read from stdin
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        if options.flood:
            runner.run(flood(options.flood, sys.stdin.read(), options.rate, options.seconds))
            return
        secrets, entries = keys()
        with tempfile.TemporaryDirectory() as name, up(Path(name), ALONE | {"HTTP_KEYS": entries}) as here:
            measured = measure(here["http"], secrets, seconds=options.seconds, rate=options.rate, slices=options.slices)
            report(runner.run(measured))


if __name__ == "__main__":
    main()
