"""The cost of durability: publishes per second and PubAck latency, by what the broker does before it sends a PubAck.

    python -m bench.durability [--seconds S] [--rounds N] [--store DIR]

Starts real servers with the shipped configurations on free loopback ports. Their stores are on the disk of DIR. All
servers run at the same time and are measured in turns, so that other load on the machine affects all of them alike. The
absolute figures depend on the disk and the machine; compare the ratios to the first row.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

from bench.servers import cluster, single
from pipeline.broker import topology
from pipeline.broker.jetstream import Bus
from pipeline.config import Config
from pipeline.process.lifecycle import loop_factory
from pipeline.wire.subjects import MSG_ID, STREAM_REQUESTS

SUBJECT = "llm.request.medium.complex"
BODY = b'{"messages":[{"role":"user","content":"' + b"Why is the sky blue? " * 12 + b'"}],"max_tokens":200}'
AT_ONCE = (1, 64)


def never_synced(conf: str) -> str:
    """The configuration with the server's default, a sync every two minutes."""
    return _without(conf, "sync_interval: always")


def always_synced(conf: str) -> str:
    """The cluster's configuration with a sync before each PubAck."""
    return _without(conf, "sync_interval: 1s").replace("store_dir:", "sync_interval: always\n  store_dir:", 1)


def _without(conf: str, line: str) -> str:
    assert conf.count(line) == 1, f"the configuration does not have the line {line!r}"
    return conf.replace(line, "")


@dataclass
class Row:
    """One configuration and its results by concurrency: the rate of each round (publishes/s) and all latencies."""

    name: str
    start: Callable[[Path], AbstractAsyncContextManager[str]]
    replicas: int
    rates: dict[int, list[float]] = field(default_factory=lambda: {n: [] for n in AT_ONCE})
    latencies_ms: dict[int, list[float]] = field(default_factory=lambda: {n: [] for n in AT_ONCE})


def rows() -> list[Row]:
    return [
        Row("1 server, sync every 2 min (server's default)", partial(single, edit=never_synced), 1),
        Row("1 server, sync before each ack (embedded, single)", single, 1),
        Row("3 copies, sync every 1 s (cluster)", cluster, 3),
        Row("3 copies, sync before each ack", partial(cluster, edit=always_synced), 3),
    ]


async def measure(bus: Bus, row: Row, at_once: int, seconds: float, numbers: count[int]) -> None:
    """Publish with `at_once` concurrent publishers, each waiting for its PubAck before it publishes again."""
    latencies: list[float] = []
    start = time.perf_counter()

    async def publish() -> None:
        while (began := time.perf_counter()) - start < seconds:
            await bus.store(SUBJECT, BODY, headers={MSG_ID: f"bench-{next(numbers)}"})
            latencies.append((time.perf_counter() - began) * 1e3)

    await asyncio.gather(*(publish() for _ in range(at_once)))
    row.rates[at_once].append(len(latencies) / (time.perf_counter() - start))
    row.latencies_ms[at_once] += latencies


async def compare(store: Path, seconds: float, rounds: int) -> list[Row]:
    measured, numbers = rows(), count()
    async with AsyncExitStack() as stack:
        buses = []
        for number, row in enumerate(measured):
            url = await stack.enter_async_context(row.start(store / str(number)))
            bus = await stack.enter_async_context(Bus.connect(url, name="bench"))
            await _make_streams(bus, row)
            buses.append(bus)
            await measure(bus, Row("warm-up", row.start, row.replicas), AT_ONCE[-1], min(seconds, 1.0), numbers)
        for _ in range(rounds):
            for at_once in AT_ONCE:
                for row, bus in zip(measured, buses, strict=True):
                    await measure(bus, row, at_once, seconds, numbers)
                    await bus.js.delete_stream(STREAM_REQUESTS)
                    await _make_streams(bus, row)
    return measured


async def _make_streams(bus: Bus, row: Row) -> None:
    """Create headrace's streams, with lanes that never fill. Retry while a new cluster has no leader."""
    config = Config(replicas=3 if row.replicas == 3 else 1, lane_max_messages=100_000_000)
    give_up_at = time.monotonic() + 30
    while True:
        try:
            await topology.apply(bus.js, config)
            return
        except Exception:
            if time.monotonic() > give_up_at:
                raise
            await asyncio.sleep(0.5)


def fsync_ms(folder: Path) -> float:
    """The median time of 100 fsyncs of 4 KiB in folder."""
    times = []
    with (folder / "probe").open("wb") as file:
        for _ in range(100):
            file.write(os.urandom(4096))
            file.flush()
            began = time.perf_counter()
            os.fsync(file.fileno())
            times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def report(measured: list[Row]) -> None:
    width = max(len(row.name) for row in measured)
    for at_once in AT_ONCE:
        print(f"\n{f'{at_once} at once':{width}}  publishes/s  ratio   p50 ms  ratio   p99 ms  ratio")
        first: tuple[float, ...] | None = None
        for row in measured:
            found = (statistics.median(row.rates[at_once]), *_quantiles(row.latencies_ms[at_once]))
            first = first or found
            rate, p50, p99 = found
            ratios = [now / then for now, then in zip(found, first, strict=True)]
            print(
                f"{row.name:{width}}  {rate:11.0f}  {ratios[0]:5.2f}  {p50:7.2f}  {ratios[1]:5.2f}"
                f"  {p99:7.2f}  {ratios[2]:5.2f}"
            )


def _quantiles(values: list[float]) -> tuple[float, float]:
    cut = statistics.quantiles(values, n=100)
    return cut[49], cut[98]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the cost of durability at the broker.")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one measurement (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements per row (default: 3)")
    parser.add_argument("--store", type=Path, help="folder on the disk to measure (default: the temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="headrace-durability-", dir=options.store) as name:
        print(f"bodies of {len(BODY)} bytes; an fsync of 4 KiB on this disk takes {fsync_ms(Path(name)):.2f} ms")
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            report(runner.run(compare(Path(name), options.seconds, options.rounds)))


if __name__ == "__main__":
    main()
