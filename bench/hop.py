"""What one worker costs between the broker and an engine that takes no time: requests a second, and time to first byte.

    python -m bench.hop [--requests N] [--repeats N] [--calls N] [--slots N] [--profile FILE]

Fills a lane and lets one MLX worker with the simulated engine drain it, then sends requests one at a time and measures
the time from publishing each to the first message of its answer. Beside it, in the same run and on the same broker, the
bare costs: a publish that is synced to the disk, a fenced store of an answer, one at a time and as many at once as the
worker has slots, and a loop of nats-py alone that pulls the same number of messages in batches, stores an answer of the
same size under the fence for each, and acknowledges it.

`--profile` runs the worker under cProfile and writes its statistics to FILE: use it to see where the time goes, not for
the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig

from bench.running import ROOT, ended
from bench.servers import single
from pipeline.broker import topology
from pipeline.config import ENV_PREFIX, Config, to_environment
from pipeline.process.lifecycle import loop_factory
from pipeline.wire.messages import WorkerStatus
from pipeline.wire.subjects import (
    EXPECTED_LAST_SUBJECT_SEQUENCE,
    MSG_ID,
    STREAM_REQUESTS,
    WORKER,
    out_subject,
    reply_subject,
)

LANE = "llm.request.medium"
# One token: the engine answers in the turn in which it reads the prompt.
QUESTION = {"messages": [{"role": "user", "content": "What is 2 + 3?"}], "max_tokens": 1}
BODY = msgspec.json.encode(QUESTION)
STREAMED = msgspec.json.encode(QUESTION | {"stream": True})
# The bare stream has the settings of the requests' stream, and the bare loop's batches are as large as the worker's.
BARE, BARE_LANE = "HOP", "hop.request"
WINDOW = 500
START_TIMEOUT_S = 30.0
GOAL_RATE, GOAL_RATIO = 2000.0, 1.5
# The rate is taken between these parts of the queue: the worker's start and the last requests do not count.
FROM, TO = 0.9, 0.1


@dataclass
class Times:
    """Seconds that something took, each time."""

    name: str
    took_s: list[float] = field(default_factory=list)

    @property
    def p50_ms(self) -> float:
        """The median."""
        return statistics.median(self.took_s) * 1e3

    def line(self) -> str:
        """The row of the table."""
        cut = statistics.quantiles(self.took_s, n=20)
        return f"{self.name:<44} {self.p50_ms:8.2f} {cut[18] * 1e3:8.2f}"


class Drained(NamedTuple):
    """How many requests a second were done, and how long the process that did them computed for each, in seconds.

    The second figure hardly depends on what else runs on the machine.
    """

    name: str
    per_s: float
    cpu_s: float

    def line(self) -> str:
        """The row of the table."""
        return f"{self.name:<44} {self.per_s:8.0f} {self.cpu_s * 1e3:8.2f}"


def cpu_s(pid: int) -> float:
    """The time that a process has computed; 0 except on Linux."""
    return sum(int(task.read_text().split()[0]) for task in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def settings(url: str, folder: Path, slots: int) -> Config:
    return Config(
        nats_url=url,
        state_dir=str(folder / "state"),
        engine="simulated",
        model="demo",
        slots=slots,
        simulated_tokens_per_s=1e9,
        simulated_prefill_tokens_per_s=1e9,
        lane_max_messages=1_000_000,
    )


@contextmanager
def worker(config: Config, folder: Path, profile: str | None) -> Iterator[int]:
    """`headrace run mlx` as a process for the duration of the block; yields its process id."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith(ENV_PREFIX)}
    under = ["-m", "cProfile", "-o", profile] if profile else []
    with (folder / "worker.log").open("ab") as log:
        started = subprocess.Popen(
            [sys.executable, *under, "-m", "pipeline.cli", "run", "mlx"],
            cwd=ROOT,
            env=environ | to_environment(config),
            stdout=log,
            stderr=log,
        )
    with ended(started):
        yield started.pid


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Client]:
    nc = await nats.connect(url, name="bench", pending_size=32 << 20)
    try:
        yield nc
    finally:
        await nc.close()


