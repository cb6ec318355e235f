"""`headrace demo`: a pipeline of its own, overloaded for a while, and what one sees of it on the wire."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from pipeline.broker.connection import BusError, Message
from pipeline.broker.jetstream import Bus, LaneFull
from pipeline.commands.demo_view import View
from pipeline.commands.ledger import Ledger
from pipeline.commands.send import Sending
from pipeline.process.lifecycle import Report, StartError
from pipeline.up.children import Process, last_line, spawn_tied
from pipeline.up.instance import Instance, read
from pipeline.wire.messages import Load, decode_answer
from pipeline.wire.subjects import LOAD, MSG_ID, Priority

# Small enough a batch, and soon enough called full, that one machine can be overloaded by one sender.
_SETTINGS = ("--slots", "2", "--target-wait-s", "0.5", "--drain-timeout-s", "5", "--nats-port", "0")
_START_TIMEOUT_S = 180.0
# After the last request has been sent, how long its answer may take.
_FINISH_TIMEOUT_S = 120.0
# Parts of the time: a calm beginning, the flood, and a calm end.
_CALM_UNTIL, _FLOOD_UNTIL = 0.15, 0.75
_TICK_S = 0.1
# HIGH comes at its own pace, as people do. The others keep this many requests waiting, and more until it is too much.
_HIGH_EVERY_S = 0.5
_FLOOD_FIRST, _FLOOD_GROWTH, _FLOOD_MOST = 48.0, 1.03, 600.0

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


def demo(*, seconds: float) -> int:
    """Run the demonstration. Returns 0 where every request got exactly one last message."""
    return asyncio.run(_demo(seconds))


async def _demo(seconds: float) -> int:
    view = View()
    with tempfile.TemporaryDirectory(prefix="headrace-demo-") as folder:
        async with _pipeline(Path(folder), view) as here, Bus.connect(here.nats, name="headrace demo") as bus:
            crowd = Crowd(bus, seconds=seconds, rng=random.Random(7))  # noqa: S311 - prompts are drawn, not encrypted
            with view:
                await crowd.run(view)
            view.summary(crowd.ledger, crowd.levels, seconds)
            return 0 if crowd.ledger.is_whole() else 1


@contextlib.asynccontextmanager
async def _pipeline(folder: Path, view: View) -> AsyncIterator[Instance]:
    """`headrace up` in a process of its own, for the time of the block."""
    ready_file, log = folder / "ready.json", folder / "up.log"
    options = ("--state-dir", str(folder / "state"), "--ready-file", str(ready_file), *_SETTINGS)
    up = await spawn_tied((sys.executable, "-m", "pipeline.cli", "up", *options), os.environ, log)
    waiter = asyncio.create_task(up.wait(_ignore))
    try:
        view.note("starting a pipeline of its own: broker, MLX with the demo model, a second engine")
        yield await _ready(up, ready_file, log)
    finally:
        up.drain(0)
        await waiter


async def _ready(up: Process, ready_file: Path, log: Path) -> Instance:
    give_up_at = time.monotonic() + _START_TIMEOUT_S
    while (here := read(ready_file)) is None:
        if up.returncode is not None or time.monotonic() > give_up_at:
            raise StartError(f"the pipeline did not start: {last_line(log)}")
        await asyncio.sleep(_TICK_S)
    return here


def _ignore(_: Report) -> None:
    """What `up` says of itself is on its own screen; it has no line to us."""


class Crowd:
    """Many clients in one: sends, reads all the answers and all the load events.

    Attributes:
        ledger: what was sent and what became of it.
        loads: the last load event of each engine.
    """

    def __init__(self, bus: Bus, *, seconds: float, rng: random.Random) -> None:
        self.ledger = Ledger()
        self.loads: dict[str, Load] = {}
        self.levels: list[tuple[float, str, str]] = []
        self._bus = bus
        self._seconds = seconds
        self._rng = rng
        self._flood = _FLOOD_FIRST
        self._began_at = time.monotonic()
        self._next_high_at = 0.0

    async def run(self, view: View) -> None:
        """Send for the set time, then wait for what is still to come."""
        await self._bus.subscribe("llm.reply.>", self._on_answer)
        await self._bus.subscribe(f"{LOAD}.*", self._on_load)
        self._began_at = time.monotonic()
        while (elapsed_s := time.monotonic() - self._began_at) < self._seconds:
            await self._send_due(elapsed_s)
            view.update(self.ledger, self.loads, self.levels, elapsed_s, self._seconds)
            await asyncio.sleep(_TICK_S)
        give_up_at = time.monotonic() + _FINISH_TIMEOUT_S
        while self.ledger.outstanding() and time.monotonic() < give_up_at:
            view.update(self.ledger, self.loads, self.levels, time.monotonic() - self._began_at, self._seconds)
            await asyncio.sleep(_TICK_S)

    async def _send_due(self, elapsed_s: float) -> None:
        due = []
        if elapsed_s >= self._next_high_at:
            self._next_high_at = elapsed_s + _HIGH_EVERY_S
            due.append(Priority.HIGH)
        share = elapsed_s / self._seconds
        if _CALM_UNTIL <= share < _FLOOD_UNTIL:
            mlx = self.loads.get("mlx")
            if mlx is not None and mlx.level != "saturated":
                self._flood = min(_FLOOD_MOST, self._flood * _FLOOD_GROWTH)
            for priority, part in ((Priority.MEDIUM, 1 / 3), (Priority.LOW, 2 / 3)):
                due += [priority] * (int(self._flood * part) - self.ledger.outstanding(priority))
        await asyncio.gather(*map(self._send, due))

    async def _send(self, priority: Priority) -> None:
        text = self._rng.choice(_SIMPLE if self._rng.random() < 0.6 else _COMPLEX)
        sending = Sending(text=text, priority=priority)
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
        self.ledger.answered(request_id, decode_answer(message.data), time.monotonic())

    async def _on_load(self, message: Message) -> None:
        load = msgspec.json.decode(message.data, type=Load)
        before = self.loads.get(load.engine)
        if before is None or before.level != load.level:
            self.levels.append((time.monotonic() - self._began_at, load.engine, load.level))
        self.loads[load.engine] = load
