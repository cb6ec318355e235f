"""Monitors in this process, each on a connection of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field

import msgspec
import pytest

from consumers.monitor.monitor import Monitor
from pipeline.broker.bulk import read_heads
from pipeline.broker.jetstream import Bus
from pipeline.config import Config
from pipeline.process.lifecycle import Lifecycle
from pipeline.process.role import Role, role
from tests.waiting import eventually


@dataclass
class RunningMonitor:
    """A monitor at work.

    Attributes:
        ready: what it reported when it was ready, None before.
    """

    it: Monitor
    me: Role
    lifecycle: Lifecycle
    task: asyncio.Task[None]
    ready: str | None = None

    async def kill(self) -> None:
        """End it as a dying process ends: its connection is gone, and it does nothing more."""
        self.me.bus.nc.options["allow_reconnect"] = False
        self.me.bus.nc._transport._io_writer.transport.abort()
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task


class GatedRead:
    """Reads a stream as the view does, once the test lets it."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def __call__(self, bus: Bus, stream: str, start: int) -> list[bytes]:
        await self.open.wait()
        return await read_heads(bus, stream, start, messages=10)


@dataclass
class Starter:
    """Starts monitors; each is ready and has read the queue when this returns. `prepare` may change one before it runs.

    One whose reading is gated has not read the queue.
    """

    config: Config
    stack: AsyncExitStack
    started: list[RunningMonitor] = field(default_factory=list)

    async def __call__(
        self, prepare: Callable[[Monitor], None] = lambda _: None, kind: type[Monitor] = Monitor, **settings
    ) -> Monitor:
        return (await self.start(prepare, kind, **settings)).it

    async def start(
        self, prepare: Callable[[Monitor], None] = lambda _: None, kind: type[Monitor] = Monitor, **settings
    ) -> RunningMonitor:
        changed = msgspec.structs.replace(self.config, **settings)
        running = await self.stack.enter_async_context(self._running(changed, prepare, kind))
        await eventually(lambda: running.ready is not None or running.task.done(), what="the monitor is ready")
        assert not running.task.done()
        view = running.it.view
        if not isinstance(view.read, GatedRead):
            # A monitor is ready before it has read the queue, and until then says `pending` and `filling`.
            await eventually(lambda: not view.filling, what="the monitor has read the queue")
        self.started.append(running)
        return running

    @asynccontextmanager
    async def _running(
        self, config: Config, prepare: Callable[[Monitor], None], kind: type[Monitor]
    ) -> AsyncIterator[RunningMonitor]:
        async with role("monitor", config) as me:
            lifecycle = Lifecycle("monitor", drain_timeout_s=5)
            it = kind(me, config)
            prepare(it)
            running = RunningMonitor(it, me, lifecycle, asyncio.create_task(it.run(lifecycle)))

            def report(state: str, detail: str = "", **_) -> None:
                if state == "ready":
                    running.ready = detail

            lifecycle.report = report
            try:
                yield running
            finally:
                if not running.task.done():
                    lifecycle.stop()
                    await asyncio.wait_for(running.task, 60)


@pytest.fixture
async def monitor(config: Config, bus: Bus) -> AsyncIterator[Starter]:
    """Starts monitors."""
    async with AsyncExitStack() as stack:
        yield Starter(config, stack)


async def ask_service(bus: Bus, subject: str, body: bytes = b""):
    return msgspec.json.decode((await bus.request(subject, body)).data)


async def position(bus: Bus, request_id: str):
    return await ask_service(bus, "llm.queue.position", request_id.encode())


async def cancel(bus: Bus, request_id: str) -> str:
    return (await ask_service(bus, f"llm.cancel.{request_id}"))["state"]
