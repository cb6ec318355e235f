"""An engine in the hands of the test, and workers around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace

import msgspec
import pytest

from pipeline.broker.connection import Unreachable
from pipeline.broker.jetstream import Bus
from pipeline.config import Config
from pipeline.delivery.lanes import MLX_SOURCE, Source
from pipeline.engine import Embedded, EngineStatus, Fetcher, Generation, Misbehaved, Piece, Work
from pipeline.process.lifecycle import Lifecycle
from pipeline.process.role import role
from pipeline.wire.answers import Usage, decode_answer, is_last
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.fetches import FetchStep
from pipeline.wire.requests import ChatRequest, EmbeddingRequest
from pipeline.wire.subjects import MSG_ID, STREAM_REQUESTS
from pipeline.worker.worker import Worker
from tests.faults import Process
from tests.waiting import TIMEOUT_S, eventually


class ScriptedGeneration:
    """What the test says next comes next."""

    def __init__(self, engine: ScriptedEngine, work: Work) -> None:
        self.work = work
        self.closed = False
        self._engine = engine
        self._pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()

    def say(self, text: str, **more) -> None:
        """Produce one piece; its token ids are its characters' numbers."""
        self._pieces.put_nowait(Piece(text, [ord(c) for c in text], **more))

    def finish(self, text: str = "") -> None:
        self.say(text, finish_reason="stop", usage=Usage(3, len(text), 3 + len(text)))

    def fail(self, code: ErrorCode, message: str = "as the test wants it") -> None:
        self._pieces.put_nowait(HeadraceError(code, message))

    def misbehave(self, message: str = "as the test wants it") -> None:
        self._pieces.put_nowait(Misbehaved(message))

    async def next(self) -> Piece:
        piece = await self._pieces.get()
        if isinstance(piece, Exception):
            raise piece
        return piece

    async def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._engine.running.remove(self)
            self._engine.changed()


@dataclass
class ScriptedEngine:
    """Implements `pipeline.engine.Engine`; the test decides when which piece comes."""

    slots: int = 2
    name: str = "mlx"
    simulated: bool = False
    state: str = "ready"
    suspends: bool = False
    model: str = "scripted"
    refusal: HeadraceError | None = None
    embedder: ScriptedEmbedder | None = None
    counter: ScriptedCounter | None = None
    submitted: list[ScriptedGeneration] = field(default_factory=list)
    running: list[ScriptedGeneration] = field(default_factory=list)
    most_running: int = 0
    reports: dict[str, object] = field(default_factory=dict)
    _callbacks: list[Callable[[], None]] = field(default_factory=list)

    def changed(self) -> None:
        for callback in self._callbacks:
            callback()

    def resolve(self, model: str | None) -> str:
        if model in (None, self.model):
            return self.model
        raise HeadraceError(ErrorCode.MODEL_NOT_FOUND, f"there is no {model}", param="model")

    async def submit(self, work: Work) -> Generation:
        if self.refusal is not None:
            raise self.refusal
        generation = ScriptedGeneration(self, work)
        self.submitted.append(generation)
        self.running.append(generation)
        self.most_running = max(self.most_running, len(self.running))
        self.changed()
        return generation

    def status(self) -> EngineStatus:
        used = min(len(self.running), self.slots)
        return EngineStatus(self.state, [self.model], used, self.slots, suspends=self.suspends, **self.reports)

    def on_change(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)

    def set_state(self, state: str) -> None:
        self.state = state
        self.changed()

    async def generation(self, request_id: str, number: int = 1) -> ScriptedGeneration:
        """The request's number-th run in this engine."""

        def found() -> list[ScriptedGeneration]:
            return [run for run in self.submitted if run.work.id == request_id][number - 1 :]

        return (await eventually(found, what=f"{request_id} runs"))[0]


class ScriptedCounter:
    """Implements `pipeline.engine.TokenCounter`: a token is a character."""

    async def count_tokens(self, request: ChatRequest) -> int:
        if request.prompt == "poison":
            raise HeadraceError(ErrorCode.ENGINE_FAILED, "why")
        return sum(len(message.text()) for message in request.chat)


@dataclass
class ScriptedEmbedder:
    """Implements `pipeline.engine.Embedder`: vectors of so many numbers, once the test lets it."""

    dimensions: int = 2
    refusal: HeadraceError | None = None
    asked: list[EmbeddingRequest] = field(default_factory=list)
    goes_on: asyncio.Event = field(default_factory=asyncio.Event)

    def embedding_model(self, model: str | None) -> str:
        return model or "scripted-embed"

    async def embed(self, request: EmbeddingRequest, model: str) -> Embedded:
        self.asked.append(request)
        await self.goes_on.wait()
        if self.refusal is not None:
            raise self.refusal
        return Embedded([[float(len(text))] * self.dimensions for text in request.texts], len(request.texts))


