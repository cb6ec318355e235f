"""How soon the slots are free again after clients hang up in the middle of a stream.

    python -m bench.hangups [--streams N] [--hang-ups N] [--rounds N] [--tokens-per-s RATE]

Runs `headrace up` with the simulated engine and one slot for each of N streaming clients. In each round, some clients
abort their connections at the same moment, as a killed program does. The benchmark measures the time from that moment
until the gateway has cancelled the last of their requests, until the worker reports their slots free, and until every
record is closed with its error on disk. Then new clients take their places. It also prints the resident memory of the
gateway and the worker, with and without the open streams.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec

from bench.running import ALONE, Client, up
from pipeline.broker.connection import Message
from pipeline.broker.jetstream import Bus
from pipeline.process.lifecycle import loop_factory
from pipeline.wire.messages import WorkerStatus

PATIENCE_S = 60.0
GOAL_MS = 200.0
PATH = "/v1/chat/completions"
STAGES = ("cancel sent", "slots free", "records closed")


def settings(streams: int, tokens_per_s: float) -> dict[str, str]:
    return ALONE | {
        "ENGINE": "simulated",
        "SLOTS": str(streams),
        "SIMULATED_TOKENS_PER_S": str(tokens_per_s),
        "SIMULATED_PREFILL_TOKENS_PER_S": "1e9",
        "SIMULATED_ANSWER_TOKENS": "30000",
        "DEFAULT_MAX_TOKENS": "30000",
        "HTTP_ANSWERS_PER_S": "0",
        "DRAIN_TIMEOUT_S": "1",
    }


class Watch:
    """The worker's slots and the cancelled requests, as published. One writer: its own subscriptions."""

    def __init__(self) -> None:
        self.used = 0
        self.cancels = 0
        self.closed = 0
        self._heard = asyncio.Event()

    async def listen(self, bus: Bus) -> None:
        """Subscribe. Call once."""
        await bus.subscribe("llm.worker.>", self._on_status)
        await bus.subscribe("llm.cancel.*", self._on_cancel)
        await bus.subscribe("llm.event.*.cancelled", self._on_closed)

    async def until(self, condition: Callable[[], bool]) -> float:
        """Wait until condition is true. Returns the time (`time.perf_counter`)."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self._heard.clear()
                await self._heard.wait()
        return time.perf_counter()

    async def _on_status(self, message: Message) -> None:
        status = msgspec.json.decode(message.data, type=WorkerStatus)
        if status.engine == "mlx":
            self.used = status.slots.used
            self._heard.set()

    async def _on_cancel(self, _: Message) -> None:
        self.cancels += 1
        self._heard.set()

    async def _on_closed(self, _: Message) -> None:
        self.closed += 1
        self._heard.set()


class Stream:
    """One client that reads a streamed answer."""

    def __init__(self, url: str, number: int) -> None:
        body = {"messages": [{"role": "user", "content": f"stream {number}"}], "stream": True}
        self._client = Client(url, PATH, json.dumps(body).encode())
        self._reading: asyncio.Task[None] | None = None
        self.words = asyncio.Event()

    async def open(self) -> None:
        """Send the request and start to read."""
        await self._client.open()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        if await self._client.begin() != 200:
            raise SystemExit("The gateway rejected a stream.")
        while part := await self._client.read():
            if b"data:" in part:  # not a keep-alive comment
                self.words.set()

    def hang_up(self) -> None:
        """Abort the connection."""
        if self._reading is not None:
            self._reading.cancel()
        self._client.hang_up()


async def begin(url: str, count: int) -> list[Stream]:
    """Open `count` streams. Returns when each has received its first words."""
    streams = [Stream(url, number) for number in range(count)]
    for stream in streams:
        await stream.open()
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*(stream.words.wait() for stream in streams))
    return streams


async def measure(here: dict[str, str], streams: int, hang_ups: int, rounds: int) -> list[tuple[float, ...]]:
    """Run the rounds. Returns the time of each stage, in ms since the clients hung up."""
    found = []
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(Bus.connect(here["nats"], name="bench"))
        watch = Watch()
        await watch.listen(bus)
        before = memory_of(int(here["pid"]))
        running = await begin(here["http"], streams)
        await watch.until(lambda: watch.used == streams)
        report_memory(before, memory_of(int(here["pid"])), streams)
        for _ in range(rounds):
            watch.cancels = watch.closed = 0
            leaving, running = running[:hang_ups], running[hang_ups:]
            began_at = time.perf_counter()
            for stream in leaving:
                stream.hang_up()
            reached = await asyncio.gather(
                watch.until(lambda: watch.cancels >= hang_ups),
                watch.until(lambda: watch.used <= streams - hang_ups),
                watch.until(lambda: watch.closed >= hang_ups),
            )
            found.append(tuple((at - began_at) * 1e3 for at in reached))
            running += await begin(here["http"], hang_ups)
            await watch.until(lambda: watch.used == streams)
        for stream in running:
            stream.hang_up()
    return found


def memory_of(pid: int) -> dict[str, float]:
    """Resident memory of the gateway and of the worker, by role, in MiB."""
    listing = ["/bin/ps", "-A", "-o", "ppid=,rss=,args="]
    listed = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.splitlines()
    children = [
        (int(rss), args) for parent, rss, args in (line.split(None, 2) for line in listed) if int(parent) == pid
    ]
    roles = {"gateway": "run gateway", "worker": "run mlx"}
    return {name: rss / 1024 for rss, args in children for name, role in roles.items() if role in args}


def report_memory(before: dict[str, float], after: dict[str, float], streams: int) -> None:
    for name, mib in after.items():
        each_kib = (mib - before[name]) * 1024 / streams
        print(f"{name:8} {before[name]:6.1f} MiB idle, {mib:6.1f} with {streams} streams: {each_kib:.1f} KiB each")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=500, help="open streams (default: 500)")
    parser.add_argument("--hang-ups", type=int, default=200, help="clients that hang up in each round (default: 200)")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds (default: 5)")
    parser.add_argument(
        "--tokens-per-s", type=float, default=1000.0, help="rate of all streams together (default: 1000)"
    )
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as name,
        up(Path(name), settings(options.streams, options.tokens_per_s)) as here,
        asyncio.Runner(loop_factory=loop_factory()) as runner,
    ):
        found = runner.run(measure(here, options.streams, options.hang_ups, options.rounds))
    print(f"\n{options.hang_ups} of {options.streams} hang up: ms until")
    for stage, times in zip(STAGES, zip(*found, strict=True), strict=True):
        print(f"{stage:17} median {statistics.median(times):6.0f}   each " + " ".join(f"{t:6.0f}" for t in times))
    slowest_ms = max(round_[1] for round_ in found)
    print(f"(goal: slots free within {GOAL_MS:.0f} ms in every round: {'met' if slowest_ms <= GOAL_MS else 'missed'})")


if __name__ == "__main__":
    main()
