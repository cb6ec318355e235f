"""Whether one client that floods the list endpoints slows down other clients.

    python -m bench.flood [--seconds S] [--rate N] [--slices N]

Runs `headrace up` with its defaults and three API keys. The first client calls `/api/tags` N times a second from its
own process, far above its rate limit. The second calls `/queue/stats` ten times a second. The third sends one chat
request after another. Three kinds of time slices alternate, so that other load on the machine affects all of them: in
peace, under flood, and with the same flood aimed at a bare socket on this machine. The last kind shows how much the
flooding process itself takes from the shared cores. S is the total time of each kind.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import msgspec

from bench.running import ALONE, ROOT, Client, Reply, ended, up
from pipeline.gateway.identity import make_key
from pipeline.process.lifecycle import loop_factory

CONNECTIONS = 8
STATISTICS_EVERY_S = 0.1
GOAL_P99_MS = 50.0
LISTS, STATS, CHAT = "/api/tags", "/queue/stats", "/v1/chat/completions"
QUESTION = json.dumps({"messages": [{"role": "user", "content": "What is 2 + 3?"}], "temperature": 0}).encode()
NAMES = ("flood", "stats", "chat")


class Slice(StrEnum):
    """What else happens while the two clients call."""

    PEACE = "in peace"
    ELSEWHERE = "flood elsewhere"
    FLOOD = "under flood"


@dataclass
class Found:
    """The results: response times in ms by endpoint and kind of slice, and the responses to the flood.

    Attributes:
        refused: calls of the other clients that got another status than 200.
        flood: calls of the flood by status.
        without_retry_after: responses with status 429 that had no Retry-After header.
        flooded_s: how long the flood lasted in all.
    """

    times_ms: dict[tuple[str, Slice], list[float]] = field(default_factory=dict)
    refused: int = 0
    flood: Counter[str] = field(default_factory=Counter)
    without_retry_after: int = 0
    flooded_s: float = 0.0

    def add(self, name: str, reply: Reply, kind: Slice) -> None:
        """Record one call that is not part of the flood."""
        self.refused += reply.status != 200
        self.times_ms.setdefault((name, kind), []).append(reply.whole_s * 1e3)


def keys() -> tuple[dict[str, str], str]:
    """Three new API keys by name, and the value of the setting `http_keys` that accepts them."""
    made = {name: make_key(name) for name in NAMES}
    return {name: key for name, (key, _) in made.items()}, msgspec.json.encode([e for _, e in made.values()]).decode()


async def call(client: Client, until: float, pause_s: float, note: Callable[[Reply], None]) -> None:
    """Call repeatedly until a time, with at least pause_s between two calls."""
    due = time.perf_counter()
    while (now := time.perf_counter()) < until:
        if now < due:
            await asyncio.sleep(due - now)
        note(await client.ask())
        due = max(due + pause_s, time.perf_counter() - pause_s)


async def flood(url: str, key: str, rate: float, seconds: float) -> None:
    """Run the flooding process. It prints its responses by status as JSON."""
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


_REFUSAL = b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n"


async def refuse_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer every request on one connection to the bare socket."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(_REFUSAL)
    writer.close()


async def sink() -> None:
    """Run the process with the bare socket: print its URL, then serve until interrupted."""
    server = await asyncio.start_server(refuse_all, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


@contextmanager
def elsewhere() -> Iterator[str]:
    """Run a bare socket in a process for the duration of the block; yields its URL."""
    command = [sys.executable, "-m", "bench.flood", "--sink"]
    with ended(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT)) as process:
        assert process.stdout is not None
        with process.stdout as said:
            yield said.readline().decode().strip()


@asynccontextmanager
async def flooded(url: str, key: str, rate: float, seconds: float, found: Found) -> AsyncIterator[None]:
    """Flood url for the duration of the block; the responses are added to found."""
    options = ["--flood", url, "--rate", str(rate), "--seconds", str(seconds)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.flood", *options, stdout=subprocess.PIPE, stdin=subprocess.PIPE, cwd=ROOT
    )
    flooding = asyncio.ensure_future(process.communicate(key.encode()))
    try:
        yield
    finally:
        printed, _ = await flooding
    said = json.loads(printed)
    found.flood.update(said["answers"])
    found.without_retry_after += said["without_retry_after"]
    found.flooded_s += seconds


async def calls(found: Found, url: str, secrets: dict[str, str], seconds: float, kind: Slice) -> None:
    """Run the two clients that are not part of the flood."""
    until = time.perf_counter() + seconds

    def note(name: str) -> Callable[[Reply], None]:
        return lambda reply: found.add(name, reply, kind)

    await asyncio.gather(
        _connected(url, STATS, None, secrets["stats"], until, STATISTICS_EVERY_S, note(STATS)),
        _connected(url, CHAT, QUESTION, secrets["chat"], until, 0.0, note(CHAT)),
    )


async def measure(url: str, secrets: dict[str, str], *, seconds: float, rate: float, slices: int) -> Found:
    """Run the three kinds of slices in turns."""
    found, each_s, key = Found(), seconds / slices, secrets["flood"]
    await calls(Found(), url, secrets, 1.0, Slice.PEACE)  # warm-up, not counted
    with elsewhere() as other:
        for _ in range(slices):
            await calls(found, url, secrets, each_s, Slice.PEACE)
            async with flooded(other, key, rate, each_s, Found()):
                await calls(found, url, secrets, each_s, Slice.ELSEWHERE)
            async with flooded(url, key, rate, each_s, found):
                await calls(found, url, secrets, each_s, Slice.FLOOD)
    return found


def report(found: Found) -> None:
    print(f"{'':28} {'p50 ms':>8} {'p95':>8} {'p99':>8} {'slowest':>8} {'calls':>8}")
    for name in (STATS, CHAT):
        for kind in Slice:
            times = found.times_ms[name, kind]
            cut = statistics.quantiles(times, n=100)
            label = f"{name.rpartition('/')[2]}, {kind}"
            print(f"{label:28} {cut[49]:8.1f} {cut[94]:8.1f} {cut[98]:8.1f} {max(times):8.1f} {len(times):8}")
    calls = found.flood.total()
    refused = found.flood["429"]
    rate = calls / found.flooded_s
    print(f"\nflood: {calls} calls in {found.flooded_s:.0f} s, {rate:.0f}/s, by status {dict(found.flood)}")
    print(f"{refused - found.without_retry_after} of {refused} rejections have a Retry-After header")
    print(f"{found.refused} of all other calls failed")
    p99_ms = statistics.quantiles(found.times_ms[STATS, Slice.FLOOD], n=100)[98]
    verdict = "met" if p99_ms <= GOAL_P99_MS else "missed"
    print(f"statistics under flood: p99 {p99_ms:.1f} ms (goal: {GOAL_P99_MS:.0f} ms: {verdict})")
    peace, other, flood_ = (statistics.median(found.times_ms[CHAT, kind]) for kind in Slice)
    print(f"chat under flood: {flood_ / other:.2f} times its median with the flood elsewhere", end=", ")
    print(f"{flood_ / peace:.2f} times that in peace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="total time of each kind of slice (default: 30)")
    parser.add_argument("--rate", type=float, default=400.0, help="calls per second of the flood (default: 400)")
    parser.add_argument("--slices", type=int, default=5, help="slices of each kind (default: 5)")
    # These start the flooding process, which reads its key from standard input, and the process with the bare socket.
    parser.add_argument("--flood", metavar="URL", help=argparse.SUPPRESS)
    parser.add_argument("--sink", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        if options.sink:
            with contextlib.suppress(KeyboardInterrupt):
                runner.run(sink())
            return
        if options.flood:
            runner.run(flood(options.flood, sys.stdin.read(), options.rate, options.seconds))
            return
        secrets, entries = keys()
        with tempfile.TemporaryDirectory() as name, up(Path(name), ALONE | {"HTTP_KEYS": entries}) as here:
            measured = measure(here["http"], secrets, seconds=options.seconds, rate=options.rate, slices=options.slices)
            report(runner.run(measured))


if __name__ == "__main__":
    main()