@dataclass
class ScriptedFetcher:
    """Implements `pipeline.engine.Fetcher`; the test decides when which step comes. `x` is what it fetches.

    Attributes:
        served: the name under which the engine answers then.
        begun: the models, in the order in which their fetches have begun.
        cancelled: those whose fetch was given up.
    """

    served: str = ""
    refusal: HeadraceError | None = None
    begun: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    _said: asyncio.Queue[FetchStep | Exception | None] = field(default_factory=asyncio.Queue)

    def say(self, status: str, completed: int = 0, total: int = 0) -> None:
        self._said.put_nowait(FetchStep(status, f"sha256:{status}" if total else "", total, completed))

    def finish(self) -> None:
        self._said.put_nowait(None)

    def fail(self, error: Exception) -> None:
        self._said.put_nowait(error)

    def fetchable(self, name: str) -> str:
        if self.refusal is not None:
            raise self.refusal
        if not name.startswith("x"):
            raise HeadraceError(ErrorCode.MODEL_NOT_FOUND, f"There is no {name}.", param="model")
        return name.removesuffix(":latest")

    async def fetch(self, model: str, note: Callable[[FetchStep], None]) -> str:
        self.begun.append(model)
        try:
            while (said := await self._said.get()) is not None:
                if isinstance(said, Exception):
                    raise said
                note(said)
        except asyncio.CancelledError:
            self.cancelled.append(model)
            raise
        return self.served


@dataclass
class Running:
    """A worker at work in this process, with a connection of its own."""

    worker: Worker
    engine: ScriptedEngine
    bus: Process
    lifecycle: Lifecycle
    task: asyncio.Task[None]

    def skip(self, seconds: float) -> None:
        """Let so much time pass for it alone, as where its process is stopped and goes on."""
        clock, before = self.bus.clock, self.bus.clock._monotonic
        clock._monotonic = lambda: before() + seconds

    async def kill(self) -> None:
        """End it as a dying process ends: nothing is said, nothing handed back."""
        self.bus.nc.options["allow_reconnect"] = False
        self.bus.nc._transport._io_writer.transport.abort()
        tasks = {self.task, *self.worker._jobs._tasks._tasks}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    async def drain(self, drain_s: float = 10.0) -> None:
        self.lifecycle.stop(drain_s=drain_s)
        await asyncio.wait_for(self.task, drain_s + TIMEOUT_S)


StartWorker = Callable[..., "asyncio.Future[Running]"]


@pytest.fixture
async def start(config: Config) -> AsyncIterator[StartWorker]:
    """Starts workers, each with an engine of its own unless one is given."""
    async with AsyncExitStack() as stack:
        count = 0

        @asynccontextmanager
        async def running(engine, source: Source, settings: Config, fetcher: Fetcher | None) -> AsyncIterator[Running]:
            nonlocal count
            count += 1
            async with role("worker", settings) as one:
                # Workers in one process need names of their own.
                me = replace(one, name=f"{one.name}-{count}", bus=Process(one.bus))
                # There is no Ollama to wait for.
                worker = Worker(me, engine, settings, source, patience_s=0.0, fetcher=fetcher)
                lifecycle = Lifecycle("worker", drain_timeout_s=5)
                task = asyncio.create_task(worker.run(lifecycle))
                try:
                    yield Running(worker, engine, me.bus, lifecycle, task)
                finally:
                    tasks = {task, *worker._jobs._tasks._tasks}
                    for left in tasks:
                        left.cancel()
                    await asyncio.wait(tasks)

        async def start(
            engine=None, source: Source = MLX_SOURCE, fetcher: Fetcher | None = None, **settings
        ) -> Running:
            changed = msgspec.structs.replace(config, **({"lease_s": 2.0} | settings))
            return await stack.enter_async_context(running(engine or ScriptedEngine(), source, changed, fetcher))

        yield start


@dataclass
class Client:
    """A program that asks and reads, as any may."""

    bus: Bus

    async def ask(self, request_id: str, body: bytes = b'{"prompt":"x"}', lane: str = "high", **headers: str) -> int:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.bus.store(f"llm.request.{lane}", body, headers={MSG_ID: request_id} | given)

    async def stream(self, request_id: str, **headers: str) -> int:
        return await self.ask(request_id, b'{"prompt":"x","stream":true}', **headers)

    async def record(self, request_id: str):
        try:
            return [message for _, message in await self.bus.read_answers(f"llm.reply.{request_id}")]
        except Unreachable:
            return []  # a broker that was killed is on its way back

    async def until(self, request_id: str, count: int):
        """The record, once it has count messages."""

        async def enough():
            messages = await self.record(request_id)
            return messages if len(messages) >= count else None

        return await eventually(enough, what=f"{count} messages of {request_id}")

    async def answer(self, request_id: str, timeout_s: float = TIMEOUT_S):
        """The last message, once it is there and the request is settled."""

        async def closed():
            messages = await self.record(request_id)
            return messages[-1] if messages and is_last(messages[-1]) else None

        return await eventually(closed, what=f"an answer to {request_id}", timeout_s=timeout_s)

    async def code(self, request_id: str, timeout_s: float = TIMEOUT_S) -> str:
        return (await self.answer(request_id, timeout_s)).error.code

    async def none_waits(self, but: int = 0) -> None:
        """Every request is acknowledged, but for some."""

        async def empty():
            return (await self.bus.stream_state(STREAM_REQUESTS)).messages == but

        await eventually(empty, what="all requests acknowledged")

    async def listen(self, subject: str) -> list:
        """What a plain subscriber of a subject sees, decoded."""
        seen = []

        async def on_message(message):
            seen.append(decode_answer(message.data))

        await self.bus.subscribe(subject, on_message)
        await self.bus.nc.flush()
        return seen


@pytest.fixture
async def client(bus: Bus) -> Client:
    return Client(bus)
