"""The cost of the gateway and its durable queue, over an engine that takes no time.

    python -m bench.gateway [--seconds S] [--clients N] [--litellm PROGRAM] [--peer URL]

Calls a simulated engine in two ways: directly, over the HTTP API of the stand-in for Ollama, and through `headrace up`,
which adds the gateway, a PubAck after a sync to disk, the worker and the fenced record. The engine's rates are so high
that it takes no time. The latency is that of one client with one request at a time, the rate that of N clients. All
servers are measured in turns, in slices, so that other load on the machine affects all of them. Each turn also measures
the round trip of a core request through the same broker, which shows how fast the machine is at that time.

`--litellm` also measures LiteLLM's proxy in front of the same stand-in. It needs an environment of its own:

    python -m venv litellm && litellm/bin/pip install 'litellm[proxy]'
    python -m bench.gateway --litellm litellm/bin/litellm

The proxy runs with one worker process, like headrace's gateway, without telemetry and without access to other hosts.
`--peer` measures any server with an OpenAI API at this URL instead, which must accept the model name `auto`.
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
    """One way to the engine, and its results: latencies in seconds, and the answers per second of each slice."""

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
        """Answers per second, the median of the slices."""
        return statistics.median(self.rates)

    def line(self) -> str:
        """The row of the table."""
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
    """Run LiteLLM's proxy in front of the stand-in for the duration of the block; yields its base URL."""
    settings = {"model": "ollama_chat/headrace-demo-mini", "api_base": standin}
    config = folder / "litellm.yaml"
    config.write_text(json.dumps({"model_list": [{"model_name": "auto", "litellm_params": settings}]}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Requests to other hosts go to a proxy that does not exist.
    nowhere = {"HTTP_PROXY": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False", "LITELLM_LOG": "ERROR"}
    # headrace does not require a key on loopback either.
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
    """Whether a server on this machine answers at url."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310 - an HTTP URL, built above
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
    """Round trips of core requests between two connections of this process, in seconds."""
    found: list[float] = []
    async with Bus.connect(nats_url, name="bench") as asking, Bus.connect(nats_url, name="bench") as answering:

        async def answer(message: Message) -> None:
            await answering.publish(message.reply, message.data)

        await answering.subscribe("bench.echo", answer)
        await answering.request("$JS.API.INFO")  # the server knows the subscription when this returns
        end_at = time.perf_counter() + seconds
        while time.perf_counter() < end_at:
            asked_at = time.perf_counter()
            await asking.request("bench.echo", b"x")
            found.append(time.perf_counter() - asked_at)
    return found


async def measure(servers: list[Server], nats_url: str, seconds: float, clients: int) -> float:
    """Measure all servers in turns. Returns the broker's median round trip in ms."""
    trips: list[float] = []
    for server in servers:  # warm-up, not counted
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
    print(f"\nadded by headrace, p50: {added_ms:.2f} ms, {ours.p50_ms / direct.p50_ms:.1f} times the direct call")
    print(f"that is {added_ms / trip_ms:.1f} round trips of the broker, at {trip_ms:.2f} ms each")
    print(f"(goal: {GOAL_ADDED_MS} ms: {'met' if added_ms <= GOAL_ADDED_MS else 'missed'})")
    print(f"added to a stream's first byte, p50: {ours.first_p50_ms - direct.first_p50_ms:.2f} ms")
    for peer in peers:
        print(f"added by {peer.name}, p50: {peer.p50_ms - direct.p50_ms:.2f} ms")
    for other in (direct, *peers):
        print(f"rate at {clients} clients: {ours.rate / other.rate:.2f} times {other.name}'s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12.0, help="time per figure and server (default: 12)")
    parser.add_argument("--clients", type=int, default=16, help="concurrent clients for the rate (default: 16)")
    parser.add_argument(
        "--litellm", metavar="PROGRAM", help="path of the litellm command: also measure LiteLLM's proxy"
    )
    parser.add_argument("--peer", metavar="URL", help="base URL of another server with an OpenAI API: also measure it")
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
