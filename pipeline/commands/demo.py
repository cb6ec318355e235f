"""`headrace demo`: start a separate pipeline, overload it, and show what its messages report."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec

from pipeline.broker.connection import BusError, Message
from pipeline.broker.jetstream import Bus, LaneFull
from pipeline.commands.demo_view import View
from pipeline.commands.ledger import Ledger
from pipeline.commands.pace import Pace
from pipeline.commands.send import Sending
from pipeline.process.lifecycle import Report, StartError
from pipeline.process.python import module_command, with_import_root
from pipeline.up.children import Process, last_line, spawn_tied
from pipeline.up.instance import Instance, read
from pipeline.wire.answers import read_answer
from pipeline.wire.messages import Load
from pipeline.wire.subjects import LOAD, MSG_ID, Priority

# A small batch and a low threshold of saturation, so that one sender can overload the machine.
_SETTINGS = ("--slots", "2", "--target-wait-s", "0.5", "--drain-timeout-s", "5", "--nats-port", "0")
_START_TIMEOUT_S = 180.0
# How long to wait for answers after the last request.
_FINISH_TIMEOUT_S = 120.0
_TICK_S = 0.1
# Requests that are sent at once to measure the engines, and the longest answer to any request, in tokens.
_MEASURED = 8
_MAX_TOKENS = 32

_SIMPLE = (
    "What is the capital of France?",
    "What is the capital of Japan?",
    "What is 3 plus 4?",
    "What color is the sky?",
    "Hello!",
    "Какая столица Франции?",
    "Сколько будет 2 плюс 5?",
    "Привет!",
)
_COMPLEX = (
    "Explain step by step how a bill becomes a law, and compare two countries.",
    "Write a short story about a fox and a river, then analyse its structure.",
    "Design a database schema for a library and explain each decision in detail.",
    "Prove that the square root of two is irrational.",
    "Объясни подробно, почему небо голубое, и сравни с закатом.",
    "Напиши рассказ о лисе и реке и разбери его композицию.",
)


def demo(*, seconds: float, options: Sequence[str] = (), view: View | None = None) -> int:
    """Run the demonstration. Return 0 if every request got exactly one last message, else 1.

    Args:
        seconds: how long to send requests.
        options: of `headrace up`, for the pipeline.
        view: the output; by default the terminal.
    """
    return asyncio.run(_demo(seconds, options, view or View()))


async def _demo(seconds: float, options: Sequence[str], view: View) -> int:
    with tempfile.TemporaryDirectory(prefix="headrace-demo-") as folder:
        async with _pipeline(Path(folder), options, view) as here, Bus.connect(here.nats, name="headrace demo") as bus:
            crowd = Crowd(bus, seconds=seconds, rng=random.Random(7))  # noqa: S311 - prompts are drawn, not encrypted
            answers_per_s = await crowd.measure()
            view.note(f"The engines answer about {answers_per_s:.1f} requests per second.")
            with view:
                await crowd.run(view, answers_per_s)
            view.summary(crowd.ledger, crowd.levels, seconds)
            return 0 if crowd.ledger.is_whole() else 1


@contextlib.asynccontextmanager
async def _pipeline(folder: Path, given: Sequence[str], view: View) -> AsyncIterator[Instance]:
    """Run `headrace up` in a child process for the time of the block."""
    ready_file, log = folder / "ready.json", folder / "up.log"
    options = ("--state-dir", str(folder / "state"), "--ready-file", str(ready_file), *_SETTINGS, *given)
    up = await spawn_tied((*module_command("pipeline.cli"), "up", *options), with_import_root(os.environ), log)
    waiter = asyncio.create_task(up.wait(_ignore))
    try:
        view.note("Starting a separate pipeline: broker, MLX and a second engine.")
        yield await _ready(up, ready_file, log)
    finally:
        up.drain(0)
        await waiter


async def _ready(up: Process, ready_file: Path, log: Path) -> Instance:
    give_up_at = time.monotonic() + _START_TIMEOUT_S
    while (here := read(ready_file)) is None:
        if up.returncode is not None or time.monotonic() > give_up_at:
            raise StartError(f"The pipeline did not start. The last line of its output: {last_line(log)}")
        await asyncio.sleep(_TICK_S)
    return here


def _ignore(_: Report) -> None:
    """`headrace up` sends no reports."""


class Crowd:
    """The client of the demonstration: it sends requests and reads all answers and load events.

    Attributes:
        ledger: the requests and their answers.
        loads: the last load event of each engine.
        levels: each change of an engine's level, as (seconds since the start, engine, level).
    """

    def __init__(self, bus: Bus, *, seconds: float, rng: random.Random) -> None:
        self.ledger = Ledger()
        self.loads: dict[str, Load] = {}
        self.levels: list[tuple[float, str, str]] = []
        self._bus = bus
        self._seconds = seconds
        self._rng = rng
        self._began_at = time.monotonic()

    async def measure(self) -> float:
        """How many requests of all kinds the engines answer per second.

        Raises:
            StartError: they answer none in time.
        """
        await self._bus.subscribe("llm.reply.>", self._on_answer)
        began_at = time.monotonic()
        await asyncio.gather(*(self._send(Priority.HIGH) for _ in range(_MEASURED)))
        while self.ledger.outstanding():
            if time.monotonic() - began_at > _FINISH_TIMEOUT_S:
                raise StartError(f"The engines did not answer {_MEASURED} requests within {_FINISH_TIMEOUT_S:.0f} s.")
            await asyncio.sleep(_TICK_S / 10)
        self.ledger = Ledger()
        return _MEASURED / (time.monotonic() - began_at)

    async def run(self, view: View, answers_per_s: float) -> None:
        """Send for the given time, then wait for the remaining answers."""
        pace = Pace(self._seconds, answers_per_s)
        await self._bus.subscribe(f"{LOAD}.*", self._on_load)
        self._began_at = time.monotonic()
        while (elapsed_s := time.monotonic() - self._began_at) < self._seconds:
            waiting = {priority: self.ledger.outstanding(priority) for priority in Priority}
            mlx = self.loads.get("mlx")
            saturated = mlx is not None and mlx.level == "saturated"
            await asyncio.gather(*map(self._send, pace.due(elapsed_s, waiting, saturated=saturated)))
            view.update(self.ledger, self.loads, self.levels, elapsed_s, self._seconds)
            await asyncio.sleep(_TICK_S)
        give_up_at = time.monotonic() + _FINISH_TIMEOUT_S
        while self.ledger.outstanding() and time.monotonic() < give_up_at:
            view.update(self.ledger, self.loads, self.levels, time.monotonic() - self._began_at, self._seconds)
            await asyncio.sleep(_TICK_S)

    async def _send(self, priority: Priority) -> None:
        text = self._rng.choice(_SIMPLE if self._rng.random() < 0.6 else _COMPLEX)
        sending = Sending(text=text, priority=priority, max_tokens=_MAX_TOKENS)
        request_id = secrets.token_hex(8)
        self.ledger.sent(request_id, priority, time.monotonic())
        try:
            await self._bus.store(sending.subject(), sending.body(), headers={MSG_ID: request_id})
        except LaneFull:
            self.ledger.refused(request_id, "queue_full", time.monotonic())
        except BusError:
            self.ledger.refused(request_id, "unavailable", time.monotonic())

    async def _on_answer(self, message: Message) -> None:
        request_id = message.subject.removeprefix("llm.reply.")
        answer = read_answer(message.data)
        if answer is not None:
            self.ledger.answered(request_id, answer, time.monotonic())

    async def _on_load(self, message: Message) -> None:
        load = msgspec.json.decode(message.data, type=Load)
        before = self.loads.get(load.engine)
        if before is None or before.level != load.level:
            self.levels.append((time.monotonic() - self._began_at, load.engine, load.level))
        self.loads[load.engine] = load
