"""The gateway about itself: whether it is alive and ready, its metrics, and its OpenAPI document."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from pipeline.broker.jetstream import Bus
from pipeline.broker.peers import Peers
from pipeline.gateway.endpoint import Schema
from pipeline.gateway.keyring import KeyRing
from pipeline.gateway.metrics import CONTENT_TYPE, Metrics
from pipeline.gateway.queue import StatisticsCache
from pipeline.gateway.responses import Registry, json_response
from pipeline.gateway.usage import UsageView


@dataclass(frozen=True, slots=True)
class Probes:
    """The handlers of `/healthz`, `/readyz`, `/metrics` and `/openapi.json`. `openapi` is the document."""

    bus: Bus
    peers: Peers
    statistics: StatisticsCache
    usage: UsageView
    counts: Metrics
    registry: Registry
    openapi: Schema
    ring: KeyRing

    async def healthz(self, _: Request) -> Response:
        """`GET /healthz`."""
        return json_response({"status": "ok"})

    async def readyz(self, _: Request) -> Response:
        """`GET /readyz`: 200 if the broker stores requests, and the monitor and one engine are there, else 503."""
        store = self.peers.store()
        checks = {
            "broker": self.bus.is_connected,
            "monitor": await self.statistics.decoded() is not None,
            "store": store is None or not store.refuses,
            "engine": any(worker.state == "ready" for e in ("mlx", "ollama") for worker in self.peers.workers(e)),
        }
        ready = all(checks.values())
        said = {"reason": store.reason} if store is not None and store.reason else {}
        if self.ring.trouble:
            said["keys"] = "The file of the API keys is invalid; the earlier keys are in force."
        return json_response({"status": "ready" if ready else "not ready", **checks, **said}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        """`GET /metrics`."""
        text = self.counts.text(
            await self.statistics.decoded(),
            self.peers.store(),
            self.peers.workers("mlx"),
            usage=await self.usage.for_metrics(request.state.caller),
            open_responses=len(self.registry),
            foreign=self.bus.foreign,
        )
        return Response(text, headers={"content-type": CONTENT_TYPE})

    async def document(self, _: Request) -> Response:
        """`GET /openapi.json`."""
        return json_response(self.openapi)
