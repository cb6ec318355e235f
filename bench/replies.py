"""The cost of answers that survive a restart of the broker: the time to store a chunk, in memory and on disk.

    python -m bench.replies [--seconds S] [--store DIR]

Starts one server with the embedded configuration and two streams like `LLM_REPLIES`, one in memory and one on the disk
of DIR. Writes answers of 30 tokens a second to both in turn, as a worker does: fenced, the next chunk when the previous
one is stored, and all tokens that accumulated meanwhile in one chunk.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

from nats.js.api import RePublish, StorageType, SubjectTransform

from bench.servers import single
from pipeline.broker import topology
from pipeline.broker.jetstream import Bus
from pipeline.config import Config
from pipeline.process.lifecycle import loop_factory
from pipeline.wire.subjects import STREAM_REPLIES

TOKENS_PER_S = 30.0
STREAMS_AT_ONCE = (1, 8, 32)
TOKEN = b'{"object":"chat.completion.chunk","id":"0123456789abcdef","choices":[{"delta":{"content":" word"}}]}'
ROUNDS = 3


async def prepare(bus: Bus, name: str, storage: StorageType) -> None:
    """Create a stream like `LLM_REPLIES`, with its own subjects."""
    stream = next(stream for stream in topology.streams(Config()) if stream.name == STREAM_REPLIES)
    there = f"{name}.reply.>"
    config = stream.config.evolve(
        name=name,
        subjects=[f"{name}.out.>"],
        storage=storage,
        subject_transform=SubjectTransform(src=f"{name}.out.>", dest=there),
        republish=RePublish(src=there, dest=there),
    )
    await bus.js.add_stream(config)


async def write(bus: Bus, subject: str, seconds: float) -> list[float]:
    """Write the chunks of one answer at the rate of its tokens. Returns the time to store each, in ms."""
    took_ms: list[float] = []
    began_at = time.perf_counter()
    written, last = 0, 0
    while (now := time.perf_counter() - began_at) < seconds:
        due = int(now * TOKENS_PER_S) - written
        if due <= 0:
            await asyncio.sleep((written + 1) / TOKENS_PER_S - now)
            continue
        before = time.perf_counter()
        last = await bus.store(subject, TOKEN * due, expected_last=last)
        took_ms.append((time.perf_counter() - before) * 1000)
        written += due
    return took_ms


async def measure(seconds: float, store: Path) -> None:
    """Print the table."""
    async with single(store) as url, Bus.connect(url, name="bench") as bus:
        kinds = {"memory": StorageType.MEMORY, "disk": StorageType.FILE}
        for name, storage in kinds.items():
            await prepare(bus, name, storage)
        print(f"{'streams at once':>15} {'kept':>8} {'p50 ms':>8} {'p95 ms':>8} {'p99 ms':>8} {'tokens a chunk':>15}")
        for streams in STREAMS_AT_ONCE:
            took: dict[str, list[float]] = {name: [] for name in kinds}
            for turn in range(ROUNDS):
                for name in kinds:
                    subjects = [f"{name}.out.{streams}-{turn}-{number}" for number in range(streams)]
                    for times in await asyncio.gather(*(write(bus, subject, seconds) for subject in subjects)):
                        took[name] += times
            for name, times in took.items():
                cuts = statistics.quantiles(times, n=100)
                tokens = streams * ROUNDS * seconds * TOKENS_PER_S / len(times)
                row = f"{cuts[49]:>8.2f} {cuts[94]:>8.2f} {cuts[98]:>8.2f} {tokens:>15.2f}"
                print(f"{streams:>15} {name:>8} {row}")


def main() -> None:
    """Measure with the given options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a round (default: 4)")
    parser.add_argument("--store", type=Path, help="folder for the broker's store (default: the temporary folder)")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=options.store) as folder,
        asyncio.Runner(loop_factory=loop_factory()) as runner,
    ):
        runner.run(measure(options.seconds, Path(folder)))


if __name__ == "__main__":
    main()
