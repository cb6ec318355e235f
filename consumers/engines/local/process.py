"""An engine in a child process, and its supervision.

A segmentation fault, an abort, an out-of-memory kill, an exception or a hang in the child costs a restart of the child.
This process goes on. The requests that ran go on from the tokens that they have, once `pipeline.core.probation` has
found which of them caused the crash.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final, Self

import msgspec

from consumers.engines.local.blas import Blas, selected
from consumers.engines.local.counts import Counts
from consumers.engines.local.host import Child
from consumers.engines.local.inflight import InFlight
from consumers.engines.local.protocol import (
    Counted,
    Facts,
    FromChild,
    LoadFailed,
    Loading,
    Ready,
    Rejected,
    Reset,
    Stats,
    Step,
)
from consumers.engines.local.run import Run
from pipeline.aio import Background
from pipeline.config import Config
from pipeline.core.backoff import Backoff
from pipeline.core.models import Catalogue
from pipeline.core.reasons import one_line
from pipeline.core.stall import StallWatch
from pipeline.core.width import first_width
from pipeline.engine import MOST_PER_SLOT, Embedder, EngineStatus, TokenCounter, Work
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import EngineName, ModelFacts, WorkerState

log = logging.getLogger(__name__)

_END_GRACE_S: Final = 5.0
_BACKOFF_S: Final = 0.5
_BACKOFF_MOST_S: Final = 30.0

_COUNTED: Final = ("prompt_tokens", "reused_tokens", "drafted_tokens", "accepted_tokens")
"""What a child counts from 0."""

_SETTLED_S: Final = 5.0
"""A child that dies idle before it has been up this long is in a crash loop."""


class EngineProcess:
    """An `Engine` whose work is done by `consumers.engines.local.child`. Everything here runs in one event loop.

    Args:
        config: the engine's settings. The child reads the same ones.
        model_path: where the model is: a folder, or a repository on Hugging Face.
        served_name: the model's name on the wire.
        name: the engine's name on the wire.
        select: finds the BLAS library, by the settings `blas` and `mlx_threads`.
    """

    embedder: Embedder | None = None
    counter: TokenCounter | None

    def __init__(
        self,
        config: Config,
        *,
        model_path: str,
        served_name: str,
        name: EngineName = "mlx",
        select: Callable[[str, int], Awaitable[Blas | None]] = selected,
    ) -> None:
        self.name: EngineName = name
        self.simulated = config.engine == "simulated"
        self._config = config
        self._model_path = model_path
        self._served = served_name
        self._catalogue = Catalogue(
            mlx=[served_name, *config.adapters], table=config.spill_models, internal=config.internal_models
        )
        self._listed = self._catalogue.listed()
        self._resolved: dict[str | None, str] = {}
        self._requests = InFlight(self._on_close)
        self.counter = self._counts = Counts()
        self._tasks = Background()
        self._running = False
        self._child: Child | None = None
        self._heard_at = 0.0
        self._stalled = ""
        self._load_failed: asyncio.Queue[str] = asyncio.Queue()
        self._stats = Stats()
        # What the children that have ended had counted.
        self._counted = Stats()
        self._facts: Facts | None = None
        self._select, self._selected = select, False
        self._blas: Blas | None = None
        self._memory_bytes = 0
        self._load_error = ""
        self._loading = Loading("")
        self._state: WorkerState = "down"
        self._reason = "not started"
        self._callbacks: list[Callable[[], None]] = []
        self._announced: object = None

    # ---- the engine's interface --------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self.load()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._end()
        self._requests.give_up("The engine was stopped.")
        self._change("down", "stopped")

    def load(self) -> None:
        """Start a child, which loads the model."""
        self._running = True
        self._loading = Loading("")
        self._change("loading", "starting")
        self._tasks.start(self._supervise(), what=f"supervision of the {self.name} engine")

    async def unload(self) -> None:
        """End the child, which frees the model's memory. The requests that run are suspended until the next `load`."""
        await self._end()
        self._requests.park()
        self._change("down", "not loaded")

    async def _end(self) -> None:
        self._running = False
        self._tasks.cancel()
        await self._tasks.join()

    def resolve(self, model: str | None) -> str:
        """As `Engine.resolve`: the served name or an adapter's, also by an equivalent of `spill_models` or the model's
        full path.
        """
        if (resolved := self._resolved.get(model)) is None:
            own = model in (self._config.model, self._model_path) and model not in self._config.adapters
            wanted = self._served if own else model
            self._catalogue.engines_for(wanted)
            resolved = self._catalogue.model_on("mlx", wanted) or self._served
            if own or model is None or model in self._listed:
                self._resolved[model] = resolved
        return resolved

    async def submit(self, work: Work) -> Run:
        """As `Engine.submit`. While the engine loads, restarts or is on probation, the request waits."""
        return self.begin(work)

    def begin(self, work: Work) -> Run:
        """As `submit`, without waiting."""
        if not self._running or self._state == "down":
            raise HeadraceError(ErrorCode.UNAVAILABLE, f"The engine is down ({self._reason}).")
        run = self._requests.submit(work)
        self._dispatch()
        self._announce()
        return run

    def status(self) -> EngineStatus:
        """As `Engine.status`. While no request can begin (loading, probation), all slots count as used."""
        stats = self._stats
        if not self._requests:
            # The last step's frame still counts what has ended since.
            stats = msgspec.structs.replace(stats, pending_tokens=0.0, pending_prompt_tokens=0.0, kv_bytes=0)
        return EngineStatus(
            state=self._state,
            models=self._listed,
            slots_used=self._slots_used,
            slots_total=self.slots,
            pending_tokens=stats.pending_tokens,
            tokens_per_s=stats.tokens_per_s,
            tokens_per_request=stats.tokens_per_request,
            pending_prompt_tokens=stats.pending_prompt_tokens,
            prompt_tokens_per_s=stats.prompt_tokens_per_s,
            prompt_tokens_per_request=stats.prompt_tokens_per_request,
            kv_bytes=stats.kv_bytes,
            kv_bytes_limit=self._config.kv_bytes_limit or (self._facts.free_bytes if self._facts else 0),
            reason=self._reason,
            tool_models=self._listed if self._facts and self._facts.calls_tools else [],
            compute=self._compute(),
            alone=f"one request at a time ({self._facts.alone})" if self._facts and self._facts.alone else "",
            suspends=self._offers and self._suspends,
            facts=self._known(),
            prompt_tokens=self._counted.prompt_tokens + stats.prompt_tokens,
            reused_tokens=self._counted.reused_tokens + stats.reused_tokens,
            drafted_tokens=self._counted.drafted_tokens + stats.drafted_tokens,
            accepted_tokens=self._counted.accepted_tokens + stats.accepted_tokens,
            kept_bytes=stats.kept_bytes,
            stored_bytes=stats.stored_bytes,
            cannot_load=self._cannot_load(),
        )

    def on_change(self, callback: Callable[[], None]) -> None:
        """As `Engine.on_change`. Figures that move with every step (rates, pending tokens, KV bytes) do not count."""
        self._callbacks.append(callback)

    async def load_failed(self) -> str:
        """Wait until the first load of the model has failed. Returns why. The engine itself tries again."""
        return await self._load_failed.get()

    @property
    def child_pid(self) -> int | None:
        """The child's process id, or None while there is no child."""
        return self._child.pid if self._child else None

    @property
    def state(self) -> WorkerState:
        """As in `status`."""
        return self._state

    @property
    def reason(self) -> str:
        """As in `status`."""
        return self._reason

    @property
    def was_loaded(self) -> bool:
        """Whether it has loaded its model before."""
        return self._facts is not None

    @property
    def load_error(self) -> str:
        """Why the child could not load the model, if it said so; empty if it was killed, or has loaded it since."""
        return self._load_error

    def has_room(self, work: Work) -> bool:
        """Whether a request would begin at once: in a free slot, or in the place of a less urgent one."""
        if self._state != "ready" or self._requests.on_probation:
            return False
        running, slots = len(self._requests), self.slots
        if running < slots:
            return True
        as_urgent = self._requests.count(work.priority)
        return running < MOST_PER_SLOT * slots and (work.extra or (self._suspends and as_urgent < slots))

    @property
    def requests(self) -> InFlight:
        """The requests in the engine, to be counted."""
        return self._requests

    @property
    def loading(self) -> Loading:
        """How far the present or last load has come."""
        return self._loading

    @property
    def memory_bytes(self) -> int:
        """What the weights of the model took when it was last loaded; 0 if that is not known."""
        return self._memory_bytes

    # ---- the child's lives -------------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        pause = Backoff(_BACKOFF_S, _BACKOFF_MOST_S)
        while True:
            began_at = self._now()
            try:
                was_ready, cause = await self._live()
            except Exception as error:
                log.exception("The engine's supervision failed.")
                was_ready, cause = False, f"{type(error).__name__}: {error}"
            settled = self._requests.busy or self._now() - began_at > _SETTLED_S
            self._change("loading" if was_ready else "down", cause)
            if was_ready:
                self._requests.crashed(cause)
            else:
                self._requests.give_up(f"The engine is down ({cause}).")
            if was_ready and settled:
                pause.succeeded()
            else:
                await asyncio.sleep(pause.failed())
            self._change("loading", f"restarting after a crash ({cause})" if was_ready else f"starting again ({cause})")

    async def _live(self) -> tuple[bool, str]:
        """One life of the child. Returns whether it became ready, and how it ended."""
        if (not self.simulated and not self._selected) or (self._blas is not None and self._blas.is_gone()):
            self._blas = await self._select(self._config.blas, self._config.mlx_threads)
            self._selected = True
        blas = self._blas.library if self._blas else ""
        child = await Child.start(self._config, self._model_path, self.name, blas=blas)
        self._child, self._stalled = child, ""
        watchdog = self._tasks.start(self._watch(child), what=f"watchdog of the {self.name} engine")
        cause = ""
        try:
            while (frame := await child.receive()) is not None:
                if isinstance(frame, LoadFailed):
                    cause = self._load_error = frame.reason
                    if self._facts is None:
                        self._load_failed.put_nowait(cause)
                self._handle(child, frame)
        finally:
            was_ready = self._state == "ready"
            self._child = None
            self._requests.disconnect()
            self._counts.disconnect()
            watchdog.cancel()
            manner = await child.end(_END_GRACE_S if was_ready else 0)
        log.error("The engine process %d ended (%s).", child.pid, cause or self._stalled or manner)
        if self._facts is None and self._blas is not None and not cause:
            log.warning("The next engine process starts without %s, in case that was the cause.", self._blas.library)
            self._blas = None
        if not was_ready and child.last_line:
            manner += f": {child.last_line}"
        return was_ready, cause or self._stalled or manner

    async def _watch(self, child: Child) -> None:
        """Kill a child that works on requests and completes no step within `step_timeout_s`."""
        stall = StallWatch(self._config.step_timeout_s)
        while not stall.look(self._now(), progress_at=self._heard_at, busy=self._requests.busy):  # noqa: ASYNC110 - no event tells of silence
            await asyncio.sleep(stall.every_s)
        self._stalled = f"no step completed within {stall.limit_s:g} s"
        log.error("The engine process %d is killed: %s.", child.pid, self._stalled)
        child.kill()

    def _handle(self, child: Child, frame: FromChild) -> None:
        if self._is_progress(frame):
            self._heard_at = self._now()
        if isinstance(frame, Step):
            self._stats = frame.stats
            for number, piece in frame.pieces:
                self._requests.produced(number, piece)
            self._requests.moved(suspended=frame.suspended, resumed=frame.resumed)
        elif isinstance(frame, Rejected):
            self._requests.rejected(frame.key, frame.error())
        elif isinstance(frame, Counted):
            self._counts.counted(frame)
        elif isinstance(frame, Loading):
            self._loading = frame
            self._change("loading", frame.note)
        elif isinstance(frame, Ready):
            self._facts, self._memory_bytes, self._load_error = frame.facts, frame.memory_bytes, ""
            # A new child begins with the first width, and keeps no prompts. Its counts begin at 0.
            for name in _COUNTED:
                setattr(self._counted, name, getattr(self._counted, name) + getattr(self._stats, name))
            self._stats = msgspec.structs.replace(self._stats, slots=0, kept_bytes=0, **dict.fromkeys(_COUNTED, 0))
            log.info("The engine process %d is ready. %s", child.pid, self._compute())
            self._requests.connect(child.send)
            self._counts.connect(child.send)
            self._change("ready", "")
        elif isinstance(frame, Reset):
            self._facts = frame.facts
            self._requests.reset(frame.epoch, frame.error)
        self._dispatch()
        self._announce()

    def _is_progress(self, frame: FromChild) -> bool:
        """Whether a frame shows that the child's steps go on.

        Counts and refusals come from the thread that reads requests, also while a step hangs. A refusal is progress if
        no older request is in the child: that thread takes one request after another.
        """
        if isinstance(frame, Rejected):
            return self._requests.is_oldest(frame.key)
        return not isinstance(frame, Counted)

    def _dispatch(self) -> None:
        was_busy = self._requests.busy
        self._requests.dispatch()
        if not was_busy:
            self._heard_at = self._now()

    def _on_close(self) -> None:
        self._dispatch()
        self._announce()

    def _now(self) -> float:
        """Monotonic seconds: the only clock that is read here."""
        return asyncio.get_running_loop().time()

    def _known(self) -> dict[str, ModelFacts]:
        """The facts of the model, once it has been loaded."""
        if self._facts is None:
            return {}
        can = {"completion": True, "tools": self._facts.calls_tools, "thinking": self._facts.thinks}
        capabilities = [name for name, has in can.items() if has]
        known = ModelFacts(
            capabilities,
            self._facts.context_tokens,
            loaded=self._state == "ready",
            memory_bytes=self._memory_bytes if self._state == "ready" else 0,
        )
        return dict.fromkeys(self._listed, known)

    def _cannot_load(self) -> dict[str, str]:
        """The model, if its last load failed. Requests for it wait: it is tried again and again."""
        if not self._load_error:
            return {}
        return dict.fromkeys(self._listed, one_line(self._load_error, {self._model_path: self._served}))

    @property
    def slots(self) -> int:
        """How many requests the engine runs at once at present."""
        fixed = self._facts.slots if self._facts else 0
        return fixed or self._stats.slots or first_width(self._config.slots)

    @property
    def _offers(self) -> bool:
        return self._state == "ready" and not self._requests.on_probation

    @property
    def _slots_used(self) -> int:
        return min(len(self._requests), self.slots) if self._offers else self.slots

    @property
    def _suspends(self) -> bool:
        return self._facts is not None and self._facts.suspends and self._config.max_preemptions > 0

    def _compute(self) -> str:
        """How fast MLX computes on this machine, in words; empty on a GPU and before it is known."""
        if self._facts is None or not self._facts.gflops:
            return ""
        library = self._blas.name if self._blas else "its own BLAS"
        return f"MLX's CPU build at {self._facts.gflops:.3g} GFLOP/s, {library}; {self._facts.weights} weights"

    # ---- status ------------------------------------------------------------------------------------------------------

    def _change(self, state: WorkerState, reason: str) -> None:
        self._state, self._reason = state, reason
        self._announce()

    def _announce(self) -> None:
        # Twice for each request: only what a change is made of is computed.
        current = (self._state, self._reason, self._slots_used, self.slots)
        if current != self._announced:
            self._announced = current
            for callback in self._callbacks:
                callback()
