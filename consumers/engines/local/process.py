"""An engine in a child process, supervised: what the rest of headrace holds in its hands.

A segfault, an abort, an out-of-memory kill, an exception or a hang in the child costs a restart, never this process.
What ran goes on from the tokens it had, after `pipeline.core.probation` has found whom to blame.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

from consumers.demo_model import MODEL_NAME, PATH
from consumers.engines.local.host import Child
from consumers.engines.local.protocol import (
    Cancel,
    Failed,
    FromChild,
    Loading,
    Ready,
    Rejected,
    Reset,
    Stats,
    Step,
    Submit,
)
from consumers.engines.local.run import Run
from pipeline.config import Config
from pipeline.core.models import Catalogue
from pipeline.core.probation import Probation
from pipeline.engine import Embedder, EngineStatus, Piece, Work
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import EngineName, WorkerState

log = logging.getLogger(__name__)

_END_GRACE_S: Final = 5.0
_BACKOFF_S: Final = 0.5
_BACKOFF_MOST_S: Final = 30.0
_MOST_CRASHES: Final = 4
"""A request that is innocent alone and still in so many crashes is given to another engine."""

_SETTLED_S: Final = 5.0
"""A child that dies idle before it has been up this long is in a crash loop."""


def located(model: str) -> str:
    """Where a model is: the folder of the shipped demo model, or what was given: a folder or a repository."""
    if model == MODEL_NAME:
        return str(PATH)
    path = Path(model).expanduser()
    return str(path.absolute()) if path.is_dir() or model.startswith((".", "/", "~")) else model


def served_name_of(model: str) -> str:
    """The name a model answers to: a folder's own, or the repository's."""
    location = Path(located(model))
    return location.resolve().name if location.is_absolute() and model != MODEL_NAME else model


class EngineProcess:
    """An `Engine` whose work is done by `consumers.engines.local.child`. Everything here happens in one event loop.

    Args:
        config: the engine's settings; the child reads the same ones.
        name: the engine's name on the wire.
        served_name: the model's name on the wire, where it shall not be its own.
    """

    embedder: Embedder | None = None

    def __init__(self, config: Config, *, name: EngineName = "mlx", served_name: str = "") -> None:
        self.name: EngineName = name
        self.simulated = config.engine == "simulated"
        self._config = config
        self._model_path = located(config.model)
        self._served = served_name or served_name_of(config.model)
        self._catalogue = Catalogue(mlx=[self._served], table=config.spill_models, internal=config.internal_models)
        self._listed = self._catalogue.listed()
        self._child: Child | None = None
        self._supervising: asyncio.Task[None] | None = None
        self._state: WorkerState = "down"
        self._reason = "not started"
        self._runs: dict[int, Run] = {}
        self._in_child: dict[int, Run] = {}
        self._probation = Probation()
        self._epoch = 0
        self._keys = 0
        self._heard_at = 0.0
        self._stats = Stats()
        self._calls_tools = False
        self._callbacks: list[Callable[[], None]] = []
        self._announced: object = None

    # ---- the engine's interface --------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._change("loading", "starting")
        self._supervising = asyncio.create_task(self._supervise(), name=f"{self.name} engine")
        return self

    async def __aexit__(self, *exc: object) -> None:
        task, self._supervising = self._supervising, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        self._give_up_all("the engine has been stopped")
        self._change("down", "stopped")

    def resolve(self, model: str | None) -> str:
        """As `Engine.resolve`: the served name, or its equivalent by `spill_models`; the model's full path too."""
        own = model in (self._config.model, self._model_path)
        self._catalogue.engines_for(self._served if own else model)
        return self._served

    async def submit(self, work: Work) -> Run:
        """As `Engine.submit`. While the engine loads, restarts or is on probation, the request waits."""
        if self._supervising is None or self._state == "down":
            raise HeadraceError(ErrorCode.UNAVAILABLE, f"the engine is down: {self._reason}")
        self._keys += 1
        run = Run(self._keys, work, self._closed)
        self._runs[run.key] = run
        self._dispatch()
        self._announce()
        return run

    def status(self) -> EngineStatus:
        """As `Engine.status`. While no slot can be had (loading, probation) all of them count as used."""
        total = self._config.slots
        offered = self._state == "ready" and not self._probation.active
        # Between two steps nothing else is known, and after the last one nothing runs.
        stats = (
            self._stats
            if self._runs
            else Stats(tokens_per_s=self._stats.tokens_per_s, tokens_per_request=self._stats.tokens_per_request)
        )
        return EngineStatus(
            state=self._state,
            models=self._listed,
            slots_used=min(len(self._runs), total) if offered else total,
            slots_total=total,
            pending_tokens=stats.pending_tokens,
            tokens_per_s=stats.tokens_per_s,
            tokens_per_request=stats.tokens_per_request,
            kv_bytes=stats.kv_bytes,
            kv_bytes_limit=self._config.kv_bytes_limit,
            reason=self._reason,
            tool_models=self._catalogue.listed() if self._calls_tools else [],
        )

    def on_change(self, callback: Callable[[], None]) -> None:
        """As `Engine.on_change`; figures that move with every step (rates, pending tokens, KV bytes) do not count."""
        self._callbacks.append(callback)

    @property
    def child_pid(self) -> int | None:
        """The child's process id, or None where there is none now."""
        return self._child.pid if self._child else None

    # ---- the child's lives -------------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            began_at = loop.time()
            try:
                was_ready = await self._live()
            except Exception as error:
                log.exception("the engine's supervision failed")
                was_ready = False
                self._change("down", f"{type(error).__name__}: {error}")
            settled = bool(self._in_child) or loop.time() - began_at > _SETTLED_S
            failures = 0 if was_ready and settled else failures + 1
            if was_ready:
                self._crashed(self._reason)
            else:
                self._give_up_all(f"the engine is down: {self._reason}")
            if failures:
                await asyncio.sleep(min(_BACKOFF_S * 2 ** (failures - 1), _BACKOFF_MOST_S))
            self._change("loading", f"starting again: {self._reason}")

    async def _live(self) -> bool:
        """One life of the child. Returns whether it became ready; `_reason` then says how it ended."""
        child = await Child.start(self._config, self._model_path, self.name)
        self._child = child
        self._epoch = 0
        watchdog = asyncio.create_task(self._watch(child), name=f"{self.name} watchdog")
        cause = ""
        try:
            while (frame := await child.receive()) is not None:
                if isinstance(frame, Failed):
                    cause = frame.reason
                self._handle(frame)
        finally:
            was_ready = self._state == "ready"
            self._child = None
            watchdog.cancel()
            manner = await child.end(_END_GRACE_S if was_ready else 0)
        if not cause:
            cause = f"the engine's process ended with {manner}"
            if not was_ready and child.last_line:
                cause += f": {child.last_line}"
        log.error("%s", cause)
        self._change("loading" if was_ready else "down", cause)
        return was_ready

    async def _watch(self, child: Child) -> None:
        """Kill a child in which requests run and no step ends."""
        loop = asyncio.get_running_loop()
        limit_s = self._config.step_timeout_s
        while True:
            await asyncio.sleep(limit_s / 4)
            if self._in_child and loop.time() - self._heard_at > limit_s:
                log.error("no step has ended for %.1f s: killing the engine's process", limit_s)
                child.kill()
                return

    def _handle(self, frame: FromChild) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        if isinstance(frame, Step):
            self._stats = frame.stats
            for key, piece in frame.pieces:
                self._produced(key, piece)
        elif isinstance(frame, Rejected):
            if run := self._in_child.get(frame.key):
                self._fail(run, frame.error())
        elif isinstance(frame, Loading):
            self._change("loading", frame.note)
        elif isinstance(frame, Ready):
            self._calls_tools = frame.facts.calls_tools
            self._change("ready", "")
        elif isinstance(frame, Reset):
            self._epoch = frame.epoch
            self._crashed(frame.error)
        self._dispatch()
        self._announce()

    # ---- requests ----------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Give the child what may run now."""
        if self._state != "ready" or self._child is None:
            return
        if not self._probation.active:
            for run in [run for run in self._runs.values() if run.wire is None]:
                self._send(self._child, run)
        while (key := self._probation.call_next()) is not None:
            self._send(self._child, self._runs[key])

    def _send(self, child: Child, run: Run) -> None:
        self._keys += 1
        if not self._in_child:
            self._heard_at = asyncio.get_running_loop().time()
        run.wire = self._keys
        self._in_child[run.wire] = run
        try:
            child.send(Submit(run.wire, self._epoch, run.work()))
        except (OverflowError, TypeError, ValueError, RecursionError) as error:
            self._fail(run, HeadraceError(ErrorCode.INVALID_REQUEST, f"the request cannot be passed on: {error}"))

    def _produced(self, key: int, piece: Piece) -> None:
        run = self._in_child.get(key)
        if run is None:
            return
        run.take(piece)
        if piece.finish_reason is not None:
            self._forget(run)
        elif self._probation.progressed(run.key, run.tokens) and self._probation.active:
            # Cleared, but others are still to be tried alone: it goes on when they have been.
            self._withdraw(run)

    def _withdraw(self, run: Run) -> None:
        if run.wire is None:
            return
        if self._child is not None:
            self._child.send(Cancel(run.wire))
        del self._in_child[run.wire]
        run.wire = None

    def _closed(self, run: Run) -> None:
        if run.key not in self._runs:
            return
        self._withdraw(run)
        self._forget(run)
        self._dispatch()
        self._announce()

    def _forget(self, run: Run) -> None:
        self._runs.pop(run.key, None)
        if run.wire is not None:
            self._in_child.pop(run.wire, None)
        self._probation.gone(run.key)

    def _fail(self, run: Run, error: HeadraceError) -> None:
        self._forget(run)
        run.fail(error)

    def _crashed(self, cause: str) -> None:
        """What was in the child is lost there: whoever is not to blame goes on from its tokens."""
        lost, self._in_child = list(self._in_child.values()), {}
        guilty = self._probation.crashed({run.key: run.tokens for run in lost})
        if lost:
            log.warning("%d requests were lost in the engine, and begin again: %s", len(lost), cause)
        for run in lost:
            run.wire = None
            if run.key == guilty:
                message = f"this request brings the engine down ({cause}); it will not be tried again"
                self._fail(run, HeadraceError(ErrorCode.ENGINE_FAILED, message))
            elif run.crashes >= _MOST_CRASHES:
                message = f"the engine went down {run.crashes + 1} times with this request in company ({cause})"
                self._fail(run, HeadraceError(ErrorCode.UNAVAILABLE, message))
            else:
                run.restarted()

    def _give_up_all(self, reason: str) -> None:
        for run in list(self._runs.values()):
            self._fail(run, HeadraceError(ErrorCode.UNAVAILABLE, reason))

    # ---- status ------------------------------------------------------------------------------------------------------

    def _change(self, state: WorkerState, reason: str) -> None:
        self._state, self._reason = state, reason
        self._announce()

    def _announce(self) -> None:
        status = self.status()
        current = (status.state, status.reason, status.slots_used)
        if current != self._announced:
            self._announced = current
            for callback in self._callbacks:
                callback()
