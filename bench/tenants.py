"""Whether tenants get equal shares of a lane, how soon a new one gets its turn, and what many names cost.

    python -m bench.tenants [--tenants N] [--requests N] [--names N] [--newcomers N]

`shares`: that many tenants have requests in LOW, one of them a hundred times as many; their answers have different
lengths. Two workers with the simulated engine serve them, until the first of the other tenants has none left. Jain's
index is 1 if all get the same, and 1/N if one gets everything. Meanwhile new tenants ask one question each in the same
lane: how many requests begin before theirs. A fair turn is one request of each tenant.

`names`: that many tenants ask one question each. Then as many as above have requests that wait, and the benchmark
measures a pull from a lane that holds one, the position of a request, and the memory of the processes. Beside it the
same with no further names.
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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg

from bench.hop import START_TIMEOUT_S, connected
from bench.running import ROOT, ended, flushed
from bench.servers import single
from pipeline.broker import topology
from pipeline.config import ENV_PREFIX, Config, to_environment
from pipeline.wire.messages import RequestEvent
from pipeline.wire.subjects import EVENT, MSG_ID, STREAM_REQUESTS, Lane, Priority, Task, position_subject, split_name

FLOOD, NEWCOMER = "flood", "new"
TIMES = 100
SLOTS = 8
WINDOW = 500
NEWCOMERS_EVERY_S = 0.4
GOAL = 0.99


def lane(tenant: str) -> Lane:
    return Lane(Priority.LOW, Task.UNTRIAGED, tenant)


async def until(fact: Callable[[], bool]) -> None:
    """Look every few milliseconds until something is so."""
    while True:
        if fact():
            return
        await asyncio.sleep(0.01)


def jain(amounts: Sequence[float]) -> float:
    """Jain's index of fairness."""
    return sum(amounts) ** 2 / (len(amounts) * sum(each * each for each in amounts))


def settings(url: str, folder: Path, rate: float) -> Config:
    return Config(
        nats_url=url,
        state_dir=str(folder / "state"),
        engine="simulated",
        model="demo",
        slots=SLOTS,
        simulated_tokens_per_s=rate,
        simulated_prefill_tokens_per_s=1e6,
        lane_max_messages=1_000_000,
        tenants_max_messages=1_000_000,
        max_wait_s=3600.0,
    )


@contextmanager
def running(config: Config, folder: Path, *roles: str) -> Iterator[list[int]]:
    """Processes of these roles for the duration of the block; yields their process ids."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith(ENV_PREFIX)}
    with ExitStack() as stack:
        pids = []
        for number, role in enumerate(roles):
            log = stack.enter_context((folder / f"{role}-{number}.log").open("ab"))
            command = [sys.executable, "-m", "pipeline.cli", "run", role]
            environment = environ | to_environment(config)
            started = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
            stack.enter_context(ended(started))
            pids.append(started.pid)
        yield pids


class Ask:
    """Publishes requests of tenants."""

    def __init__(self, nc: Client) -> None:
        self._nc = nc
        self._number = 0

    async def __call__(self, tenant: str, tokens: int, *, confirmed: bool = False) -> str:
        """Publish one, and wait for its PubAck if it is to be confirmed. Returns its name."""
        self._number += 1
        name = f"t.{tenant}.r{self._number}"
        body = msgspec.json.encode({"prompt": "Tell me a story.", "max_tokens": tokens})
        if confirmed or self._number % WINDOW == 0:
            await self._nc.request(lane(tenant).subject, body, timeout=START_TIMEOUT_S, headers={MSG_ID: name})
        else:
            await self._nc.publish(lane(tenant).subject, body, headers={MSG_ID: name})
        return name


class Heard:
    """What the events say: the tokens of each tenant, and what has begun and ended, in this order."""

    def __init__(self) -> None:
        self.tokens: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.waits_ms: dict[str, list[float]] = {}
        self.begun: list[str] = []

    async def on_event(self, message: Msg) -> None:
        """Count an event."""
        event = msgspec.json.decode(message.data, type=RequestEvent)
        tenant, _ = split_name(event.id)
        if event.kind == "started":
            self.begun.append(event.id)
            self.waits_ms.setdefault(tenant, []).append(event.wait_ms or 0.0)
        elif event.kind == "done":
            self.tokens[tenant] += event.completion_tokens
            self.done[tenant] += 1


async def newcomers(ask: Ask, heard: Heard, count: int) -> list[int]:
    """How many requests begin between the storing of a new tenant's first request and its own begin."""
    found = []
    for number in range(count):
        await asyncio.sleep(NEWCOMERS_EVERY_S)
        name = await ask(f"{NEWCOMER}{number}", 32, confirmed=True)
        before = len(heard.begun)
        await until(lambda name=name, before=before: name in heard.begun[before:])
        found.append(heard.begun.index(name, before) - before)
    return found


