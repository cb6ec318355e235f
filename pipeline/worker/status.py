"""What a worker publishes about itself, from what its engine reports, and when."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pipeline.broker.connection import Unreachable
from pipeline.engine import Engine, EngineStatus
from pipeline.process.lifecycle import Lifecycle
from pipeline.process.role import Role
from pipeline.wire.messages import PerPriorityCount, WorkerState, WorkerStatus, encode
from pipeline.wire.subjects import WORKER, Priority

log = logging.getLogger(__name__)

STATUS_EVERY_S = 1.0
# Changes within this time share one status.
_STATUS_GATHER_S = 0.02

_OF_THE_ENGINE: Final = (
    "models",
    "pending_tokens",
    "tokens_per_s",
    "tokens_per_request",
    "kv_bytes",
    "kv_bytes_limit",
    "reason",
    "standin",
    "tool_models",
    "embedding_models",
    "compute",
    "alone",
    "pending_prompt_tokens",
    "prompt_tokens_per_s",
    "prompt_tokens_per_request",
    "suspends",
    "answer_tokens_per_s",
    "loading_s",
    "empty",
    "facts",
    "server",
    "dialect",
    "prompt_tokens",
    "reused_tokens",
    "kept_bytes",
    "stored_bytes",
    "drafted_tokens",
    "accepted_tokens",
    "cannot_load",
)


def worker_status(engine: Engine, running: Mapping[Priority, int], **own: Any) -> WorkerStatus:
    """The status of a worker.

    Args:
        engine: its engine.
        running: the requests in the engine, by priority.
        own: the fields that the worker itself knows.
    """
    status = engine.status()
    return WorkerStatus(
        engine=engine.name,
        simulated=engine.simulated,
        running=PerPriorityCount(**{priority.value: running.get(priority, 0) for priority in Priority}),
        **{name: getattr(status, name) for name in _OF_THE_ENGINE},
        **own,
    )


@dataclass(slots=True)
class Reporting:
    """Publishes a worker's status at every change and every second, and reports the engine's state to the parent.

    Args:
        me: the role's connection and name.
        engine: its engine.
        status: makes the status of a worker whose engine is in this state. Each is published.
    """

    me: Role
    engine: Engine
    status: Callable[[WorkerState], WorkerStatus]
    _changed: asyncio.Event = field(init=False, default_factory=asyncio.Event)

    def note_change(self) -> None:
        """The status is not what it was: publish it."""
        self._changed.set()

    async def run(self, lifecycle: Lifecycle) -> None:
        """Report until cancelled."""
        told: object = None
        while True:
            status = self.engine.status()
            # Published first: when the parent acts on its report, the other processes know.
            await self.publish(status.state)
            state = _told(status)
            news = (state, status.reason, status.cannot_load)
            if news != told and state in ("loading", "ready", "down"):
                told = news
                said = status.reason or "; ".join(filter(None, (status.alone, status.compute)))
                lifecycle.report(
                    state,
                    said.removeprefix("loading "),
                    models=status.models,
                    simulated=self.engine.simulated,
                    cannot_load=status.cannot_load,
                )
            try:
                async with asyncio.timeout(STATUS_EVERY_S):
                    await self._changed.wait()
                    await asyncio.sleep(_STATUS_GATHER_S)
            except TimeoutError:
                pass
            self._changed.clear()

    async def publish(self, state: WorkerState) -> None:
        """Publish the status of a worker whose engine is in this state."""
        try:
            await self.me.bus.publish(f"{WORKER}.{self.me.name}", encode(self.status(state)))
        except Unreachable:
            log.debug("The status was not sent: the broker is away.")


def _told(status: EngineStatus) -> WorkerState:
    """The state of an engine as people read it: one that can load none of its models takes requests to refuse them."""
    if status.swapping:
        return "loading"
    refuses = status.cannot_load and set(status.models) <= set(status.cannot_load)
    return "down" if status.state == "ready" and refuses else status.state
