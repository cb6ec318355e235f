"""What a long queue costs the monitor: its restart, its answers, its memory, and what happens when a monitor is killed.

    python -m bench.monitor [--queued N] [--folder DIR]

A broker of its own gets N requests in all lanes, and is then started again with the settings of `headrace up`. An MLX
worker with the simulated engine serves them slowly. Then a monitor is killed and started: how long until the first
load event and the first statistics, how long until it knows the whole queue, how much memory that takes, how soon a
position is answered. Cancels are sent while it reads the queue. At last a second monitor stands by, more requests
arrive, and the first one is killed: how long nothing is heard, and whether anything is said twice.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from bench.running import ROOT, ended
from pipeline.broker import topology
from pipeline.broker.connection import Message, Unreachable
from pipeline.broker.jetstream import Bus
from pipeline.config import ENV_PREFIX, Config, to_environment
from pipeline.process.lifecycle import loop_factory
from pipeline.up.server import find_conf, find_server
from pipeline.wire.answers import decode_answer
from pipeline.wire.subjects import (
    CANCEL,
    LANES,
    LOAD,
    MSG_ID,
    QUEUE_POSITION,
    QUEUE_STATS,
    STREAM_REPLIES,
    STREAM_REQUESTS,
    TIMEOUT,
    Task,
    reply_subject,
)

GOAL_FIRST_S = 2.0
GOAL_POSITION_MS = 2.0
GOAL_BYTES = 200.0
GOAL_GAP_S = 5.0
CANCELS = 50
ASKED = 1000
# Requests are stored so many at a time; the last one is waited for.
WINDOW = 2000
BODY = msgspec.json.encode(
    {"messages": [{"role": "user", "content": "Why is the sky blue, and why are sunsets red? " * 3}], "max_tokens": 64}
)
# For the first filling alone: `sync_interval: always` would make a million stores take minutes.
_PLAIN = "host: 127.0.0.1\nserver_name: headrace\nmax_payload: 8MB\njetstream { max_file_store: 20GB }\n"
_LANES = [lane.subject for lane in LANES if lane.task is not Task.COMPLEX]


@contextmanager
def broker(folder: Path, conf: str) -> Iterator[str]:
    """A nats-server on the store in folder; yields its URL."""
    for old in folder.glob("*.ports"):
        old.unlink()
    command = [find_server(), "-c", conf, "--port", "-1", "--store_dir", folder, "--ports_file_dir", folder]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=log)
    with ended(process):
        ports = folder / f"nats-server_{process.pid}.ports"
        while not (ports.exists() and ports.read_bytes().endswith(b"}")):
            assert process.poll() is None, "nats-server did not start"
            time.sleep(0.02)
        yield msgspec.json.decode(ports.read_bytes())["nats"][0]


@contextmanager
def role(kind: str, config: Config, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`headrace run KIND` as a process for the time of the block."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith(ENV_PREFIX)}
    with (folder / f"{kind}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.cli", "run", kind],
            cwd=ROOT,
            env=environ | to_environment(config),
            stdout=log,
            stderr=log,
        )
    with ended(process):
        yield process


def resident(process: subprocess.Popen[bytes]) -> int:
    """The resident memory of a process, bytes."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def ident(number: int) -> str:
    return f"bench-{number:08d}-{number * 2654435761 % (1 << 32):08x}"


async def store(bus: Bus, numbers: Sequence[int]) -> None:
    """Put requests on the queue, one after another in all lanes."""
    for index, number in enumerate(numbers):
        headers = {MSG_ID: ident(number), TIMEOUT: "864000"}
        subject = _LANES[number % len(_LANES)]
        if index % WINDOW == WINDOW - 1 or index == len(numbers) - 1:
            await bus.store(subject, BODY, headers=headers)
        else:
            await bus.publish(subject, BODY, headers=headers)


