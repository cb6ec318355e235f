"""The other processes as this one hears them: what workers say of themselves, and the load of each engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from pipeline.broker.connection import Message
from pipeline.broker.jetstream import Bus
from pipeline.config import Config
from pipeline.core.models import Catalogue
from pipeline.core.saturation import STALE_S
from pipeline.wire.messages import EngineName, Load, WorkerStatus
from pipeline.wire.subjects import LOAD, WORKER

log = logging.getLogger(__name__)

# A worker that is started again, or dies and comes back, has its models all the while: what asks for one of them waits,
# and is not told that nobody has it.
REMEMBERED_S = 30.0

_status_decoder = msgspec.json.Decoder(WorkerStatus)
_load_decoder = msgspec.json.Decoder(Load)


@dataclass(slots=True)
class Peers:
    """Keeps the last word of every worker and of every engine's load. One writer: its own subscriptions.

    Attributes:
        on_change: called when anything has been heard.
        on_status: called with what a worker says of itself.
    """

    bus: Bus
    on_change: Callable[[], None] = lambda: None
    on_status: Callable[[WorkerStatus], None] = lambda _: None
    _statuses: dict[str, WorkerStatus] = field(init=False, default_factory=dict)
    _loads: dict[EngineName, Load] = field(init=False, default_factory=dict)

    async def start(self) -> None:
        """Listen. Call once."""
        await self.bus.subscribe(f"{WORKER}.*", self._on_status)
        await self.bus.subscribe(f"{LOAD}.*", self._on_load)

    def workers(self, engine: EngineName) -> list[WorkerStatus]:
        """What the workers of engine said within the last three seconds."""
        oldest = time.time() - STALE_S
        return [status for status in self._remembered(engine) if status.state != "gone" and status.at >= oldest]

    def _remembered(self, engine: EngineName) -> list[WorkerStatus]:
        oldest = time.time() - REMEMBERED_S
        self._statuses = {name: status for name, status in self._statuses.items() if status.at >= oldest}
        return [status for status in self._statuses.values() if status.engine == engine]

    def models(self, engine: EngineName) -> list[str]:
        """The names that engine's workers answer to, each once; those included that were there half a minute ago."""
        return list(dict.fromkeys(name for status in self._remembered(engine) for name in status.models))

    def embedding_models(self) -> list[str]:
        """The names of the models that make embeddings and no answers, as `models`."""
        return list(dict.fromkeys(name for status in self._remembered("ollama") for name in status.embedding_models))

    def catalogue(self, config: Config) -> Catalogue:
        """All the models that there are now."""
        return Catalogue(
            self.models("mlx"),
            self.models("ollama"),
            config.spill_models,
            config.internal_models,
            self.embedding_models(),
        )

    def tool_models(self) -> set[str]:
        """The names of the models that some worker's engine is known to call tools with."""
        engines: tuple[EngineName, ...] = ("mlx", "ollama")
        return {name for engine in engines for status in self._remembered(engine) for name in status.tool_models}

    def load(self, engine: EngineName) -> Load | None:
        """The engine's load, or None where the last event is older than three seconds: it says nothing any more."""
        load = self._loads.get(engine)
        return load if load is not None and time.time() - load.at <= STALE_S else None

    async def _on_status(self, message: Message) -> None:
        try:
            status = _status_decoder.decode(message.data)
        except msgspec.DecodeError as error:
            log.warning("%s says what no worker says: %s", message.subject, error)
            return
        self._statuses[status.worker] = status
        self.on_status(status)
        self.on_change()

    async def _on_load(self, message: Message) -> None:
        try:
            load = _load_decoder.decode(message.data)
        except msgspec.DecodeError as error:
            log.warning("%s says what no load event says: %s", message.subject, error)
            return
        self._loads[load.engine] = load
        self.on_change()
