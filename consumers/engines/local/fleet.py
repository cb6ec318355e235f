"""Several models behind one worker: each in an engine process of its own, loaded on demand within a memory budget.

A request whose model is in memory begins at once if there is room. Else it is held here, under its lease, so that one
load serves all requests that wait for it, and so that requests of loaded models that are behind it in the queue get
their slots. What is held takes no slot, and its number is bounded. Beyond the bound, and where another worker has the
model in memory and a free slot, a request is handed back to the queue.

`pipeline.core.swapping` decides what is loaded and what leaves. The crash of a model's process affects only its own
requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Final, Self

import msgspec

from consumers.engines.local.berth import Berth, FleetModel, Ticket
from consumers.engines.local.blas import Blas, selected
from consumers.engines.local.fleet_status import joined
from consumers.engines.local.process import EngineProcess
from consumers.engines.local.run import Run
from pipeline.aio import Background
from pipeline.config import Config
from pipeline.core.models import CannotLoad, Catalogue, is_internal
from pipeline.core.swapping import decide
from pipeline.engine import Embedder, EngineStatus, NotLoaded, TokenCounter, Work
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import EngineName, ModelFacts, WorkerState
from pipeline.wire.requests import ChatRequest
from pipeline.wire.subjects import Priority

log = logging.getLogger(__name__)

HELD_MOST: Final = {Priority.HIGH: 128, Priority.MEDIUM: 96, Priority.LOW: 64}
"""A request is held if fewer than so many are held in all. The more urgent it is, the more."""

HELD_OF_ONE: Final = {Priority.HIGH: 64, Priority.MEDIUM: 48, Priority.LOW: 32}
"""The same for the requests of one model that is not loaded: one popular model must not fill the worker's hands."""

HELD_OF_LOADED: Final = 8
"""Requests of a loaded model that are held while its slots are in use: the next ones."""

_FACTS_KEPT_S: Final = 0.2

_SETTLE_S: Final = 0.01
"""Requests that arrive together are looked at together."""