async def make_streams(js: JetStreamContext, config: Config) -> None:
    """The pipeline's streams, and one like that of the requests with a consumer like a lane's, for the bare loop."""
    await topology.apply(js, config)
    requests = next(stream for stream in topology.streams(config) if stream.name == STREAM_REQUESTS)
    await js.add_stream(requests.config.evolve(name=BARE, subjects=[BARE_LANE], republish=None))
    await js.add_consumer(BARE, ConsumerConfig(durable_name="bare", ack_policy=AckPolicy.EXPLICIT, max_ack_pending=-1))


async def fill(nc: Client, subject: str, count: int, prefix: str) -> None:
    """Put requests on a queue."""
    for number in range(count):
        headers = {MSG_ID: f"{prefix}-{number}"}
        if number % WINDOW == WINDOW - 1 or number == count - 1:
            await nc.request(subject, BODY, timeout=START_TIMEOUT_S, headers=headers)
        else:
            await nc.publish(subject, BODY, headers=headers)


# ---- emptying a queue


async def drained_by_worker(js: JetStreamContext, pid: int, count: int) -> Drained:
    """Wait until the worker has emptied the lane."""
    seen: list[tuple[float, int, float]] = []
    give_up_at = time.monotonic() + START_TIMEOUT_S + count / 50
    while not seen or seen[-1][1]:
        assert time.monotonic() < give_up_at, "the worker did not empty the lane"
        left = (await js.stream_info(STREAM_REQUESTS)).state.messages
        seen.append((time.perf_counter(), left, cpu_s(pid)))
        await asyncio.sleep(0.05)
    began = next(each for each in seen if each[1] <= FROM * count)
    over = next(each for each in seen if each[1] <= TO * count)
    done = began[1] - over[1]
    return Drained("one worker", done / (over[0] - began[0]), (over[2] - began[2]) / done)


async def drained_bare(js: JetStreamContext, count: int, batch: int) -> Drained:
    """Pull in batches, store an answer for each request under the fence, and acknowledge it, with nats-py alone."""
    subscription = await js.pull_subscribe_bind(consumer="bare", stream=BARE)
    answer = b"x" * 600

    async def answered(message: Msg) -> None:
        subject = out_subject(message.headers[MSG_ID] if message.headers else "")
        await js.publish(subject, answer, headers={EXPECTED_LAST_SUBJECT_SEQUENCE: "0"}, timeout=START_TIMEOUT_S)
        await message.ack()

    done, began_at, began_cpu = 0, time.perf_counter(), time.process_time()
    while done < count:
        messages = await subscription.fetch(batch, timeout=START_TIMEOUT_S)
        await asyncio.gather(*map(answered, messages))
        done += len(messages)
    took_s, took_cpu = time.perf_counter() - began_at, time.process_time() - began_cpu
    return Drained("bare nats-py: pull, fenced store, ack", count / took_s, took_cpu / count)


async def stored_bare(nc: Client, count: int, at_once: int, prefix: str) -> Drained:
    """Only store answers under the fence, so many at once: no worker can do more of them."""
    numbers, began_at, began_cpu = iter(range(count)), time.perf_counter(), time.process_time()

    async def store() -> None:
        for number in numbers:
            headers = {EXPECTED_LAST_SUBJECT_SEQUENCE: "0"}
            await nc.request(out_subject(f"{prefix}-{number}"), b"x" * 600, timeout=START_TIMEOUT_S, headers=headers)

    await asyncio.gather(*(store() for _ in range(at_once)))
    took_s, took_cpu = time.perf_counter() - began_at, time.process_time() - began_cpu
    return Drained(f"bare nats-py: fenced stores, {at_once} at once", count / took_s, took_cpu / count)


# ---- one request at a time


async def ready(nc: Client) -> None:
    """Wait until the worker takes requests and has none."""
    subscription = await nc.subscribe(f"{WORKER}.*")
    while True:
        status = msgspec.json.decode((await subscription.next_msg(START_TIMEOUT_S)).data, type=WorkerStatus)
        if status.state == "ready" and not status.slots.used:
            break
    await subscription.unsubscribe()