@dataclass
class Ear:
    """What a program hears of a monitor: its load events, and its answers to questions asked ten times a second.

    Attributes:
        loads: when a load event of MLX came.
        answers: when statistics came, and how long their monitor had been up.
        twice: how many questions were answered more than once.
    """

    bus: Bus
    loads: list[float] = field(default_factory=list)
    answers: list[tuple[float, float]] = field(default_factory=list)
    twice: int = 0

    async def on_load(self, _: Message) -> None:
        """A load event came."""
        self.loads.append(time.monotonic())

    async def ask(self) -> None:
        """Ask until cancelled, without a timeout: each question has an inbox of its own."""
        prefix = self.bus.new_inbox()
        answered: dict[str, int] = {}

        async def on_answer(message: Message) -> None:
            if message.data:
                answered[message.subject] = answered.get(message.subject, 0) + 1
                if answered[message.subject] == 1:
                    uptime_s = msgspec.json.decode(message.data)["uptime_s"]
                    self.answers.append((time.monotonic(), uptime_s))
                else:
                    self.twice += 1

        await self.bus.subscribe(f"{prefix}.*", on_answer)
        for number in range(1 << 30):
            await self.bus.publish(QUEUE_STATS, b"", reply=f"{prefix}.{number}")
            await asyncio.sleep(0.1)


@asynccontextmanager
async def listening(bus: Bus) -> AsyncIterator[Ear]:
    ear = Ear(bus)
    await bus.subscribe(f"{LOAD}.mlx", ear.on_load)
    asking = asyncio.create_task(ear.ask())
    try:
        yield ear
    finally:
        asking.cancel()


async def asked(bus: Bus, subject: str, body: bytes = b"") -> Any:
    return msgspec.json.decode((await bus.request(subject, body)).data)


async def until_answered(bus: Bus, *, filled: bool) -> dict[str, Any]:
    """The first statistics, or the first that tell that the whole queue was read."""
    while True:
        try:
            found = await asked(bus, QUEUE_STATS)
        except (Unreachable, msgspec.DecodeError):
            await asyncio.sleep(0.02)
            continue
        if not filled or found["filled"] == 1.0:
            return dict(found)
        await asyncio.sleep(0.1)


def longest_gap(times: Sequence[float]) -> float:
    return max((b - a for a, b in pairwise(times)), default=float("inf"))


def line(what: str, value: float, unit: str, goal: float | None = None) -> bool:
    """Print a figure; returns whether it meets its goal."""
    verdict = "" if goal is None else f"   goal {goal:g} {unit}: {'met' if value <= goal else 'MISSED'}"
    print(f"{what:58} {value:10.2f} {unit}{verdict}", flush=True)
    return goal is None or value <= goal


async def position_times(bus: Bus, numbers: Sequence[int]) -> list[float]:
    """How long the positions of requests took, in ms."""
    times = []
    for number in numbers:
        asked_at = time.perf_counter()
        found = await asked(bus, QUEUE_POSITION, ident(number).encode())
        times.append((time.perf_counter() - asked_at) * 1e3)
        assert found["id"] == ident(number)
    return times


async def cancel_while_filling(bus: Bus, numbers: Sequence[int]) -> tuple[dict[str, int], float]:
    """Cancel requests while the monitor reads the queue. Returns what it answered, and what was filled by then."""
    answers = await asyncio.gather(*(asked(bus, f"{CANCEL}.{ident(number)}") for number in numbers))
    filled = (await asked(bus, QUEUE_STATS))["filled"]
    states: dict[str, int] = {}
    for answer in answers:
        states[answer["state"]] = states.get(answer["state"], 0) + 1
    return states, filled


async def cancelled(bus: Bus, numbers: Sequence[int]) -> int:
    """How many of the requests have been told that they were cancelled."""
    count = 0
    for number in numbers:
        found = await bus.last_message(STREAM_REPLIES, reply_subject(ident(number)))
        if found is not None:
            error = getattr(decode_answer(found[1]), "error", None)
            count += error is not None and error.code == "cancelled"
    return count


