"""Processes of the role in this process, each on a connection of its own; the test plays the engine."""

from __future__ import annotations

import asyncio
import io
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from uuid import uuid4

import msgspec
import pytest

from consumers.batches import Batches
from pipeline.broker.batches import BatchStore
from pipeline.broker.events import publish_event
from pipeline.broker.files import Files, FileTraits
from pipeline.broker.jetstream import Bus
from pipeline.config import Config
from pipeline.process.lifecycle import Lifecycle
from pipeline.process.role import Role, role
from pipeline.wire.answers import Completion, ErrorAnswer, ErrorBody
from pipeline.wire.batches import BatchObject, BatchOrder
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import RequestEvent, encode
from pipeline.wire.subjects import BATCH, MSG_ID, STREAM_REQUESTS, Priority, out_subject
from tests.consumers.monitor.conftest import monitor
from tests.pipeline.gateway.answers import COMPLETION
from tests.waiting import eventually

__all__ = ["monitor"]  # fixture

CHAT = "/v1/chat/completions"


@dataclass
class RunningBatches:
    """A process of the role at work."""

    it: Batches
    me: Role
    lifecycle: Lifecycle
    task: asyncio.Task[None]

    async def kill(self) -> None:
        """End it as a dying process ends: its connection is gone, and it does nothing more."""
        self.me.bus.nc.options["allow_reconnect"] = False
        self.me.bus.nc._transport._io_writer.transport.abort()
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task


@dataclass
class Starter:
    """Starts processes of the role."""

    config: Config
    stack: AsyncExitStack

    async def __call__(self, **settings) -> RunningBatches:
        return await self.stack.enter_async_context(self._running(msgspec.structs.replace(self.config, **settings)))

    @asynccontextmanager
    async def _running(self, config: Config) -> AsyncIterator[RunningBatches]:
        async with role("batches", config) as me:
            lifecycle = Lifecycle("batches", drain_timeout_s=5)
            it = Batches(me, config)
            running = RunningBatches(it, me, lifecycle, asyncio.create_task(it.run(lifecycle)))
            try:
                yield running
            finally:
                if not running.task.done():
                    lifecycle.stop()
                    await asyncio.wait_for(running.task, 10)


@pytest.fixture
async def batches(config: Config, bus: Bus) -> AsyncIterator[Starter]:
    """Starts processes of the role."""
    async with AsyncExitStack() as stack:
        yield Starter(config, stack)


class Player:
    """Plays the engine on LOW: once told to `play`, it answers requests, a prompt `fail` with an error.

    A prompt `big` gets an answer that the broker just accepts.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.open = asyncio.Event()
        # By id: how often it was answered, and with which headers it came.
        self.answered = Counter()
        self.headers = {}
        self.most = 0

    def play(self, most: int = 1_000_000) -> None:
        """Answer requests until so many were answered in all."""
        self.most = most
        self.open.set()

    async def paused(self) -> None:
        """Wait until as many were answered as `play` said."""
        await eventually(lambda: not self.open.is_set())

    async def run(self) -> None:
        low = await self._bus.js.pull_subscribe_bind("low", STREAM_REQUESTS)
        while True:
            await self.open.wait()
            try:
                (message,) = await low.fetch(1, timeout=0.2)
            except TimeoutError:
                continue
            await self._answer(message)
            if self.answered.total() >= self.most:
                self.open.clear()

    async def _answer(self, message) -> None:
        request_id = message.headers[MSG_ID]
        self.headers[request_id] = message.headers
        answer = msgspec.structs.replace(COMPLETION, id=request_id)
        if b"fail" in message.data:
            error = HeadraceError(ErrorCode.ENGINE_FAILED, "as the test wants it")
            answer = ErrorAnswer(request_id, 1, ErrorBody.of(error))
        elif b"big" in message.data:
            answer = self._largest(answer)
        await self._bus.store(out_subject(request_id), encode(answer), headers={MSG_ID: uuid4().hex})
        self.answered[request_id] += 1
        await message.ack_sync()
        await publish_event(self._bus, RequestEvent(request_id, "done", Priority.LOW))

    def _largest(self, answer: Completion) -> Completion:
        (choice,) = answer.choices
        room = self._bus.max_payload - len(encode(answer)) - 200
        message = msgspec.structs.replace(choice.message, content="x" * room)
        return msgspec.structs.replace(answer, choices=[msgspec.structs.replace(choice, message=message)])


@pytest.fixture
async def player(bus: Bus) -> AsyncIterator[Player]:
    playing = Player(bus)
    task = asyncio.create_task(playing.run())
    yield playing
    task.cancel()


class Desk:
    """Creates batches and reads what became of them, as the gateway does."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.files = Files(bus)
        self.store = BatchStore(bus)
        self.number = 0

    async def create(self, *lines: bytes, window_s: int = 3600) -> BatchOrder:
        self.number += 1
        now = int(self.bus.clock.wall())
        name = f"file-{self.number}"
        await self.files.put(name, io.BytesIO(b"\n".join(lines) + b"\n"), FileTraits("in.jsonl", "batch", now))
        order = BatchOrder(f"batch_{self.number}", CHAT, name, "1h", window_s, now)
        await self.store.create(order)
        return order

    async def state(self, order: BatchOrder) -> BatchObject:
        return await self.store.show(order)

    async def ended(self, order: BatchOrder) -> BatchObject:
        async def final():
            shown = await self.state(order)
            return shown if shown.status.is_final else None

        return await eventually(final, every_s=0.02)

    async def rows(self, file_id: str | None) -> list[dict]:
        if file_id is None:
            return []
        file = await self.files.find(file_id)
        content = b"".join([piece async for piece in self.files.read(file)])
        return [json.loads(row) for row in content.splitlines()]

    async def queued(self) -> int:
        """How many lines of batches are in the queue."""
        return sum([BATCH in m.headers async for m in self.bus.scan(STREAM_REQUESTS, "llm.request.>")])


@pytest.fixture
async def desk(bus: Bus) -> Desk:
    await bus.sample_clock()
    return Desk(bus)


def line(name: str, text: str = "why", **body) -> bytes:
    fields = {"messages": [{"role": "user", "content": text}], **body}
    return json.dumps({"custom_id": name, "method": "POST", "url": CHAT, "body": fields}).encode()


def names(count: int) -> list[str]:
    return [f"n{number}" for number in range(count)]
