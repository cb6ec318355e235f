"""One request and all processes that may hold it: the product's own steps, each of which may be its process's last.

A process dies, or freezes, before that of its broker operations which the test names. Leases run out when the test says
so: consumers wait for an hour, and a `-NAK` in a dead worker's name is to the broker what the end of that hour is.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from typing import Any

from consumers.router import Evacuation, Router
from pipeline.broker.connection import Delivery
from pipeline.broker.jetstream import Bus, Stored, to_stored
from pipeline.broker.peers import Peers
from pipeline.config import Config
from pipeline.core.envelope import Envelope, read_envelope
from pipeline.core.index import Place
from pipeline.delivery.lanes import MLX_SOURCE, OLLAMA_SOURCE
from pipeline.delivery.lease import LeaseKeeper
from pipeline.delivery.puller import Puller
from pipeline.delivery.taking import Taking
from pipeline.delivery.withdraw import withdraw
from pipeline.engine import EngineStatus, Piece, Work
from pipeline.process.role import Role
from pipeline.telemetry import Tracing
from pipeline.wire.answers import Usage
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import Load, PerPriority, PerPriorityCount, Slots, WorkerStatus
from pipeline.wire.subjects import (
    LANES,
    MSG_ID,
    STREAM_OLLAMA,
    STREAM_REQUESTS,
    Lane,
    Move,
    Priority,
    Task,
    lane_of_subject,
    ollama_consumer,
    ollama_subject,
)
from pipeline.worker.serving import Serving, ServingContext
from tests.faults import Died, Process
from tests.waiting import TIMEOUT_S

LANE_OF_CONSUMER = {lane.consumer: lane for lane in LANES}
OLLAMA_CONSUMERS = {ollama_consumer(priority): priority for priority in Priority}
MODELS = {"mlx": ["large"], "ollama": ["small"]}
SOURCES = {"mlx": MLX_SOURCE, "ollama": OLLAMA_SOURCE}
_FOR_EVER_S = 1e6


class Opinion:
    """An internal model that knows what the test wants."""

    def __init__(self, said: str) -> None:
        self._said = said

    async def load_internal(self, _: str) -> bool:
        return True

    async def ask_internal(self, *_: str) -> str:
        return self._said


class Generation:
    """What the test says next comes next."""

    def __init__(self, engine: Engine, work: Work) -> None:
        self._engine = engine
        self._said = len(work.resume_tokens)
        self._skip = 0 if work.resume_tokens else len(work.resume_text)
        self._pieces: asyncio.Queue[Piece | HeadraceError] = asyncio.Queue()

    def say(self, *, finish: bool = False) -> None:
        """Every engine says the same text. MLX reports its tokens; Ollama resumes from the text."""
        text, self._said = f"w{self._said} ", self._said + 1
        if self._engine.name == "ollama":
            text, self._skip = text[self._skip :], max(0, self._skip - len(text))
        tokens = [self._said] if self._engine.name == "mlx" else []
        end = {"finish_reason": "stop", "usage": Usage(1, self._said, 1 + self._said)} if finish else {}
        self._pieces.put_nowait(Piece(text, tokens, **end))

    def fail(self, error: HeadraceError) -> None:
        self._pieces.put_nowait(error)

    async def next(self) -> Piece:
        self._engine.is_asked = True
        piece = await self._pieces.get()
        self._engine.is_asked = False
        if isinstance(piece, HeadraceError):
            raise piece
        return piece

    async def close(self) -> None:
        self._engine.is_asked = False


class Engine:
    """Runs one request."""

    simulated = False
    embedder = None
    counter = None

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_asked = False
        self.generation: Generation | None = None

    def resolve(self, model: str | None) -> str:
        if model in (None, *MODELS[self.name]):
            return MODELS[self.name][0]
        raise HeadraceError(ErrorCode.MODEL_NOT_FOUND, f"there is no {model} here", param="model")

    async def submit(self, work: Work) -> Generation:
        self.generation = Generation(self, work)
        return self.generation

    def status(self) -> EngineStatus:
        return EngineStatus("ready", MODELS[self.name], 1, 1)


class Hand:
    """A process with a request in hand, or the monitor with none. `lost` once its lease has run out."""

    def __init__(self, kind: str, process: Process, delivery: Delivery | None) -> None:
        self.kind = kind
        self.process = process
        self.delivery = delivery
        self.engine = Engine(kind)
        self.leases = LeaseKeeper(_FOR_EVER_S)
        self.lost = False
        self.serving: Serving | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def consumer(self) -> str:
        return "" if self.delivery is None else self.delivery.consumer

    @property
    def serves(self) -> bool:
        return self.kind in ("mlx", "ollama")

    @property
    def is_over(self) -> bool:
        return self.task is not None and self.task.done()

    @property
    def holds(self) -> bool:
        """Whether the broker takes the request to be in this hand, dead or alive."""
        return self.delivery is not None and not self.lost and self.delivery.message.reply not in self.process.answered

    @property
    def is_stuck(self) -> bool:
        """Whether only the end of its lease brings the request to anybody else."""
        return self.holds and (self.is_over or self.process.is_frozen)

    @property
    def is_quiet(self) -> bool:
        """Whether nothing happens in it until the test does something."""
        return self.is_over or self.engine.is_asked or self.process.is_frozen

    def begin(self, work: Coroutine[Any, Any, Any]) -> None:
        async def live() -> None:
            with contextlib.suppress(Died):
                await work

        self.task = asyncio.get_running_loop().create_task(live())

    def lose(self) -> None:
        self.lost = True
        for lease in self.leases._leases:
            lease.expires_at = time.monotonic()


class Life:
    """The steps that anybody may take with the requests on one broker."""

    def __init__(self, bus: Bus, config: Config) -> None:
        self.bus = bus
        self.config = config
        self.hands: list[Hand] = []
        self.has_struck = False
        self._peers, self._saturated = Peers(bus), Peers(bus)
        at, none = bus.clock.now() + _FOR_EVER_S, PerPriorityCount(0, 0, 0)
        for peers in (self._peers, self._saturated):
            for engine, models in MODELS.items():
                status = WorkerStatus(engine, engine, "ready", models, Slots(0, 1), none, 0.0, 0.0, 0.0, 0, 0, at=0.0)
                peers._roster.heard(status, at)
        waits = PerPriority(high=_FOR_EVER_S, medium=_FOR_EVER_S, low=_FOR_EVER_S)
        load = Load("mlx", "saturated", 2.0, waits, none, Slots(1, 1), 1.0, "", at=0.0)
        self._saturated._roster.heard_load(load, at)

    def me(self, process: Process) -> Role:
        return Role("test", process, self._peers, Tracing())

    # ---- taking requests in hand

    async def take(self, kind: str, consumer: str, doom: str | None = None, steps: int = 0) -> Hand | None:
        """Have a process of a kind pull from a consumer, and begin what it does with a request."""
        process = Process(self.bus)
        stream = STREAM_OLLAMA if consumer in OLLAMA_CONSUMERS else STREAM_REQUESTS
        surplus: list[Delivery] = []

        async def on_surplus(delivery: Delivery) -> None:
            surplus.append(delivery)

        puller = Puller(process, stream, on_surplus, 30.0)
        await puller.start()
        delivery = None
        async with asyncio.timeout(TIMEOUT_S):
            # The broker processes an earlier return in its own time. A request that no process holds can be taken.
            while await self.can_be_had(consumer) and delivery is None:
                delivery = await puller.take(consumer)
        await puller.close()
        assert not surplus
        if delivery is None:
            return None
        hand = Hand(kind, process, delivery)
        self.hands.append(hand)
        process.meets(doom, steps=steps)
        if hand.serves:
            self._serve(hand)
        return hand

    def _serve(self, hand: Hand) -> None:
        me = self.me(hand.process)
        context = ServingContext(me, hand.engine, self.config, patience_s=0.0)
        taking = Taking(me, self.config, SOURCES[hand.kind], engine=hand.engine.name)
        taking.leases = hand.leases
        hand.serving = Serving(context, taking.hold(hand.delivery), "its turn")
        hand.begin(hand.serving.run())

    def envelope(self, delivery: Delivery) -> Envelope:
        lane = LANE_OF_CONSUMER.get(delivery.consumer) or Lane(OLLAMA_CONSUMERS[delivery.consumer], Task.SIMPLE)
        return read_envelope(delivery, *lane, moves=self.bus.moves)

    async def can_be_had(self, consumer: str) -> bool:
        """Whether the request stands there and no process holds it."""
        lane = LANE_OF_CONSUMER.get(consumer)
        subject = ollama_subject(OLLAMA_CONSUMERS[consumer]) if lane is None else lane.subject
        held = {
            hand.delivery.sequence for hand in self.hands if hand.delivery and hand.holds and hand.consumer == consumer
        }
        return any(copy.subject == subject and copy.sequence not in held for copy in await self.copies())

    # ---- what a hand does

    def routes(self, hand: Hand, how: Move | None) -> None:
        """As the router does, whose triage comes to what the test wants, or the evacuation of Ollama's lanes."""
        if hand.kind == "evacuation":
            evacuation = Evacuation(self.me(hand.process), self.config)
            evacuation._taking.leases = hand.leases
            hand.begin(evacuation._on_surplus(hand.delivery))
            return
        peers = self._peers if how is None else self._saturated
        opinion = Opinion("yes" if how is Move.SPILLED else "no")
        router = Router(Role("router", hand.process, peers, Tracing()), self.config, opinion)
        router._taking.leases = hand.leases
        hand.begin(router._handle(router._taking.receive(hand.delivery), lambda: None))

    def withdraws(self, copy: Stored, error: HeadraceError, doom: str | None, steps: int) -> None:
        """As the monitor does with what waits, or waited when it last heard of it."""
        process = Process(self.bus)
        process.meets(doom, steps=steps)
        stream = STREAM_REQUESTS if lane_of_subject(copy.subject) else STREAM_OLLAMA
        hand = Hand("monitor", process, None)
        hand.begin(withdraw(process, Place(stream, Priority.HIGH, copy.sequence), error))
        self.hands.append(hand)

    async def lease_runs_out(self, hand: Hand) -> None:
        """Of a process that is dead or frozen, or has dropped the request."""
        hand.lose()
        await self.bus.publish(hand.delivery.message.reply, b"-NAK")

    # ---- looking

    async def quiet(self) -> None:
        """Until nothing happens any more by itself."""
        async with asyncio.timeout(TIMEOUT_S):
            while not all(hand.is_quiet or hand.task is None for hand in self.hands):  # noqa: ASYNC110 - many may end it
                await asyncio.sleep(0.0002)
        for hand in self.hands:
            if hand.is_over and hand.task is not None:
                hand.task.result()
        await self.bus.nc.flush()
        self.has_struck |= any(hand.process.struck for hand in self.hands)
        self.hands = [hand for hand in self.hands if hand.holds or not hand.is_over]

    async def copies(self) -> list[Stored]:
        """Everywhere the request is stored, the latest last."""
        found = [
            to_stored(message)
            for stream in (STREAM_REQUESTS, STREAM_OLLAMA)
            async for message in self.bus.scan(stream, ">")
        ]
        return sorted(found, key=lambda copy: copy.stored_at)


def message_id(copy: Stored) -> str:
    return copy.headers[MSG_ID]
