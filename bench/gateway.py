"""What going through the gateway and its durable queue costs, over an engine that takes no time.

    python -m bench.gateway [--seconds S] [--clients N] [--peer URL]

The same simulated engine, its rates so high that it takes no time, is called in two ways: directly, by the HTTP
endpoint of the stand-in, and through `headrace up`: HTTP, a PubAck that promises the disk, the worker, the fenced
record. The latency is that of one client that has one request at a time; the rate that of N clients. All are measured
in turns, in slices, so that what else the machine does falls on each, and beside them a core request and its reply
through the same broker, which says how fast the machine is just now. With `--peer` one more server takes its turns: any
that speaks OpenAI's dialect at this URL, its model `auto`, such as a LiteLLM proxy.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.bus import Bus, Message
from pipeline.lifecycle import loop_factory

ROOT = Path(__file__).parent.parent
START_TIMEOUT_S = 90.0
SLICES = 6
GOAL_ADDED_MS = 3.5
OPTIONS = {
    "ENGINE": "simulated",
    "SLOTS": "64",
    "SIMULATED_TOKENS_PER_S": "1e9",
    "SIMULATED_PREFILL_TOKENS_PER_S": "1e9",
    "SIMULATED_ANSWER_TOKENS": "4",
    "OLLAMA_STANDIN": "false",
    "OLLAMA_HOST": "127.0.0.1:9",
    "HTTP_ANSWERS_PER_S": "0",
}


@dataclass
class Server:
    """One way to the engine, and what was measured of it: latencies in seconds, answers a second of each slice."""

    name: str
    url: str
    path: str
    body: bytes
    latencies_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    @property
    def p50_ms(self) -> float:
        """The median latency."""
        return statistics.median(self.latencies_s) * 1e3

    @property
    def first_p50_ms(self) -> float:
        """The median latency of a stream's first byte."""
        return statistics.median(self.first_s) * 1e3

    @property
    def rate(self) -> float:
        """Answers a second, the median slice."""
        return statistics.median(self.rates)

    def line(self) -> str:
        """The figures in the table's columns."""
        cut = statistics.quantiles(self.latencies_s, n=100)
        return (
            f"{self.name:10} {cut[49] * 1e3:8.2f} {cut[94] * 1e3:8.2f} {cut[98] * 1e3:8.2f} "
            f"{self.first_p50_ms:10.2f} {self.rate:10.0f}"
        )


def asked(model: str) -> bytes:
    messages = [{"role": "user", "content": "What is 2 + 3?"}]
    return json.dumps({"model": model, "messages": messages, "stream": False}).encode()


