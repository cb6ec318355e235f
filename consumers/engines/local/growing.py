"""An engine with one model that becomes a fleet when another model is fetched. The first model's process continues.

A model with aliases or an idle time is part of a fleet from the start. One that cannot be loaded again becomes part of
a fleet too: its requests end with the reason, and the next one after a pause makes the worker try again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

from consumers.engines.local.berth import FleetModel
from consumers.engines.local.fleet import Fleet
from consumers.engines.local.process import EngineProcess
from consumers.engines.local.run import Run
from pipeline.config import Config
from pipeline.engine import Embedder, EngineStatus, TokenCounter, Work
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import EngineName
from pipeline.wire.requests import ChatRequest


class Growing:
    """An `Engine` with the figures of a single model until it has several, and of a `Fleet` then.

    Args:
        config: the settings of the worker.
        model: the first one, and the default.
        budget_bytes: memory for the weights of several.

    Attributes:
        budget_bytes: as given.
        elsewhere, others_serve: as in `Fleet`.
    """

    name: EngineName = "mlx"
    embedder: Embedder | None = None
    counter: TokenCounter | None

    def __init__(self, config: Config, model: FleetModel, budget_bytes: int) -> None:
        self.simulated = config.engine == "simulated"
        self.counter = self
        self.elsewhere: Callable[[Sequence[str]], bool] = lambda _: False
        self.others_serve: Callable[[], bool] = lambda: False
        self._stopped = False
        self._config = config
        self._model = model
        self.budget_bytes = budget_bytes
        self._first = EngineProcess(model.config, model_path=model.path, served_name=model.name)
        self._now: EngineProcess | Fleet = self._first
        self._callbacks: list[Callable[[], None]] = []
        self._first.on_change(self._on_change)

    async def __aenter__(self) -> Self:
        await self._first.__aenter__()
        if self._model.aliases or self._model.idle_s:  # a single model has neither
            self._grow()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._stopped = True
        await self._now.__aexit__(*exc)

    def _on_change(self) -> None:
        if self._first.state == "down" and self._first.was_loaded and not self._stopped:
            self._grow()

    def add(self, model: FleetModel) -> None:
        """As `Fleet.add`."""
        self._grow().add(model)

    def _grow(self) -> Fleet:
        """The fleet, from now on."""
        if isinstance(self._now, Fleet):
            return self._now
        fleet = self._now = Fleet(self._config, [self._model], self.budget_bytes, running=self._first)
        fleet.elsewhere, fleet.others_serve = self._is_elsewhere, self._do_others_serve
        for callback in self._callbacks:
            fleet.on_change(callback)
        fleet.begin()
        return fleet

    def _is_elsewhere(self, names: Sequence[str]) -> bool:
        return self.elsewhere(names)  # which the caller sets after this engine has started

    def _do_others_serve(self) -> bool:
        return self.others_serve()

    @property
    def models(self) -> list[FleetModel]:
        """As `Fleet.models`."""
        return self._now.models if isinstance(self._now, Fleet) else [self._model]

    def resolve(self, model: str | None) -> str:
        """As `Engine.resolve`."""
        return self._now.resolve(model)

    async def submit(self, work: Work) -> Run:
        """As `Engine.submit`."""
        return await self._now.submit(work)

    def status(self) -> EngineStatus:
        """As `Engine.status`."""
        return self._now.status()

    def on_change(self, callback: Callable[[], None]) -> None:
        """As `Engine.on_change`."""
        self._callbacks.append(callback)
        self._now.on_change(callback)

    async def count_tokens(self, request: ChatRequest) -> int:
        """As `TokenCounter.count_tokens`."""
        if self._now.counter is None:
            raise HeadraceError(ErrorCode.UNAVAILABLE, "The engine cannot count tokens now. Retry later.")
        return await self._now.counter.count_tokens(request)

    async def load_failed(self) -> str:
        """Wait until the first load of the first model has failed. Returns why."""
        return await self._first.load_failed()
