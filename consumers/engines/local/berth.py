"""One of several models of a worker: its engine process, its stage, and the requests that wait for it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from consumers.engines.local.process import EngineProcess
from consumers.engines.local.run import Run
from pipeline.config import Config
from pipeline.core.backoff import Backoff
from pipeline.core.reasons import one_line
from pipeline.core.swapping import ModelUse, Stage
from pipeline.engine import Work
from pipeline.wire.errors import HeadraceError
from pipeline.wire.messages import ModelFacts
from pipeline.wire.subjects import Priority

_RETRY_S: Final = 0.5
_RETRY_MOST_S: Final = 120.0
_MOST_DEATHS: Final = 3
"""A process that dies so often in a row while it loads has a model that cannot be loaded."""

REFUSED_S: Final = 10.0
"""A model that cannot be loaded is not tried again before."""

_ORDER: Final = list(Priority)


@dataclass(frozen=True, slots=True)
class FleetModel:
    """A model that a worker can load.

    Attributes:
        name: on the wire.
        path: its folder, or a repository on the hub; empty where no model runs.
        config: the settings for this model.
        place: as the settings name it.
        aliases: its further names.
        size_bytes: of its files.
        expected_bytes: the memory that its weights are expected to take.
        known_bytes: the memory that it takes, as the settings say; None if it is to be measured.
        pinned: it stays in memory.
        idle_s: it leaves memory after so long without work; None for never.
    """

    name: str
    path: str
    config: Config
    place: str = ""
    aliases: tuple[str, ...] = ()
    size_bytes: int = 0
    expected_bytes: int = 0
    known_bytes: int | None = None
    pinned: bool = False
    idle_s: float | None = None


@dataclass(slots=True, eq=False)
class Ticket:
    """A request that waits for its model. `entered` has its run once it is in the engine."""

    work: Work
    began_at: float
    entered: asyncio.Future[Run]


@dataclass(slots=True, eq=False)
class Berth:
    """The place of one model. One writer: the `Fleet`. Times are monotonic seconds.

    Attributes:
        model: the model.
        engine: its process, which lives while the model is in memory.
        default: it answers requests that name no model, and is loaded first.
        tickets: the requests that wait for it.
        stage: where it is, and `since` when.
        used_at: when it last had work.
        high_at: when it last had a HIGH request since it is loaded.
        load_s: how long its last load took.
        was_ready: it has been loaded before.
        ending: its process is being ended.
        failure: why its last load failed, for those who ask for it; empty if it did not.
        refused: it cannot be loaded. Without it, its process has died, and another try is due.
        failed_until: when it may be tried again.
    """

    model: FleetModel
    engine: EngineProcess
    default: bool
    tickets: list[Ticket] = field(default_factory=list)
    stage: Stage = "absent"
    since: float = 0.0
    used_at: float = 0.0
    high_at: float | None = None
    load_s: float = 0.0
    was_ready: bool = False
    ending: bool = False
    failure: str = ""
    refused: bool = False
    failed_until: float = 0.0
    _retries: Backoff = field(default_factory=lambda: Backoff(_RETRY_S, _RETRY_MOST_S))

    @property
    def name(self) -> str:
        """The model's."""
        return self.model.name

    @property
    def names(self) -> tuple[str, ...]:
        """The model's name, its aliases and its adapters."""
        return (self.model.name, *self.model.aliases, *self.model.config.adapters)

    @property
    def size_bytes(self) -> int:
        """The memory that it takes, as far as is known."""
        return self.model.known_bytes or self.engine.memory_bytes or self.model.expected_bytes

    def rests(self, now: float) -> bool:
        """Whether it cannot be loaded, and it is too early to try again."""
        return self.refused and now < self.failed_until

    def enter(self, stage: Stage, now: float) -> None:
        """The stage begins now."""
        self.stage, self.since = stage, now

    def adopt(self, now: float) -> None:
        """Its process has been started before."""
        self.was_ready, self.used_at = self.engine.was_loaded, now
        self.enter("ready" if self.engine.state == "ready" else "loading", now)

    def use(self, now: float) -> ModelUse:
        """The model, for `swapping.decide`."""
        requests = self.engine.requests
        if len(requests):
            self.used_at = now
        if requests.most_urgent is Priority.HIGH:
            self.high_at = now
        waiting = [(ticket.work.priority, ticket.began_at) for ticket in self.tickets]
        if self.stage == "absent" and requests.most_urgent is not None:
            # It was suspended when its model left.
            waiting.append((requests.most_urgent, self.since))
        may_load = now >= self.failed_until
        return ModelUse(
            self.name,
            self.size_bytes,
            self.stage,
            since=self.since,
            used_at=self.used_at,
            load_s=self.load_s,
            running=len(requests),
            busy_with=requests.most_urgent,
            high_at=self.high_at,
            waiting=min((priority for priority, _ in waiting), key=_ORDER.index) if waiting and may_load else None,
            oldest_at=min((began_at for _, began_at in waiting), default=0.0),
            pinned=self.model.pinned and may_load,
            preload=self.default and not self.was_ready and may_load,
            idle_s=self.model.idle_s,
        )

    @property
    def beyond(self) -> int:
        """Its requests that are in no slot of a loaded model."""
        requests = len(self.engine.requests)
        return max(0, requests - self.engine.slots) if self.stage == "ready" else requests

    def has_room(self, work: Work) -> bool:
        """Whether a request would begin at once."""
        return self.stage == "ready" and self.engine.has_room(work)

    def is_behind(self, work: Work) -> bool:
        """Whether a request that is as urgent already waits for a slot."""
        return any(_ORDER.index(ticket.work.priority) <= _ORDER.index(work.priority) for ticket in self.tickets)

    def begin(self, work: Work, now: float) -> Run:
        """Give the engine a request."""
        self.used_at = now
        if work.priority is Priority.HIGH:
            self.high_at = now
        return self.engine.begin(work)

    def admit(self, now: float) -> None:
        """Give the engine the requests that wait, the most urgent first, while there is room."""
        for ticket in sorted(self.tickets, key=lambda ticket: (_ORDER.index(ticket.work.priority), ticket.began_at)):
            if not self.has_room(ticket.work):
                return
            self.tickets.remove(ticket)
            if not ticket.entered.done():
                ticket.entered.set_result(self.begin(ticket.work, now))

    def turn_away(self, error: HeadraceError) -> None:
        """End the wait of all requests with an error."""
        tickets, self.tickets = self.tickets, []
        for ticket in tickets:
            if not ticket.entered.done():
                ticket.entered.set_exception(error)

    def loaded(self, now: float) -> None:
        """The model is in memory."""
        self.load_s, self.was_ready, self.failure, self.refused = now - self.since, True, "", False
        self._retries.succeeded()
        self.used_at, self.high_at = now, None
        self.enter("ready", now)

    def failed(self, now: float) -> None:
        """The model could not be loaded. It is tried again later."""
        said = self.engine.load_error or f"its process ended while it loaded: {self.engine.reason}"
        self.failure, pause_s = one_line(said, self._places()), self._retries.failed()
        self.refused = bool(self.engine.load_error) or self._retries.failures >= _MOST_DEATHS
        self.failed_until = now + (max(pause_s, REFUSED_S) if self.refused else pause_s)
        self.enter("leaving", now)

    def _places(self) -> dict[str, str]:
        """The folders of the model and of its adapters, with what stands for them in a message to a client."""
        own = self.model.config
        folders = {str(Path(place).expanduser()): name for name, place in own.adapters.items()}
        return {self.model.path: self.name, **folders}

    def progress(self, now: float) -> str:
        """How far its load has come, in words."""
        loading = self.engine.loading
        size = f", {loading.done_bytes / 1e6:.1f} of {loading.total_bytes / 1e6:.1f} MB" if loading.total_bytes else ""
        return f"loading {self.name}: {loading.note or 'starting'}{size}, {now - self.since:.0f} s"

    def facts(self, now: float, wall_now: float) -> ModelFacts:
        """What is known of the model."""
        # Nothing is known of a model that was never loaded, and there can be many of them.
        known = next(iter(self.engine.status().facts.values()), ModelFacts()) if self.was_ready else ModelFacts()
        known = msgspec.structs.replace(known, size_bytes=self.model.size_bytes, loaded=self.stage == "ready")
        if self.stage == "loading":
            done = self.engine.loading.done_bytes
            return msgspec.structs.replace(known, loading_bytes=done, loading_since=wall_now - (now - self.since))
        if self.stage == "ready":
            expires_at = 0.0
            if self.model.idle_s is not None and not self.model.pinned:
                expires_at = wall_now + max(0.0, self.used_at + self.model.idle_s - now)
            return msgspec.structs.replace(known, memory_bytes=self.size_bytes, expires_at=expires_at)
        return msgspec.structs.replace(known, memory_bytes=0)
