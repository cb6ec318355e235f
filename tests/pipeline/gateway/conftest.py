"""A gateway of its own for a test, on a broker of its own; the test plays the engine where one is needed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any
from uuid import uuid4

import httpx
import msgspec
import pytest

from pipeline.broker.connection import Message
from pipeline.broker.jetstream import Bus
from pipeline.config import Config
from pipeline.gateway import main as gateway
from pipeline.process.lifecycle import Lifecycle, State
from pipeline.wire.answers import Answer, Chunk
from pipeline.wire.messages import encode
from pipeline.wire.subjects import CANCEL, MSG_ID, QUEUED_PREFIX, STORED_SUBJECT, out_subject
from tests.pipeline.gateway.answers import CHUNKS, COMPLETION
from tests.waiting import TIMEOUT_S


class Life(Lifecycle):
    """A life whose reports a test waits for."""

    def __init__(self) -> None:
        super().__init__("gateway", drain_timeout_s=5)
        self.ready = asyncio.Event()
        self.http = ""

    def report(self, state: State, detail: str = "", **facts: Any) -> None:
        if state == "ready":
            self.http = facts["http"]
            self.ready.set()


Serve = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


@pytest.fixture
def serve(config: Config) -> Serve:
    """Run a gateway with some settings changed; gives a client of it, its `life` among its attributes."""

    @asynccontextmanager
    async def serving(**settings: Any) -> AsyncIterator[httpx.AsyncClient]:
        life = Life()
        changed = msgspec.structs.replace(config, **settings)
        async with asyncio.TaskGroup() as group:
            running = group.create_task(gateway.main(changed, life))
            waiting = group.create_task(life.ready.wait())
            await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
            try:
                if not running.done():
                    limits = httpx.Limits(max_connections=1000)
                    async with httpx.AsyncClient(base_url=life.http, timeout=30, limits=limits) as client:
                        client.life = life
                        yield client
            finally:
                waiting.cancel()
                life.stop()

    return serving


class Engine:
    """Plays the engine: hears what is stored, and writes records as one does."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.stored: asyncio.Queue[Message] = asyncio.Queue()
        self.cancelled: asyncio.Queue[str] = asyncio.Queue()

    async def listen(self) -> None:
        await self.bus.subscribe(f"{QUEUED_PREFIX}.>", self.stored.put)
        await self.bus.subscribe(f"{CANCEL}.>", self._on_cancel)
        await self.bus.request("$JS.API.INFO")

    async def _on_cancel(self, message: Message) -> None:
        await self.cancelled.put(message.subject.removeprefix(f"{CANCEL}."))

    async def next_id(self) -> str:
        """The id of the next request that is stored."""
        async with asyncio.timeout(TIMEOUT_S):
            return (await self.stored.get()).headers["Nats-Msg-Id"]

    async def next_subject(self) -> str:
        async with asyncio.timeout(TIMEOUT_S):
            return (await self.stored.get()).headers[STORED_SUBJECT]

    async def write(self, request_id: str, *answers: Answer) -> None:
        *before, last = [encode(msgspec.structs.replace(answer, id=request_id)) for answer in answers]
        for data in before:
            await self.bus.publish(out_subject(request_id), data)
        await self.bus.store(out_subject(request_id), last, headers={MSG_ID: uuid4().hex})

    async def answer(self, request_id: str) -> None:
        await self.write(request_id, *CHUNKS, COMPLETION)

    def chunks(self, texts: list[str]) -> list[Chunk]:
        """A chunk for each text, in order."""
        whole = encode(CHUNKS[1])
        made = []
        for seq, text in enumerate(texts):
            fields = json.loads(whole)
            fields["seq"] = seq
            fields["choices"][0] |= {"delta": {"content": text}, "finish_reason": None}
            made.append(msgspec.json.decode(json.dumps(fields), type=Chunk))
        return made


@pytest.fixture
async def engine(bus: Bus) -> Engine:
    playing = Engine(bus)
    await playing.listen()
    return playing
