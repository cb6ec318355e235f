"""Hears what workers and the monitor publish, and keeps it in a `Roster`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from pipeline.broker.connection import Message
from pipeline.broker.jetstream import Bus, read_failure
from pipeline.broker.lanes import LaneBoard
from pipeline.broker.pauses import PauseBoard
from pipeline.config import Config
from pipeline.core.models import Catalogue
from pipeline.core.roster import Roster
from pipeline.wire.messages import EngineName, Load, ModelFacts, StoreReport, WorkerStatus
from pipeline.wire.subjects import LOAD, STORE, STORE_FAILED, WORKER
from pipeline.wire.validation import UNREADABLE

log = logging.getLogger(__name__)

_status_decoder = msgspec.json.Decoder(WorkerStatus)
_load_decoder = msgspec.json.Decoder(Load)
_store_decoder = msgspec.json.Decoder(StoreReport)


@dataclass(slots=True)
class Peers:
    """The other processes, as heard on one connection. One writer: its own subscriptions.

    Attributes:
        pauses: what an operator has paused. It is started by itself, when the streams exist.
        lanes: the lanes of named tenants that have a consumer; as `pauses`.
        on_change: called after each message.
        on_status: called with each worker's status.
    """

    bus: Bus
    pauses: PauseBoard = field(init=False)
    lanes: LaneBoard = field(init=False)
    on_change: Callable[[], None] = lambda: None
    on_status: Callable[[WorkerStatus], None] = lambda _: None
    _roster: Roster = field(init=False, default_factory=Roster)

    def __post_init__(self) -> None:
        self.pauses = PauseBoard(self.bus)
        self.lanes = LaneBoard(self.bus)

    async def start(self) -> None:
        """Subscribe. Call once."""
        await self.bus.subscribe(f"{WORKER}.*", self._on_status)
        await self.bus.subscribe(f"{LOAD}.*", self._on_load)
        await self.bus.subscribe(STORE, self._on_store)
        await self.bus.subscribe(STORE_FAILED, self._on_store_failed)

    def workers(self, engine: EngineName) -> list[WorkerStatus]:
        """The status of each worker of engine that was heard within the last three seconds."""
        return self._roster.workers(engine, self.bus.clock.now())

    def models(self, engine: EngineName) -> list[str]:
        """The names that engine's workers answer to, each once; includes workers last heard up to 30 s ago."""
        return list(dict.fromkeys(name for status in self._remembered(engine) for name in status.models))

    def embedding_models(self) -> list[str]:
        """The names of the models that only make embeddings, as `models`."""
        return list(dict.fromkeys(name for status in self._remembered("ollama") for name in status.embedding_models))

    def catalogue(self, config: Config) -> Catalogue:
        """All models available now."""
        return Catalogue(
            self.models("mlx"),
            self.models("ollama"),
            config.spill_models,
            config.internal_models,
            self.embedding_models(),
            self.cannot_load(),
        )

    def cannot_load(self) -> dict[str, str]:
        """The models of MLX that no worker could load when it last tried, and why, by name."""
        statuses = self._remembered("mlx")
        able = {name for status in statuses for name in status.models if name not in status.cannot_load}
        failed = [item for status in statuses for item in status.cannot_load.items()]
        return {name: why for name, why in failed if name not in able}

    def others(self, engine: EngineName, me: str, config: Config, *, with_room: bool = False) -> Catalogue:
        """The models of engine's workers but one, including workers last heard up to 30 s ago.

        Args:
            engine: the engine.
            me: the worker that is left out.
            config: the settings.
            with_room: only of workers that are ready and have a free slot.
        """
        statuses = self._remembered(engine)
        if with_room:
            free = (status for status in self.workers(engine) if status.slots.used < status.slots.total)
            statuses = [status for status in free if status.state == "ready"]
        statuses = [status for status in statuses if status.worker != me]
        chatting = [name for status in statuses for name in status.models]
        return Catalogue(
            chatting if engine == "mlx" else (),
            chatting if engine == "ollama" else (),
            config.spill_models,
            config.internal_models,
            [name for status in statuses for name in status.embedding_models],
        )

    def tool_models(self) -> set[str]:
        """The names of the models that some worker's engine can call tools with."""
        engines: tuple[EngineName, ...] = ("mlx", "ollama")
        return {name for engine in engines for status in self._remembered(engine) for name in status.tool_models}

    def facts(self) -> dict[str, ModelFacts]:
        """What the workers say of their models, by name. Of several workers with a model, one that has it loaded."""
        engines: tuple[EngineName, ...] = ("ollama", "mlx")
        known = [item for engine in engines for status in self._remembered(engine) for item in status.facts.items()]
        return dict(sorted(known, key=lambda item: item[1].loaded))

    def load(self, engine: EngineName) -> Load | None:
        """The engine's load, or None if no load event was heard within the last three seconds."""
        return self._roster.load(engine, self.bus.clock.now())

    def store(self) -> StoreReport | None:
        """Whether the broker can store requests; None if that is not known, which is so while no write fails."""
        return self._roster.store(self.bus.clock.now())

    def _remembered(self, engine: EngineName) -> list[WorkerStatus]:
        return self._roster.remembered(engine, self.bus.clock.now())

    async def _on_status(self, message: Message) -> None:
        try:
            status = _status_decoder.decode(message.data)
        except UNREADABLE as error:
            log.warning("Ignoring a malformed worker status on %s: %s", message.subject, error)
            return
        self._roster.heard(status, self.bus.clock.now())
        self.on_status(status)
        self.on_change()

    async def _on_load(self, message: Message) -> None:
        try:
            load = _load_decoder.decode(message.data)
        except UNREADABLE as error:
            log.warning("Ignoring a malformed load event on %s: %s", message.subject, error)
            return
        self._roster.heard_load(load, self.bus.clock.now())
        self.on_change()

    async def _on_store(self, message: Message) -> None:
        if message.headers:
            return  # of a client that had the broker's answer sent here
        try:
            report = _store_decoder.decode(message.data)
        except UNREADABLE as error:
            log.warning("Ignoring a malformed report on %s: %s", message.subject, error)
            return
        self._roster.heard_store(report, self.bus.clock.now())
        self.on_change()

    async def _on_store_failed(self, message: Message) -> None:
        if (subject := read_failure(message)) is None:
            log.info("Ignoring a message on %s that is no announcement of a failed write", message.subject)
            return
        self._roster.heard_failure(subject, self.bus.clock.now())
        self.on_change()