async def shares(nc: Client, config: Config, folder: Path, options: argparse.Namespace) -> None:
    heard, ask = Heard(), Ask(nc)
    tenants = [FLOOD, *(f"t{number}" for number in range(options.tenants - 1))]
    tokens = {tenant: 16 + 37 * number % 97 for number, tenant in enumerate(tenants)}
    for tenant in tenants:
        for _ in range(options.requests * (TIMES if tenant == FLOOD else 1)):
            await ask(tenant, tokens[tenant])
    await flushed(nc)
    await nc.subscribe(f"{EVENT}.low.*", cb=heard.on_event)
    with running(config, folder, "monitor", "mlx", "mlx"):
        await until(lambda: bool(heard.begun))
        joining = asyncio.create_task(newcomers(ask, heard, options.newcomers))
        await until(lambda: any(heard.done[tenant] >= options.requests - SLOTS for tenant in tenants[1:]))
        served = [heard.tokens[tenant] for tenant in tenants]
        waits = await joining
    others = [statistics.median(heard.waits_ms[tenant]) for tenant in tenants[1:]]
    print(
        f"{options.tenants} tenants, one asks {TIMES} times as much as each other one; two workers, {SLOTS} slots each"
    )
    print(f"  tokens of each: {min(served)} to {max(served)}; of the one that asks most: {served[0]}")
    print(f"  Jain's index over tokens: {jain(served):.4f} (goal: {GOAL})")
    print(f"  requests that began before a new tenant's first: {sorted(waits)} (one fair turn: {options.tenants})")
    print(f"  wait of the others' requests, median: {min(others) / 1e3:.1f} to {max(others) / 1e3:.1f} s")
    left = options.requests * TIMES - heard.done[FLOOD]
    print(f"  left of the one that asks most: {left} of {options.requests * TIMES} requests\n")


# ---- names


def resident_mib(pid: int) -> float:
    """The resident memory of a process; 0 if it is gone."""
    said = subprocess.run(["/bin/ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return int(said or 0) / 1024


def server_pid() -> int:
    """The process id of the nats-server under this process."""
    said = subprocess.run(["/bin/ps", "-axo", "pid=,ppid=,comm="], capture_output=True, text=True, check=False).stdout
    rows = [line.split(None, 2) for line in said.splitlines()]
    mine = {str(os.getpid())}
    for _ in range(3):
        mine |= {pid for pid, parent, *_ in rows if parent in mine}
    return next(int(pid) for pid, _, command in rows if pid in mine and "nats-server" in command)


async def timed(nc: Client, subject: str, body: bytes, times: int) -> list[float]:
    """Milliseconds of so many calls."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        await nc.request(subject, body, timeout=START_TIMEOUT_S)
        found.append(1e3 * (time.perf_counter() - began))
    return found


async def pulled(nc: Client, consumer: str, times: int) -> list[float]:
    """Milliseconds of so many pulls of one request each."""
    subscription = await nc.jetstream().pull_subscribe_bind(consumer=consumer, stream=STREAM_REQUESTS)
    found = []
    for _ in range(times):
        began = time.perf_counter()
        await subscription.fetch(1, timeout=START_TIMEOUT_S)
        found.append(1e3 * (time.perf_counter() - began))
    return found


async def names(nc: Client, config: Config, folder: Path, options: argparse.Namespace, extra: int) -> None:
    heard, ask = Heard(), Ask(nc)
    active = [f"t{number}" for number in range(options.tenants)]
    subscription = await nc.subscribe(f"{EVENT}.low.*", cb=heard.on_event)
    with running(config, folder, "monitor") as (monitor,):
        began = time.perf_counter()
        with running(config, folder, "mlx"):
            for number in range(extra):
                await ask(f"once{number}", 1)
            await flushed(nc)
            await until(lambda: heard.done.total() >= extra)
        took_s = time.perf_counter() - began
        waiting = [await ask(tenant, 16, confirmed=True) for tenant in active for _ in range(20)]
        js = nc.jetstream()
        while True:
            consumers = {state.name for state in await js.consumers_info(STREAM_REQUESTS)}
            if {lane(tenant).consumer for tenant in active} <= consumers:
                break
            await asyncio.sleep(0.1)
        with running(config, folder, "mlx") as (worker,):
            await until(lambda: heard.done.total() >= extra + len(active))
            memory = {"server": server_pid(), "monitor": monitor, "worker": worker}
            sizes = {name: resident_mib(pid) for name, pid in memory.items()}
        pulls = await pulled(nc, lane(active[0]).consumer, 10)
        last = waiting[-1]
        positions = await timed(nc, position_subject(split_name(last)[0]), split_name(last)[1].encode(), 200)
    await subscription.unsubscribe()
    print(
        f"{extra + options.tenants:>8} {statistics.median(pulls):>9.2f} {statistics.median(positions):>12.2f} "
        + " ".join(f"{sizes[name]:>9.0f}" for name in sizes)
        + (f"   ({extra / took_s:.0f} names a second)" if extra else "")
    )
    await nc.jetstream().purge_stream("LLM_REPLIES")


async def measure(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="headrace-tenants-") as name:
        folder = Path(name)
        if options.requests:
            async with single(folder / "shares") as url, connected(url) as nc:
                config = settings(url, folder, options.rate)
                await make(nc, config)
                await shares(nc, config, folder, options)
        if options.names:
            print(f"{'names':>8} {'pull, ms':>9} {'position, ms':>12} {'server':>9} {'monitor':>9} {'worker, MiB':>9}")
            for extra in (0, options.names - options.tenants):
                async with single(folder / f"names-{extra}") as url, connected(url) as nc:
                    config = settings(url, folder, 500.0)
                    await make(nc, config)
                    await names(nc, config, folder, options, extra)


async def make(nc: Client, config: Config) -> None:
    """The pipeline's streams."""
    await topology.apply(nc.jetstream(timeout=START_TIMEOUT_S), config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tenants", type=int, default=50, help="tenants with requests that wait (default: 50)")
    parser.add_argument("--requests", type=int, default=60, help="of each but one; 0 leaves this out (default: 60)")
    parser.add_argument("--newcomers", type=int, default=20, help="new tenants (default: 20)")
    parser.add_argument("--rate", type=float, default=4000.0, help="tokens a second of each worker (default: 4000)")
    parser.add_argument("--names", type=int, default=5000, help="names in all; 0 leaves this out (default: 5000)")
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
