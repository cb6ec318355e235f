"""Giving running answers of the second engine back to the first one, where the rest would be written sooner."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pipeline.core.ending import Returned
from pipeline.core.placement import back_to_mlx, lent_to_mlx
from pipeline.core.spilling import ends_sooner
from pipeline.core.waits import Capacity
from pipeline.engine import Engine
from pipeline.process.role import Role
from pipeline.wire.requests import ChatRequest
from pipeline.worker.serving import Serving

_LOOK_EVERY_S = 0.1
# After one answer was given back, the first engine's load shows it within this time.
_SETTLES_S = 0.5


@dataclass(slots=True)
class Handover:
    """Looks at the running requests of Ollama's worker. It interrupts one at a time.

    Args:
        me: the role's peers.
        engine: Ollama.
        running: the requests that the engine runs.
    """

    me: Role
    engine: Engine
    running: Callable[[], Iterable[Serving]]

    async def run(self) -> None:
        """Work until cancelled."""
        while True:  # noqa: ASYNC110 - what it looks at changes all the time
            await asyncio.sleep(_SETTLES_S if self._give_one() else _LOOK_EVERY_S)

    def _give_one(self) -> bool:
        running, load = list(self.running()), self.me.peers.load("mlx")
        if not running or load is None:
            return False
        rests = self.engine.status().rests
        at_mlx, here = (Capacity.of(self.me.peers.workers(engine)) for engine in ("mlx", self.engine.name))
        for serving in running:
            request, envelope = serving.request, serving.envelope
            if not isinstance(request, ChatRequest) or envelope.name not in rests:
                continue
            if self.me.peers.pauses.now.holds(envelope.priority, envelope.owner):
                continue  # it runs, and on its lane it would wait
            rest_s = rests[envelope.name]
            sooner = ends_sooner(load, at_mlx, here, envelope.priority, rest_s, keeps=bool(request.streams))
            if not (sooner or load.takes_back):
                continue
            why = "mlx ends it sooner" if sooner else load.keeps
            models = serving.context.models()
            given = lent_to_mlx(envelope, request, models, why=why)
            if isinstance(given, Returned) and envelope.delivered > 1:
                # It was lent before, and no MLX worker had room for it.
                given = back_to_mlx(envelope, request, models.catalogue, why=why)
            if given is not None and serving.interrupt(given):
                if isinstance(given, Returned):
                    serving.lend()
                return True
        return False
