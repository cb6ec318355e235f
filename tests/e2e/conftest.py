"""`headrace up` as a user starts it, and a client that relies only on the wire contract."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import nats
import pytest
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg

from tests.support import ROOT, quick_folder, wait_until
from tests.waiting import flushed

LAST = ("chat.completion", "error")


class Pipeline:
    """A running `headrace up`, with its state and its log in folder."""

    def __init__(self, folder: Path, *options: str, environ: dict[str, str] | None = None) -> None:
        self.folder = folder
        self._ready = folder / "ready.json"
        self._log = folder / "up.log"
        command = [sys.executable, "-m", "pipeline.cli", "up", "--state-dir", str(folder / "state")]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "--ready-file", str(self._ready), *options],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), **(environ or {})},
            )

    def wait_ready(self) -> None:
        wait_until(lambda: self._ready.exists() or self._process.poll() is not None, what="headrace up", timeout_s=90)
        assert self._ready.exists(), self._log.read_text()
        ready = json.loads(self._ready.read_text())
        self.url = ready["nats"]
        self.http = ready["http"]
        # Each role reports when it is ready. The gateway is usable once it has received the status of a ready worker.
        wait_until(self._is_usable, what="the gateway's engine")

    def _is_usable(self) -> bool:
        return httpx.get(f"{self.http}/readyz").status_code == 200

    @property
    def screen(self) -> str:
        return self._log.read_text()

    def log(self, role: str) -> str:
        return (self.folder / "state" / "logs" / f"{role}.log").read_text()

    def pid(self, command: str) -> int:
        """The process id of the child of `up` that has this text in its command line."""
        return child_of(self._process.pid, command)

    def kill(self, role: str) -> None:
        """Kill the process of one role as a crash would."""
        os.kill(self.pid(f"pipeline.cli run {role}"), signal.SIGKILL)

    @contextmanager
    def frozen_engine(self) -> Iterator[None]:
        """MLX's engine process stands still for the time of the block."""
        child = child_of(self.pid("pipeline.cli run mlx"), "consumers.engines.local.child")
        os.kill(child, signal.SIGSTOP)
        try:
            yield
        finally:
            with suppress(ProcessLookupError):  # its worker was killed
                os.kill(child, signal.SIGCONT)

    def stop(self) -> int:
        """Stop it as Ctrl-C does. Returns the exit code."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            return self._process.wait(40)
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()


def child_of(parent: int, command: str) -> int:
    """The process id of the only child that has this text in its command line."""
    found = subprocess.run(["pgrep", "-P", str(parent), "-f", command], capture_output=True, text=True, check=True)
    (pid,) = found.stdout.split()
    return int(pid)


class Asker:
    """A client that uses only NATS and JSON. It keeps the messages that it receives, by request id."""

    def __init__(self, nc: Nats) -> None:
        self.nc = nc
        self.js = nc.jetstream()
        self.messages: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.loads: list[dict[str, Any]] = []
        self.started: list[str] = []
        self._new = asyncio.Condition()

    async def listen(self) -> None:
        await self.nc.subscribe("llm.reply.>", cb=self._on_reply)
        await self.nc.subscribe("llm.load.*", cb=self._on_load)
        await self.nc.subscribe("llm.event.*.started", cb=self._on_started)
        await flushed(self.nc)

    async def _on_reply(self, message: Msg) -> None:
        async with self._new:
            self.messages[message.subject.removeprefix("llm.reply.")].append(json.loads(message.data))
            self._new.notify_all()

    async def _on_load(self, message: Msg) -> None:
        async with self._new:
            self.loads.append(json.loads(message.data))
            self._new.notify_all()

    async def _on_started(self, message: Msg) -> None:
        self.started.append(json.loads(message.data)["id"])

    async def ask(self, subject: str, body: object, **headers: str) -> str:
        """Publish a request. Returns its id."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        ack = await self.js.publish(subject, data, headers=names or None, timeout=20)
        return headers.get("Nats_Msg_Id", f"LLM-{ack.seq}")

    async def until(self, condition: Callable[[], bool], *, timeout_s: float = 60) -> None:
        async with asyncio.timeout(timeout_s), self._new:
            await self._new.wait_for(condition)

    def last(self, request_id: str) -> dict[str, Any] | None:
        return next((m for m in self.messages[request_id] if m["object"] in LAST), None)

    def lasts(self, request_id: str) -> int:
        return sum(m["object"] in LAST for m in self.messages[request_id])

    async def answer(self, request_id: str, *, timeout_s: float = 60) -> dict[str, Any]:
        """Wait for the last message of a request."""
        await self.until(lambda: self.last(request_id) is not None, timeout_s=timeout_s)
        return self.last(request_id)

    async def answers(self, ids: list[str], *, timeout_s: float = 100) -> list[dict[str, Any]]:
        await self.until(lambda: all(self.last(i) is not None for i in ids), timeout_s=timeout_s)
        return [self.last(i) for i in ids]

    async def request(self, subject: str, body: object = "") -> Any:
        """Send a core request. Returns the reply, decoded from JSON."""
        data = body if isinstance(body, bytes) else str(body).encode()
        return json.loads((await self.nc.request(subject, data, timeout=30)).data)


def chat(text: str, **parameters: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **parameters}


def text_of(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]


def joined(messages: list[dict[str, Any]]) -> str:
    """The joined text of the chunks, in order of `seq`, each once."""
    chunks = {m["seq"]: m for m in messages if m["object"] == "chat.completion.chunk"}
    assert sorted(chunks) == list(range(len(chunks)))
    return "".join(chunks[seq]["choices"][0]["delta"].get("content") or "" for seq in sorted(chunks))


@contextmanager
def running(folder: Path, *options: str, environ: dict[str, str] | None = None) -> Iterator[Pipeline]:
    pipeline = Pipeline(folder, *options, environ=environ)
    try:
        pipeline.wait_ready()
        yield pipeline
    finally:
        pipeline.stop()


@asynccontextmanager
async def asking(url: str) -> AsyncIterator[Asker]:
    nc = await nats.connect(url)
    try:
        asker = Asker(nc)
        await asker.listen()
        yield asker
    finally:
        await nc.close()


class Embedded:
    """One pipeline for all tests here that use it. It stops after them: idle, it takes time from the others."""

    def __init__(self) -> None:
        self._running = ExitStack()
        self._pipeline: Pipeline | None = None

    def pipeline(self) -> Pipeline:
        if self._pipeline is None:
            folder = self._running.enter_context(quick_folder())
            self._pipeline = self._running.enter_context(running(folder))
        return self._pipeline

    def stop(self) -> None:
        self._pipeline = None
        self._running.close()


_embedded = Embedded()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    if nextitem is None or Path(__file__).parent not in nextitem.path.parents:
        _embedded.stop()


@pytest.fixture
def embedded() -> Pipeline:
    """A pipeline with the defaults: embedded nats-server, MLX with the demo model, the stand-in for Ollama."""
    return _embedded.pipeline()


@pytest.fixture
async def asker(embedded: Pipeline) -> AsyncIterator[Asker]:
    async with asking(embedded.url) as connected:
        yield connected
