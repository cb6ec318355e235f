"""The parts of one gateway that have handlers, and how an endpoint of theirs is declared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.gateway.asking import Asking
from pipeline.gateway.batches import BatchCalls
from pipeline.gateway.counting import TokenCounts
from pipeline.gateway.endpoint import Endpoint, Handler, Kind
from pipeline.gateway.fetching import ModelFetches
from pipeline.gateway.letters import Letters
from pipeline.gateway.live import Watch
from pipeline.gateway.models import Models
from pipeline.gateway.operating import OperatorCalls
from pipeline.gateway.probes import Probes
from pipeline.gateway.queue import Queue
from pipeline.gateway.uploads import Uploads
from pipeline.gateway.usage import UsageView


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of one gateway that have handlers."""

    asking: Asking
    models: Models
    fetches: ModelFetches
    counts: TokenCounts
    queue: Queue
    usage: UsageView
    letters: Letters
    operator: OperatorCalls
    uploads: Uploads
    batches: BatchCalls
    watch: Watch
    probes: Probes


def get(path: str, kind: Kind, summary: str, serve: Callable[[Parts], Handler], **more: Any) -> Endpoint[Parts]:
    """An endpoint that reads. `more` is what else it declares."""
    return Endpoint("GET", path, kind, summary, serve, **more)
