"""What a worker publishes about itself, from what its engine reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pipeline.engine import Engine
from pipeline.wire.messages import PerPriorityCount, WorkerStatus
from pipeline.wire.subjects import Priority

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
