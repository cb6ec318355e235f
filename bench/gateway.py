"""What going through the gateway and its durable queue costs, over an engine that takes no time.

    python -m bench.gateway [--seconds S] [--clients N] [--litellm PROGRAM] [--peer URL]

The same simulated engine, its rates so high that it takes no time, is called in two ways: directly, by the HTTP
endpoint of the stand-in, and through `headrace up`: HTTP, a PubAck that promises the disk, the worker, the fenced
record. The latency is that of one client that has one request at a time; the rate that of N clients. All are measured
in turns, in slices, so that what else the machine does falls on each, and beside them a core request and its reply
through the same broker, which says how fast the machine is just now.

With `--litellm` LiteLLM's proxy takes its turns too, in front of the same stand-in. It needs an environment of its own:

    python -m venv litellm && litellm/bin/pip install 'litellm[proxy]'
    python -m bench.gateway --litellm litellm/bin/litellm

It runs with one worker process, as headrace's gateway does, without telemetry, and reaches no other host. With `--peer`
it is any server that speaks OpenAI's dialect at this URL, its model `auto`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from bench.running import ALONE, START_TIMEOUT_S, Client, Reply, ended, process, up
from pipeline.broker.connection import Message
from pipeline.broker.jetstream import Bus
from pipeline.process.lifecycle import loop_factory

SLICES = 6
GOAL_ADDED_MS = 3.5
OPTIONS = ALONE | {
    "ENGINE": "simulated",
    "SLOTS": "64",
    "SIMULATED_TOKENS_PER_S": "1e9",
    "SIMULATED_PREFILL_TOKENS_PER_S": "1e9",
    "SIMULATED_ANSWER_TOKENS": "4",
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
def litellm(program: str, standin: str, folder: Path) -> Iterator[str]:
    """LiteLLM's proxy in front of the stand-in for the time of the block; yields the base URL of its OpenAI dialect."""
    settings = {"model": "ollama_chat/headrace-demo-mini", "api_base": standin}
    config = folder / "litellm.yaml"
    config.write_text(json.dumps({"model_list": [{"model_name": "auto", "litellm_params": settings}]}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # What it would fetch or tell goes to a proxy that there is not.
    nowhere = {"HTTP_PROXY": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False", "LITELLM_LOG": "ERROR"}
    # Headrace too asks for no key on loopback.
    keyless = {"LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}
    command = [program, "--config", config, "--host", "127.0.0.1", "--port", port, "--telemetry", "False"]
    log = (folder / "litellm.log").open("wb")
    with (
        log,
        ended(
            subprocess.Popen(
                [*map(str, command)],
                cwd=folder,
                env=os.environ | nowhere | quiet | keyless,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        ) as started,
    ):
        give_up_at = time.monotonic() + START_TIMEOUT_S
        while not lives(f"http://127.0.0.1:{port}/health/liveliness"):
            if started.poll() is not None or time.monotonic() > give_up_at:
                raise SystemExit(f"{program} did not start: {(folder / 'litellm.log').read_text()[-2000:]}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"


def lives(url: str) -> bool:
    """Whether a server answers at url, which is on this machine."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310 - HTTP, as it was made above
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def client_of(server: Server, body: bytes) -> Client:
    return Client(server.url, server.path, body, {"authorization": "Bearer none"})


async def ask(client: Client, server: Server) -> Reply:
    reply = await client.ask()
    if reply.status != 200:
        raise SystemExit(f"{server.name}: {reply.head.decode()}")
    return reply


async def latencies(server: Server, seconds: float, *, stream: bool) -> None:
    body = server.body.replace(b'"stream": false', b'"stream": true') if stream else server.body
    client = client_of(server, body)
    await client.open()
    end_at = time.perf_counter() + seconds
    while time.perf_counter() < end_at:
        reply = await ask(client, server)
        if stream:
            server.first_s.append(reply.first_s)
        else:
            server.latencies_s.append(reply.whole_s)
    client.close()


async def rate(server: Server, seconds: float, clients: int) -> None:
    count = 0
    end_at = time.perf_counter() + seconds

    async def one() -> None:
        nonlocal count
        client = client_of(server, server.body)
        await client.open()
        while time.perf_counter() < end_at:
            await ask(client, server)
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
    for peer in peers:
        print(f"added by {peer.name}, p50: {peer.p50_ms - direct.p50_ms:.2f} ms")
    for other in (direct, *peers):
        print(f"rate at {clients} clients: {ours.rate / other.rate:.2f} times {other.name}'s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12.0, help="for each figure of each server (default: 12)")
    parser.add_argument("--clients", type=int, default=16, help="at once, for the rate (default: 16)")
    parser.add_argument("--litellm", metavar="PROGRAM", help="measure LiteLLM's proxy as well: where its command is")
    parser.add_argument("--peer", metavar="URL", help="another server that speaks OpenAI's dialect, at this base URL")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        command = ("consumers.standin", "--parallel", OPTIONS["SLOTS"])
        standin = stack.enter_context(process(*command, ready=folder / "standin.json", settings=OPTIONS))
        ours = stack.enter_context(up(folder, OPTIONS))
        servers = [
            Server("direct", standin["url"], "/api/chat", asked("headrace-demo-mini")),
            Server("headrace", ours["http"], "/v1/chat/completions", asked("auto")),
        ]
        peers = {"peer": options.peer} if options.peer else {}
        if options.litellm:
            peers["litellm"] = stack.enter_context(litellm(options.litellm, standin["url"], folder))
        for peer, url in peers.items():
            servers.append(Server(peer, url, f"{urlsplit(url).path}/chat/completions", asked("auto")))
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            trip_ms = runner.run(measure(servers, ours["nats"], options.seconds, options.clients))
        report(servers, trip_ms, options.clients)


if __name__ == "__main__":
    main()