async def restart(bus: Bus, config: Config, folder: Path, queued: int, base: int) -> bool:
    """A monitor is killed, and one is started with a long queue."""
    rng = random.Random(1)
    chosen = rng.sample(range(queued // 2, queued), CANCELS)
    with role("monitor", config, folder) as before:
        await until_answered(bus, filled=False)
        before.kill()
        before.wait()
    async with listening(bus) as ear:
        started_at = time.monotonic()
        with role("monitor", config, folder) as monitor:
            first = await until_answered(bus, filled=False)
            stats_s = time.monotonic() - started_at
            while not ear.loads:  # noqa: ASYNC110 - as good as an event here
                await asyncio.sleep(0.01)
            met = line("first load event after", ear.loads[0] - started_at, "s", GOAL_FIRST_S)
            met &= line("first statistics after", stats_s, "s", GOAL_FIRST_S)
            print(f"  they say: filled {first['filled']:.3f}, unknown {first['unknown']}")
            states, filled = await cancel_while_filling(bus, chosen)
            print(f"{CANCELS} cancels while it filled (at {filled:.3f} afterwards) were answered {states}")
            during = []
            while (await asked(bus, QUEUE_STATS))["filled"] < 1.0:
                during += await position_times(bus, rng.sample(range(queued), 5))
            line("the queue is known after", time.monotonic() - started_at, "s")
            if during:
                line("position while it fills, p50", statistics.median(during), "ms")
                line("position while it fills, max", max(during), "ms")
            await asyncio.sleep(2.0)
            found = await cancelled(bus, chosen)
            print(f"cancelled of these {CANCELS}: {found}")
            met &= found == CANCELS
            times = await position_times(bus, rng.choices(range(queued), k=ASKED))
            met &= line("position once filled, p50", statistics.median(times), "ms", GOAL_POSITION_MS)
            line("position once filled, p99", statistics.quantiles(times, n=100)[98], "ms")
            met &= line("memory of the monitor per request", (resident(monitor) - base) / queued, "bytes", GOAL_BYTES)
    return met


async def takeover(bus: Bus, config: Config, folder: Path, queued: int) -> bool:
    """Two monitors, the first killed while requests arrive and are served."""
    async with AsyncExitStack() as stack:
        first = stack.enter_context(role("monitor", config, folder))
        await until_answered(bus, filled=True)
        # So that the two are told apart by how long they have been up.
        await asyncio.sleep(5.0)
        stack.enter_context(role("monitor", config, folder))
        ear = await stack.enter_async_context(listening(bus))
        arriving = asyncio.create_task(arrivals(bus, queued))
        await asyncio.sleep(15.0 if queued <= 200_000 else 60.0)
        killed_at = time.monotonic()
        first.send_signal(signal.SIGKILL)
        await asyncio.sleep(10.0)
        arriving.cancel()
        loads = [at for at in ear.loads if at > killed_at - 5]
        answers = [at for at, _ in ear.answers if at > killed_at - 5]
        met = line("longest time without a load event around the kill", longest_gap(loads), "s", GOAL_GAP_S)
        met &= line("longest time without statistics around the kill", longest_gap(answers), "s", GOAL_GAP_S)
        # Each monitor's uptime tells whose answer it is: it grows with time, and changes once.
        starts = [round(at - uptime_s) for at, uptime_s in ear.answers]
        changes = sum(abs(b - a) > 2 for a, b in pairwise(starts))
        print(f"questions answered: {len(ear.answers)}, twice: {ear.twice}, takeovers: {changes}")
        return met and ear.twice == 0 and changes == 1


async def arrivals(bus: Bus, first: int) -> None:
    """Fifty requests a second."""
    for number in range(first, first + (1 << 30)):
        await store(bus, [number])
        await asyncio.sleep(0.02)


async def measure(folder: Path, queued: int) -> bool:
    (folder / "plain.conf").write_text(_PLAIN)
    with broker(folder, str(folder / "plain.conf")) as url:
        config = msgspec.structs.replace(
            Config(nats_url=url, state_dir=str(folder / "state"), engine="simulated"), lane_max_messages=4 * queued
        )
        async with Bus.connect(url, name="bench") as bus:
            await topology.apply(bus.js, config)
            with role("monitor", config, folder) as monitor:
                await until_answered(bus, filled=True)
                await asyncio.sleep(2.0)
                base = resident(monitor)
            print(f"a monitor of an empty queue takes {base / (1 << 20):.1f} MiB")
            began_at = time.monotonic()
            await store(bus, range(queued))
            state = await bus.stream_state(STREAM_REQUESTS)
            print(f"{state.messages} requests stored in {time.monotonic() - began_at:.1f} s", flush=True)
    with broker(folder, str(find_conf())) as url:
        config = msgspec.structs.replace(config, nats_url=url)
        async with Bus.connect(url, name="bench") as bus:
            with role("mlx", config, folder):
                met = await restart(bus, config, folder, queued, base)
                return await takeover(bus, config, folder, queued) and met


def main() -> int:
    """Returns 0 where every goal is met."""
    parser = argparse.ArgumentParser(description="What a long queue costs the monitor.")
    parser.add_argument("--queued", type=int, default=100_000, help="requests in the queue (default: 100000)")
    parser.add_argument("--folder", type=Path, help="an empty folder for the broker's store (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, asyncio.Runner(loop_factory=loop_factory()) as runner:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        return int(not runner.run(measure(folder, options.queued)))


if __name__ == "__main__":
    sys.exit(main())