async def one(nc: Client, subject: str, request_id: str, body: bytes, times: Times, *, skip: bool = False) -> None:
    """Publish a request and wait for the first message of its answer; with skip for the one after the first status."""
    subscription = await nc.subscribe(reply_subject(request_id))
    began_at = time.perf_counter()
    await nc.publish(subject, body, headers={MSG_ID: request_id})
    while True:
        message = await subscription.next_msg(START_TIMEOUT_S)
        if not skip or b'"object":"headrace.status"' not in message.data:
            break
    times.took_s.append(time.perf_counter() - began_at)
    while b'"object":"chat.completion"' not in message.data:
        message = await subscription.next_msg(START_TIMEOUT_S)
    await subscription.unsubscribe()


async def stored(nc: Client, subject: str, data: bytes, headers: dict[str, str], times: Times) -> None:
    began_at = time.perf_counter()
    await nc.request(subject, data, timeout=START_TIMEOUT_S, headers=headers)
    times.took_s.append(time.perf_counter() - began_at)


async def latencies(nc: Client, calls: int) -> list[Times]:
    """The ways in turns, so that other load on the machine affects all of them alike."""
    names = ("a synced publish", "a fenced store", "publish to the answer", "publish to a stream's status")
    publish, store, whole, first, text = found = [*map(Times, names), Times("publish to a stream's first text")]
    answer = b"x" * 600
    for number in range(calls):
        await stored(nc, BARE_LANE, BODY, {MSG_ID: f"one-{number}"}, publish)
        await stored(nc, out_subject(f"bare-one-{number}"), answer, {EXPECTED_LAST_SUBJECT_SEQUENCE: "0"}, store)
        await one(nc, LANE, f"whole-{number}", BODY, whole)
        await one(nc, LANE, f"first-{number}", STREAMED, first)
        await one(nc, LANE, f"text-{number}", STREAMED, text, skip=True)
    return found


async def measure(options: argparse.Namespace, folder: Path) -> None:
    async with single(folder) as url, connected(url) as nc:
        config, js = settings(url, folder, options.slots), nc.jetstream(timeout=START_TIMEOUT_S)
        await make_streams(js, config)
        rounds: list[tuple[Drained, Drained, Drained]] = []
        for turn in range(options.repeats):
            await fill(nc, LANE, options.requests, f"drain-{turn}")
            await fill(nc, BARE_LANE, options.requests, f"bare-{turn}")
            with worker(config, folder, options.profile) as pid:
                ours = await drained_by_worker(js, pid, options.requests)
                bare = await drained_bare(js, options.requests, options.slots)
                rounds.append((ours, bare, await stored_bare(nc, options.requests, options.slots, f"only-{turn}")))
                if turn == options.repeats - 1:
                    await ready(nc)
                    times = await latencies(nc, options.calls)
    report([middle(rows) for rows in zip(*rounds, strict=True)], times)


def middle(rows: Sequence[Drained]) -> Drained:
    """The medians of several measurements."""
    per_s, cpu = statistics.median(row.per_s for row in rows), statistics.median(row.cpu_s for row in rows)
    return Drained(rows[0].name, per_s, cpu)


def report(drained: list[Drained], times: list[Times]) -> None:
    ours, bare, stores = drained
    publish, store, whole, *_ = times
    print(f"{'emptying a full queue':<44} {'/s':>8} {'CPU, ms':>8}")
    for row in drained:
        print(row.line())
    print(f"{ours.per_s / bare.per_s:.2f} times the bare loop, {ours.per_s / stores.per_s:.2f} times the stores alone")
    print(f"(goal: {GOAL_RATE:.0f} a second, or what the broker stores)\n")
    print(f"{'one request at a time, ms':<44} {'p50':>8} {'p95':>8}")
    for each in times:
        print(each.line())
    both = publish.p50_ms + store.p50_ms
    ratio = whole.p50_ms / both
    print(f"publish to the answer, p50: {ratio:.2f} times a synced publish and a fenced store (goal: {GOAL_RATIO})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=3000, help="requests in the queue (default: 3000)")
    parser.add_argument("--repeats", type=int, default=3, help="how often the queue is filled (default: 3)")
    parser.add_argument("--calls", type=int, default=300, help="requests one at a time (default: 300)")
    parser.add_argument("--slots", type=int, default=64, help="slots of the worker (default: 64)")
    parser.add_argument("--profile", metavar="FILE", help="run the worker under cProfile")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="headrace-hop-") as name,
        asyncio.Runner(loop_factory=loop_factory()) as runner,
    ):
        runner.run(measure(options, Path(name)))


if __name__ == "__main__":
    main()
