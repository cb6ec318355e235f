"""Run `headrace up` and other headrace servers for a benchmark, and call them with a minimal HTTP client."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from nats.aio.client import Client as Nats

ROOT = Path(__file__).parent.parent
START_TIMEOUT_S = 300.0  # on a new GPU, kernels are compiled
STOP_TIMEOUT_S = 30.0
FLUSH_TIMEOUT_S = 60
# MLX only: no Ollama and no stand-in. The prompts of benchmarks repeat, and their peers read each of them.
ALONE = {"OLLAMA_STANDIN": "false", "OLLAMA_HOST": "127.0.0.1:9", "PROMPT_CACHE": "false"}


@contextmanager
def process(*command: str, ready: Path, settings: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Run a headrace module as a process for the duration of the block; yields the content of its ready file."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("HEADRACE_")}
    environ["HEADRACE_MODEL"] = "demo"
    environ |= {f"HEADRACE_{key}": value for key, value in settings.items()}
    with ended(
        subprocess.Popen(
            [sys.executable, "-m", *command, "--ready-file", str(ready)],
            cwd=ROOT,
            env=environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    ) as started:
        give_up_at = time.monotonic() + START_TIMEOUT_S
        while not ready.exists():
            if started.poll() is not None or time.monotonic() > give_up_at:
                raise SystemExit(f"{command[0]} did not start")
            time.sleep(0.05)
        yield json.loads(ready.read_text())


@contextmanager
def up(folder: Path, settings: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Run `headrace up` with its state in folder, for the duration of the block."""
    command = ("pipeline.cli", "up", "--state-dir", str(folder / "state"))
    with process(*command, ready=folder / "up.json", settings=settings) as here:
        yield here


@contextmanager
def ended(started: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Stop a process at the end of the block: SIGINT, then SIGKILL after a time."""
    try:
        yield started
    finally:
        started.send_signal(signal.SIGINT)
        try:
            started.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


class Reply(NamedTuple):
    """A response: status, head in lower case, and the seconds until the body began and ended."""

    status: int
    head: bytes
    first_s: float
    whole_s: float


class Client:
    """A kept-alive connection that sends the same request repeatedly.

    It does as little as possible, because its cost adds to every server's figures and it shares their cores.
    """

    def __init__(
        self, url: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        self._url = url
        lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", f"host: {urlsplit(url).netloc}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        if body is not None:
            lines += ["content-type: application/json", f"content-length: {len(body)}"]
        self._request = "\r\n".join([*lines, "", ""]).encode() + (body or b"")

    async def open(self) -> None:
        """Connect."""
        at = urlsplit(self._url)
        self._reader, self._writer = await asyncio.open_connection(at.hostname, at.port)

    def close(self) -> None:
        """Disconnect."""
        self._writer.close()

    def hang_up(self) -> None:
        """Abort the connection, as a killed program does."""
        self._writer.transport.abort()

    async def begin(self) -> int:
        """Send the request and read the head of the response. Returns the status."""
        self._writer.write(self._request)
        return int((await self._reader.readuntil(b"\r\n\r\n"))[9:12])

    async def read(self) -> bytes:
        """Read the next part of the body; empty at its end."""
        return await self._reader.read(1 << 16)

    async def ask(self) -> Reply:
        """Send the request and read the whole response."""
        asked_at = time.perf_counter()
        self._writer.write(self._request)
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        status = int(head[9:12])
        length = next((int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:")), None)
        if length is not None:
            await self._reader.readexactly(length)
            took_s = time.perf_counter() - asked_at
            return Reply(status, head, took_s, took_s)
        first_at = 0.0
        while size := int(await self._reader.readline(), 16):
            first_at = first_at or time.perf_counter()
            await self._reader.readexactly(size + 2)
        await self._reader.readline()
        return Reply(status, head, first_at - asked_at, time.perf_counter() - asked_at)


async def flushed(nc: Nats) -> None:
    """The server has read everything that was sent on a connection of the plain client, subscriptions included.

    `Client.flush` sends its PING before what waits to be written, so its PONG can come before a subscription exists.
    When that PONG is there, what waited has been written, and the second PING follows it. (`Connection` of
    `pipeline.broker` corrects this.)
    """
    await nc.flush(FLUSH_TIMEOUT_S)
    await nc.flush(FLUSH_TIMEOUT_S)
