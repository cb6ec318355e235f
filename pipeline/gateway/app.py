"""The gateway as an ASGI application: its parts, wired together, behind the edge."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp

from pipeline.aio import Background
from pipeline.broker.asker import Asker
from pipeline.config import Config
from pipeline.gateway.answering import AnswerContext
from pipeline.gateway.asking import Asking
from pipeline.gateway.batches import BatchCalls
from pipeline.gateway.counting import TokenCounts
from pipeline.gateway.document import openapi
from pipeline.gateway.edge import Edge, Pages
from pipeline.gateway.endpoint import Directory
from pipeline.gateway.endpoints import ENDPOINTS
from pipeline.gateway.fetching import ModelFetches
from pipeline.gateway.hangups import HangUps
from pipeline.gateway.keyring import KeyRing
from pipeline.gateway.letters import Letters
from pipeline.gateway.live import Watch
from pipeline.gateway.metrics import Metrics
from pipeline.gateway.models import Models
from pipeline.gateway.operating import OperatorCalls
from pipeline.gateway.parts import Parts
from pipeline.gateway.probes import Probes
from pipeline.gateway.queue import Queue, StatisticsCache
from pipeline.gateway.quotas import KeyQuotas
from pipeline.gateway.responses import Registry, error_response
from pipeline.gateway.statuses import HttpError
from pipeline.gateway.uploads import Uploads
from pipeline.gateway.usage import UsageView
from pipeline.process.role import Role
from pipeline.wire.errors import ErrorCode, HeadraceError


class Gateway:
    """Everything behind the HTTP server.

    Args:
        me: the role's connection.
        config: the settings.

    Attributes:
        ring: the API keys.
    """

    def __init__(self, me: Role, config: Config) -> None:
        self._me = me
        self._config = config
        self._metrics = Metrics()
        self._registry = Registry()
        self._beside = Background()
        statistics = StatisticsCache(me.bus)
        usage = UsageView(me.bus)
        client = Asker(me.bus, me.tracing)
        self._hang_ups = HangUps(client, config.http_grace_s)
        self.ring = KeyRing(config)
        self._quotas = KeyQuotas(me.bus, self.ring.keys)
        self.ring.on_change = self._quotas.use
        context = AnswerContext(client, me.peers, self._metrics, self._registry, self._hang_ups, self._quotas)
        models = Models(me.peers, config)
        document = openapi(ENDPOINTS, with_keys=bool(config.http_keys))
        self._parts = Parts(
            asking=Asking(me, config, models, context),
            models=models,
            fetches=ModelFetches(me, config, models, self._registry),
            counts=TokenCounts(me, config, models),
            queue=Queue(client, me.peers, statistics, self._registry),
            usage=usage,
            letters=Letters(me.bus),
            operator=OperatorCalls(me.bus, config),
            uploads=Uploads(me.bus, me.peers, config),
            batches=BatchCalls(me.bus, me.peers, config, self._quotas),
            watch=Watch(me, config, statistics, self._registry),
            probes=Probes(me.bus, me.peers, statistics, usage, self._metrics, self._registry, document, self.ring),
        )

    async def start(self) -> None:
        """Subscribe to the pipeline's events. Call once."""
        self._me.peers.on_change = self._on_change
        await self._parts.watch.start()
        await self._quotas.start()
        self._beside.start(self.ring.run(), what="following the file of the API keys")

    def _on_change(self) -> None:
        self._parts.queue.on_change()
        self._parts.watch.on_change()

    def app(self) -> ASGIApp:
        """The gateway as an ASGI application."""
        routes = [endpoint.route(self._parts) for endpoint in ENDPOINTS]
        handlers = {HeadraceError: _refused, HTTPException: _not_served, ClientDisconnect: _gone, Exception: _failed}
        served = Starlette(routes=routes, exception_handlers=handlers)
        edge = Edge(served, self._config, self._metrics, Directory(ENDPOINTS), self._quotas, self.ring)
        return Pages(edge, self._config, self.ring)

    async def drain(self, within_s: float) -> None:
        """Let open responses finish. Those that do not are told where to read on; their requests continue."""
        await self._registry.drain(within_s)
        await self._hang_ups.stop()
        self._quotas.stop()
        self._beside.cancel()


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HeadraceError)  # noqa: S101 - registered for it
    return error_response(error, request.url.path)


async def _not_served(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for it
    message = f"No endpoint {request.method} {request.url.path[:200]}. /docs lists the endpoints."
    response = error_response(HttpError(error.status_code, ErrorCode.INVALID_REQUEST, message), request.url.path)
    if error.status_code == 405:
        # Each method of a path has its own route, and the route that refused knows only its own method.
        there = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
        response.headers["allow"] = ", ".join(sorted({method for route in there for method in route.methods}))
    return response


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # the client is gone and does not read it


async def _failed(request: Request, error: Exception) -> Response:
    message = f"The gateway failed at this request ({type(error).__name__}). See its log."
    return error_response(HttpError(500, ErrorCode.UNAVAILABLE, message), request.url.path)