@contextmanager
def process(*command: str, ready: Path) -> Iterator[dict[str, str]]:
    """A server of ours for the time of the block; yields what its ready file says."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("HEADRACE_")}
    environ |= {f"HEADRACE_{key}": value for key, value in OPTIONS.items()}
    started = subprocess.Popen(
        [sys.executable, "-m", *command, "--ready-file", str(ready)],
        cwd=ROOT,
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        give_up_at = time.monotonic() + START_TIMEOUT_S
        while not ready.exists():
            if started.poll() is not None or time.monotonic() > give_up_at:
                raise SystemExit(f"{command[0]} did not start")
            time.sleep(0.05)
        yield json.loads(ready.read_text())
    finally:
        started.send_signal(signal.SIGINT)
        try:
            started.wait(30)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


class Client:
    """One connection that is kept; as little else as can be, for what it costs falls on every server alike."""

    def __init__(self, server: Server, body: bytes) -> None:
        self._server = server
        host = urlsplit(server.url).netloc
        head = f"POST {server.path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        self._request = f"{head}authorization: Bearer none\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body

    async def open(self) -> None:
        """Connect."""
        at = urlsplit(self._server.url)
        self._reader, self._writer = await asyncio.open_connection(at.hostname, at.port)

    def close(self) -> None:
        """Disconnect."""
        self._writer.close()

    async def ask(self) -> tuple[float, float]:
        """One request. Returns when the first byte of the body and when the last one was there, in seconds."""
        asked_at = time.perf_counter()
        self._writer.write(self._request)
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        if not head.startswith(b"http/1.1 200"):
            raise SystemExit(f"{self._server.name}: {head.decode()}")
        length = next((int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:")), None)
        if length is not None:
            await self._reader.readexactly(length)
            now = time.perf_counter()
            return now - asked_at, now - asked_at
        first_at = 0.0
        while size := int(await self._reader.readline(), 16):
            first_at = first_at or time.perf_counter()
            await self._reader.readexactly(size + 2)
        await self._reader.readline()
        return first_at - asked_at, time.perf_counter() - asked_at


async def latencies(server: Server, seconds: float, *, stream: bool) -> None:
    body = server.body.replace(b'"stream": false', b'"stream": true') if stream else server.body
    client = Client(server, body)
    await client.open()
    end_at = time.perf_counter() + seconds
    while time.perf_counter() < end_at:
        first_s, whole_s = await client.ask()
        if stream:
            server.first_s.append(first_s)
        else:
            server.latencies_s.append(whole_s)
    client.close()


async def rate(server: Server, seconds: float, clients: int) -> None:
    count = 0
    end_at = time.perf_counter() + seconds

    async def one() -> None:
        nonlocal count
        client = Client(server, server.body)
        await client.open()
        while time.perf_counter() < end_at:
            await client.ask()
            count += 1
        client.close()

    began_at = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    server.rates.append(count / (time.perf_counter() - began_at))


async def round_trips(nats_url: str, seconds: float) -> list[float]:
    """How long a core request and its reply take between two connections of this process, in seconds."""
    found: list[float] = []
    async with Bus.connect(nats_url, name="bench") as asking, Bus.connect(nats_url, name="bench") as answering:

        async def answer(message: Message) -> None:
            await answering.publish(message.reply, message.data)

        await answering.subscribe("bench.echo", answer)
        await answering.request("$JS.API.INFO")  # by now the subscription is known
        end_at = time.perf_counter() + seconds
        while time.perf_counter() < end_at:
            asked_at = time.perf_counter()
            await asking.request("bench.echo", b"x")
            found.append(time.perf_counter() - asked_at)
    return found


async def measure(servers: list[Server], nats_url: str, seconds: float, clients: int) -> float:
    """Measure all in turns. Returns the broker's median round trip, in ms."""
    trips: list[float] = []
    for server in servers:  # what is cold counts for nobody
        await latencies(server, 1.0, stream=False)
        server.latencies_s.clear()
    for turn in range(SLICES):
        for server in servers if turn % 2 else servers[::-1]:
            await latencies(server, seconds / SLICES, stream=False)
            await latencies(server, seconds / SLICES / 2, stream=True)
            await rate(server, seconds / SLICES, clients)
        trips += await round_trips(nats_url, seconds / SLICES / 4)
    return statistics.median(trips) * 1e3


def report(servers: list[Server], trip_ms: float, clients: int) -> None:
    print(f"{'':10} {'p50 ms':>8} {'p95':>8} {'p99':>8} {'1st byte':>10} {f'/s at {clients}':>10}")
    for server in servers:
        print(server.line())
    direct, ours, *peers = servers
    added_ms = ours.p50_ms - direct.p50_ms
    print(f"\nadded by headrace, p50: {added_ms:.2f} ms, {ours.p50_ms / direct.p50_ms:.1f} times the direct call's")
    print(f"that is {added_ms / trip_ms:.1f} round trips of the broker, one being {trip_ms:.2f} ms now")
    print(f"(goal: {GOAL_ADDED_MS} ms: {'met' if added_ms <= GOAL_ADDED_MS else 'missed'})")
    print(f"added to a stream's first byte, p50: {ours.first_p50_ms - direct.first_p50_ms:.2f} ms")
    for other in (direct, *peers):
        print(f"rate at {clients} clients: {ours.rate / other.rate:.2f} of {other.name}'s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12.0, help="for each figure of each server (default: 12)")
    parser.add_argument("--clients", type=int, default=16, help="at once, for the rate (default: 16)")
    parser.add_argument("--peer", metavar="URL", help="another server that speaks OpenAI's dialect, at this base URL")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        standin = stack.enter_context(
            process("consumers.standin", "--parallel", OPTIONS["SLOTS"], ready=folder / "standin.json")
        )
        up = ("pipeline.cli", "up", "--state-dir", str(folder / "state"))
        ours = stack.enter_context(process(*up, ready=folder / "up.json"))
        servers = [
            Server("direct", standin["url"], "/api/chat", asked("headrace-demo-mini")),
            Server("headrace", ours["http"], "/v1/chat/completions", asked("auto")),
        ]
        if options.peer:
            servers.append(
                Server("peer", options.peer, f"{urlsplit(options.peer).path}/chat/completions", asked("auto"))
            )
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            trip_ms = runner.run(measure(servers, ours["nats"], options.seconds, options.clients))
        report(servers, trip_ms, options.clients)


if __name__ == "__main__":
    main()