class Fleet:
    """Several models as one `Engine`. Everything here runs in one event loop.

    Args:
        config: the settings of the worker.
        models: the models, the default one first.
        budget_bytes: memory for the weights of those that are loaded.
        running: the process of the default model, if it has one already.

    Attributes:
        budget_bytes: as given.
        elsewhere: whether another worker has one of these names in memory, and a free slot.
        others_serve: whether another worker of MLX has a model in memory.
        swaps: how many loads there have been.
    """

    name: EngineName = "mlx"
    embedder: Embedder | None = None
    counter: TokenCounter | None

    def __init__(
        self, config: Config, models: Sequence[FleetModel], budget_bytes: int, *, running: EngineProcess | None = None
    ) -> None:
        self.simulated = config.engine == "simulated"
        self.counter = self
        self.elsewhere: Callable[[Sequence[str]], bool] = lambda _: False
        self.others_serve: Callable[[], bool] = lambda: False
        self.swaps = 0
        self._config = config
        self.budget_bytes = budget_bytes
        self._blas: asyncio.Future[Blas | None] | None = None
        default, *further = models
        self._berths = {default.name: self._berth(default, default=True, running=running)}
        self._berths |= {model.name: self._berth(model) for model in further}
        self._owner = {name: berth for berth in self._berths.values() for name in reversed(berth.names)}
        self._resolved: dict[str, str] = {}
        self._listed: list[str] = []
        self._known_until = 0.0
        self._relist()
        self._known: dict[str, ModelFacts] = {}
        self._tasks = Background()
        self._wake: asyncio.TimerHandle | None = None
        self._wake_at = 0.0
        self._running = False
        self._load_failed: asyncio.Queue[str] = asyncio.Queue()
        self._callbacks: list[Callable[[], None]] = []
        self._announced: object = None

    def _berth(self, model: FleetModel, *, default: bool = False, running: EngineProcess | None = None) -> Berth:
        engine = running or EngineProcess(
            model.config, model_path=model.path, served_name=model.name, select=self._selected
        )
        berth = Berth(model, engine, default)
        if running is not None:
            berth.adopt(asyncio.get_running_loop().time())
        engine.on_change(lambda: self._on_change(berth))
        return berth

    def add(self, model: FleetModel) -> None:
        """Load this model as well from now on, when a request asks for it. Its names are those of no other model."""
        berth = self._berth(model)
        self._berths[model.name] = berth
        self._owner |= dict.fromkeys(berth.names, berth)
        self._relist()
        self._consider_soon(0.0)
        self._announce()

    @property
    def models(self) -> list[FleetModel]:
        """The models that it can load, the default one first."""
        return [berth.model for berth in self._berths.values()]

    async def _selected(self, wanted: str, threads: int) -> Blas | None:
        """The BLAS library, which is tried once for all models, and again if that failed or its file is gone."""
        found = self._blas
        failed = found is not None and found.done() and (found.cancelled() or found.exception() is not None)
        known = found.result() if found is not None and found.done() and not failed else None
        if found is None or failed or (known is not None and known.is_gone()):
            select: Callable[[str, int], Awaitable[Blas | None]] = selected
            found = self._blas = asyncio.ensure_future(select(wanted, threads))
        return await asyncio.shield(found)

    # ---- the engine's interface --------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self.begin()
        return self

    def begin(self) -> None:
        """Load the default model and the pinned ones."""
        self._running = True
        self._consider()

    async def __aexit__(self, *exc: object) -> None:
        self._running = False
        if self._wake is not None:
            self._wake.cancel()
        for berth in self._berths.values():
            berth.turn_away(HeadraceError(ErrorCode.UNAVAILABLE, "The engine was stopped."))
        self._tasks.cancel()
        await self._tasks.join()
        if self._blas is not None:
            self._blas.cancel()
            await asyncio.wait([self._blas])
        in_use = [berth for berth in self._berths.values() if berth.stage != "absent" or len(berth.engine.requests)]
        await asyncio.gather(*(berth.engine.__aexit__() for berth in in_use))

    def resolve(self, model: str | None) -> str:
        """As `Engine.resolve`: a name, an alias, an adapter, an equivalent by `spill_models`, or a model's path.

        None: the default model if it is in memory, else the loaded one that was used last, else the default. An answer
        that no model was named for is not worth a swap.
        """
        if model is None:
            return self._any().name
        if (known := self._resolved.get(model)) is None:
            own = [berth.name for berth in self._berths.values() if model in (berth.model.place, berth.model.path)]
            catalogue = self._catalogue()
            catalogue.engines_for(own[0] if own else model)
            name = own[0] if own else catalogue.model_on("mlx", model) or model
            berth = self._owner[name]
            known = name if name in berth.model.config.adapters else berth.name
            if own or model in self._owner:
                self._resolved[model] = known
        return known

    async def submit(self, work: Work) -> Run:
        """As `Engine.submit`: waits until the model of the request is in memory and has room."""
        berth, now = self._owner[work.model], self._now()
        if not self._running:
            raise HeadraceError(ErrorCode.UNAVAILABLE, "The engine is down (stopped).")
        if berth.rests(now):
            raise CannotLoad(work.model, berth.failure)
        if berth.has_room(work) and not berth.is_behind(work):
            return berth.begin(work, now)
        if berth.stage in ("absent", "leaving") and self.elsewhere(berth.names):
            raise NotLoaded(f"Model {berth.name} is loaded in another worker.")
        if not self._may_hold(berth, work.priority):
            raise NotLoaded(f"Many requests wait for model {berth.name}.")
        ticket = Ticket(work, now, asyncio.get_running_loop().create_future())
        berth.tickets.append(ticket)
        self._consider_soon(_SETTLE_S)
        self._announce()
        try:
            return await ticket.entered
        except asyncio.CancelledError:
            if ticket.entered.done() and not ticket.entered.cancelled() and ticket.entered.exception() is None:
                await ticket.entered.result().close()
            raise
        finally:
            if ticket in berth.tickets:
                berth.tickets.remove(ticket)
            self._announce()

    def status(self) -> EngineStatus:
        """As `Engine.status`. What is held adds as many slots as it takes."""
        berths = self._berths.values()
        ready = [berth for berth in berths if berth.stage == "ready"]
        loading = next((berth for berth in berths if berth.stage == "loading"), None)
        status = joined(
            {berth.name: berth.engine.status() for berth in ready},
            [berth.engine.status() for berth in berths if berth.was_ready and berth.stage != "ready"],
            # Requests beyond the slots of one model must not take those of another.
            sum(len(berth.tickets) + berth.beyond for berth in berths),
        )
        facts = self._facts()
        status.state, status.reason = self._state(ready), self._reason(loading)
        status.models, status.facts = self._listed, {name: facts[name] for name in self._listed}
        status.cannot_load = self._cannot_load()
        status.tool_models = [name for name in self._listed if "tools" in facts[name].capabilities]
        if status.state == "ready" and not ready and loading is None:
            # For the request that loads a model: without a slot, the worker would take none.
            status.slots_total += 1
        status.swapping = loading is not None
        status.loading_s = 0.0 if ready or loading is None else self._left_s(loading)
        return status

    def on_change(self, callback: Callable[[], None]) -> None:
        """As `Engine.on_change`. Which models are loaded counts as well."""
        self._callbacks.append(callback)

    async def count_tokens(self, request: ChatRequest) -> int:
        """As `TokenCounter.count_tokens`: by the model that the request names, if that is loaded."""
        counter = self._owner[self.resolve(request.wanted_model)].engine.counter
        if counter is None:
            raise HeadraceError(ErrorCode.UNAVAILABLE, "The engine cannot count tokens now. Retry later.")
        return await counter.count_tokens(request)

    async def load_failed(self) -> str:
        """Wait until the default model or a pinned one could not be loaded at the start. Returns why."""
        return await self._load_failed.get()

    def child_pid(self, model: str) -> int | None:
        """The process id of a model's child, or None while it has none."""
        return self._berths[model].engine.child_pid

    # ---- what it is --------------------------------------------------------------------------------------------------

    def _catalogue(self) -> Catalogue:
        """The names that the worker answers to: those of models that it can load, or may try to load again."""
        now = self._now()
        names = [name for berth in self._berths.values() if not berth.rests(now) for name in berth.names]
        config = self._config
        return Catalogue(names, (), config.spill_models, config.internal_models, cannot_load=self._cannot_load())

    def _cannot_load(self) -> dict[str, str]:
        return {
            name: berth.failure
            for berth in self._berths.values()
            if berth.refused
            for name in berth.names
            if not is_internal(name, self._config.internal_models)
        }

    def _relist(self) -> None:
        """The names that the worker answers to may have changed."""
        listed = replace(self._catalogue(), cannot_load={}).listed()
        if listed != self._listed:
            self._listed, self._known_until = listed, 0.0
            self._resolved.clear()

    def _any(self) -> Berth:
        berths, now, internal = list(self._berths.values()), self._now(), self._config.internal_models
        if berths[0].stage == "ready":
            return berths[0]
        usable = [berth for berth in berths if not is_internal(berth.name, internal)]
        loaded = [berth for berth in usable if berth.stage == "ready"]
        absent = next((berth for berth in usable if not berth.rests(now)), berths[0])
        return max(loaded, key=lambda berth: berth.used_at, default=absent)

    @property
    def _held(self) -> int:
        return sum(len(berth.tickets) for berth in self._berths.values())

    def _may_hold(self, berth: Berth, priority: Priority) -> bool:
        most = HELD_OF_LOADED if berth.stage == "ready" and priority is not Priority.HIGH else HELD_OF_ONE[priority]
        return len(berth.tickets) < most and self._held < HELD_MOST[priority]

    def _state(self, ready: Sequence[Berth]) -> WorkerState:
        """Ready once a model has been loaded: while one takes the place of another, the worker is not away.

        One whose models cannot be loaded again takes requests too, and they end with the reason. It leaves them to
        another worker that has a model in memory.
        """
        if any(berth.engine.state == "ready" for berth in ready):
            return "ready"
        berths, now = self._berths.values(), self._now()
        loaded_before = [berth for berth in berths if berth.was_ready and not ready]
        if any(not berth.rests(now) for berth in loaded_before) or (loaded_before and not self.others_serve()):
            return "ready"
        return "down" if any(berth.rests(now) for berth in berths) and not ready else "loading"

    def _reason(self, loading: Berth | None) -> str:
        now = self._now()
        if loading is not None:
            return loading.progress(now)
        return "no model can be loaded" if all(berth.rests(now) for berth in self._berths.values()) else ""

    def _left_s(self, loading: Berth) -> float:
        return max(0.0, loading.load_s - (self._now() - loading.since))

    def _facts(self) -> dict[str, ModelFacts]:
        """The facts of all names. They are made at most so often, because they are asked for with every status."""
        now = self._now()
        if now >= self._known_until:
            wall_now = time.time()
            known = [(berth, berth.facts(now, wall_now)) for berth in self._berths.values()]
            self._known = {berth.name: facts for berth, facts in known}
            for berth, facts in known:
                also = msgspec.structs.replace(facts, alias_of=berth.name)
                self._known |= dict.fromkeys(berth.model.aliases, also)
                self._known |= dict.fromkeys(berth.model.config.adapters, facts)
            self._known_until = now + _FACTS_KEPT_S
        return self._known

    def _now(self) -> float:
        """Monotonic seconds."""
        return asyncio.get_running_loop().time()

    # ---- swapping ----------------------------------------------------------------------------------------------------

    def _on_change(self, berth: Berth) -> None:
        """The engine process of a model has changed."""
        now = self._now()
        if berth.stage == "loading" and berth.engine.state == "ready":
            berth.loaded(now)
            self._relist()
            log.info("Model %s is loaded: %.1f s, %.1f MB.", berth.name, berth.load_s, berth.size_bytes / 1e6)
        elif berth.stage in ("loading", "ready") and berth.engine.state == "down" and self._running:
            self._on_failure(berth, now)
        self._consider_soon(0.0)
        self._announce()

    def _on_failure(self, berth: Berth, now: float) -> None:
        log.error("Model %s could not be loaded: %s", berth.name, berth.engine.reason)
        started = any(other.was_ready for other in self._berths.values())
        if berth.engine.load_error and (berth.default or berth.model.pinned) and not started:
            self._load_failed.put_nowait(berth.engine.load_error)
        berth.failed(now)
        self._relist()
        if berth.refused:
            berth.turn_away(CannotLoad(berth.name, berth.failure))

    def _consider_soon(self, after_s: float) -> None:
        """Decide after so many seconds, or when it was due before."""
        loop = asyncio.get_running_loop()
        at = loop.time() + after_s
        if not self._running or (self._wake is not None and self._wake_at <= at):
            return
        if self._wake is not None:
            self._wake.cancel()
        self._wake, self._wake_at = loop.call_later(after_s, self._consider), at

    def _consider(self) -> None:
        """Let requests enter, and load and end models, as `swapping.decide` says."""
        self._wake = None
        if not self._running:
            return
        now = self._now()
        self._relist()
        for berth in self._berths.values():
            if berth.tickets:
                berth.admit(now)
        swap = decide([berth.use(now) for berth in self._berths.values()], self.budget_bytes, now)
        for name in swap.leave:
            self._berths[name].enter("leaving", now)
        for name in swap.end:
            if not self._berths[name].ending:
                self._berths[name].ending = True
                self._tasks.start(self._end(self._berths[name]), what=f"unloading model {name}")
        if swap.load is not None:
            self._load(self._berths[swap.load], now)
        failed = [berth.failed_until for berth in self._berths.values() if berth.failed_until > now]
        due = [at for at in (swap.wake_at, *failed) if at is not None]
        if swap.leave:
            due.append(now)
        if due:
            self._consider_soon(max(0.0, min(due) - now))
        self._announce()

    def _load(self, berth: Berth, now: float) -> None:
        log.info("Loading model %s for %d requests.", berth.name, len(berth.tickets))
        self.swaps += 1
        berth.enter("loading", now)
        berth.engine.load()

    async def _end(self, berth: Berth) -> None:
        try:
            await berth.engine.unload()
        finally:
            berth.ending = False
            berth.enter("absent", self._now())
            log.info("Model %s has left memory.", berth.name)
            self._consider_soon(0.0)
            self._announce()

    def _announce(self) -> None:
        status = self.status()
        stages = tuple((berth.name, berth.stage) for berth in self._berths.values() if berth.stage != "absent")
        current = (status.state, status.reason, status.slots_used, status.slots_total, stages, status.models)
        if current != self._announced:
            self._announced = current
            self._known_until = 0.0
            for callback in self._callbacks:
                callback()
