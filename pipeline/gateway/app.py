"""The gateway's endpoints: which path is what, in both dialects and for the queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp

from pipeline.broker.asker import Asker
from pipeline.config import Config
from pipeline.core.models import Catalogue, same_model, spelled
from pipeline.gateway import document, files
from pipeline.gateway.answering import Answering, Desk
from pipeline.gateway.dialects import ollama, openai
from pipeline.gateway.dialects.shapes import Asked
from pipeline.gateway.edge import Edge, Pages
from pipeline.gateway.intake import Repeats, take_in, urgency
from pipeline.gateway.letters import Letters
from pipeline.gateway.live import Watch
from pipeline.gateway.metrics import CONTENT_TYPE, Metrics
from pipeline.gateway.queue import Queue, Statistics, events_url
from pipeline.gateway.responses import Registry, error_response, json_response
from pipeline.gateway.statuses import HttpError
from pipeline.process.role import Role
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import EmbeddingRequest

# How many times the largest body is still read, to be dropped.
_DROPPED_BODIES = 16
_MODELS_KEPT_S = 0.2
# A body, the largest one that may be published, and the models that are listed.
Reader = Callable[[bytes, int, Sequence[str]], Asked | ollama.Loaded]


class Gateway:
    """Everything behind the HTTP server.

    Args:
        me: the role's connection.
        config: the settings.
    """

    def __init__(self, me: Role, config: Config) -> None:
        self._me = me
        self._config = config
        self._since = me.bus.clock.wall()
        self._metrics = Metrics()
        self._known_models: Catalogue | None = None
        self._known_at = 0.0
        self._registry = Registry()
        self._repeats = Repeats()
        client = Asker(me.bus, me.tracing)
        self._desk = Desk(client, me.peers, self._metrics, self._registry)
        self._statistics = Statistics(me.bus)
        self._queue = Queue(client, me.peers, self._statistics, self._registry)
        self._letters = Letters(me.bus)
        self._watch = Watch(me, config, self._statistics, self._registry)

    async def start(self) -> None:
        """Listen to what the pipeline says of itself. Call once."""
        self._me.peers.on_change = self._on_change
        await self._watch.start()

    def _on_change(self) -> None:
        self._queue.on_change()
        self._watch.on_change()

    def app(self) -> ASGIApp:
        """The gateway as an ASGI application."""
        ask = self._ask
        routes = [
            Route("/v1/chat/completions", ask(openai.read_chat), methods=["POST"]),
            Route("/v1/completions", ask(openai.read_text), methods=["POST"]),
            Route("/v1/embeddings", ask(openai.read_embeddings), methods=["POST"]),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{id:path}", self._model, methods=["GET"]),
            Route("/api/chat", ask(ollama.read_chat), methods=["POST"]),
            Route("/api/generate", ask(ollama.read_generate), methods=["POST"]),
            Route("/api/embed", ask(ollama.read_embed), methods=["POST"]),
            Route("/api/embeddings", ask(ollama.read_embedding), methods=["POST"]),
            Route("/api/tags", self._tags, methods=["GET"]),
            Route("/api/ps", self._ps, methods=["GET"]),
            Route("/api/show", self._show, methods=["POST"]),
            Route("/api/version", self._version, methods=["GET"]),
            Route("/queue/stats", self._queue.stats, methods=["GET"]),
            Route("/queue/requests/{id}", self._queue.show, methods=["GET"]),
            Route("/queue/requests/{id}", self._queue.cancel, methods=["DELETE"]),
            Route("/queue/requests/{id}/events", self._queue.events, methods=["GET"]),
            Route("/queue/live", self._watch.live, methods=["GET"]),
            Route("/queue/dead", self._letters.list_all, methods=["GET"]),
            Route("/queue/dead/{id}", self._letters.show, methods=["GET"]),
            Route("/queue/dead/{id}", self._letters.purge, methods=["DELETE"]),
            Route("/queue/dead/{id}/replay", self._letters.replay, methods=["POST"]),
            Route("/load", self._queue.load, methods=["GET"]),
            Route("/metrics", self._prometheus, methods=["GET"]),
            Route("/healthz", self._healthz, methods=["GET"]),
            Route("/readyz", self._readyz, methods=["GET"]),
            Route("/openapi.json", self._document, methods=["GET"]),
            *files.routes(),
        ]
        handlers = {HeadraceError: _refused, HTTPException: _not_served, ClientDisconnect: _gone, Exception: _failed}
        edge = Edge(Starlette(routes=routes, exception_handlers=handlers), self._config, self._metrics)
        return Pages(edge, self._config)

    async def drain(self, within_s: float) -> None:
        """Let answers come to their end; those that have not tell their readers where to read on. Requests go on."""
        await self._registry.drain(within_s)

    # ---- answers

    def _ask(self, read: Reader) -> Callable[[Request], object]:
        async def endpoint(request: Request) -> Response | Answering:
            limit = self._config.max_body_bytes
            body = await _body(request, limit=limit, within_s=self._config.http_stall_timeout_s)
            asked = read(body, limit, self._listed())
            state = request.state
            if isinstance(asked, ollama.Loaded):
                self._check_model(asked.model, embeds=asked.embeds)
                urgency(state.caller, state.headers, default=self._config.http_priority)
                return Response(asked.body(self._me.bus.clock.wall()), media_type="application/json")
            self._check_model(asked.request.wanted_model, embeds=isinstance(asked.request, EmbeddingRequest))
            load = self._me.peers.load("mlx")
            intake = take_in(
                state.caller,
                state.headers,
                asked,
                default=self._config.http_priority,
                saturated=load is not None and load.level == "saturated",
            )
            self._repeats.check(intake, asked.request, time.monotonic())
            if not intake.respond_async:
                return Answering(self._desk, asked, intake)
            record = await self._desk.submit(intake)
            await record.close()
            return _accepted(intake.outgoing.id)

        return endpoint

    def _check_model(self, wanted: str | None, *, embeds: bool) -> None:
        """Refuse a model that cannot be meant; where an engine may still say what it has, it is for the pipeline.

        Raises:
            HeadraceError: `model_internal` or `model_not_found`; `unsupported_parameter` to chat with what only embeds.
        """
        catalogue = self._catalogue()
        try:
            if embeds:
                catalogue.embedder(wanted or None)
            else:
                catalogue.engines_for(wanted or None)
        except HeadraceError as error:
            everybody_is_here = catalogue.mlx and (catalogue.ollama or catalogue.embedders)
            if error.code is not ErrorCode.MODEL_NOT_FOUND or everybody_is_here:
                raise

    # ---- models

    def _catalogue(self) -> Catalogue:
        """The models there are, looked up at most so often however many ask."""
        now = time.monotonic()
        if self._known_models is None or now - self._known_at > _MODELS_KEPT_S:
            self._known_models = self._me.peers.catalogue(self._config)
            self._known_at = now
        return self._known_models

    def _listed(self) -> list[str]:
        return self._catalogue().listed()

    def _known(self, name: str) -> str:
        """The name as it is listed; raises HeadraceError where it is not."""
        chosen, catalogue = spelled(name, self._listed()), self._catalogue()
        if not catalogue.only_embeds(chosen):
            catalogue.engines_for(chosen)
        return chosen

    async def _models(self, _: Request) -> Response:
        return json_response(openai.models(self._listed()))

    async def _model(self, request: Request) -> Response:
        return json_response(openai.model(self._known(request.path_params["id"])))

    async def _tags(self, _: Request) -> Response:
        return json_response(ollama.tags(self._listed(), since=self._since))

    async def _ps(self, _: Request) -> Response:
        peers = self._me.peers
        ready = {
            name
            for engine in ("mlx", "ollama")
            for worker in peers.workers(engine)
            if worker.state == "ready"
            for name in (*worker.models, *worker.embedding_models)
        }
        return json_response(ollama.ps(name for name in self._listed() if name in ready))

    async def _show(self, request: Request) -> Response:
        body = await _body(request, limit=1 << 16, within_s=self._config.http_stall_timeout_s)
        name = self._known(ollama.read_show(body))
        if self._catalogue().only_embeds(name):
            capabilities = ["embedding"]
        else:
            calls_tools = any(same_model(name, known) for known in self._me.peers.tool_models())
            capabilities = ["completion", "tools"] if calls_tools else ["completion"]
        return json_response(ollama.show(name, since=self._since, capabilities=capabilities))

    async def _version(self, _: Request) -> Response:
        return json_response({"version": ollama.API_VERSION})

    # ---- about itself

    async def _prometheus(self, _: Request) -> Response:
        text = self._metrics.text(await self._statistics.decoded(), open_responses=len(self._registry))
        return Response(text, headers={"content-type": CONTENT_TYPE})

    async def _healthz(self, _: Request) -> Response:
        return json_response({"status": "ok"})

    async def _readyz(self, _: Request) -> Response:
        peers = self._me.peers
        checks = {
            "broker": self._me.bus.is_connected,
            "monitor": await self._statistics.decoded() is not None,
            "engine": any(worker.state == "ready" for e in ("mlx", "ollama") for worker in peers.workers(e)),
        }
        ready = all(checks.values())
        return json_response({"status": "ready" if ready else "not ready", **checks}, 200 if ready else 503)

    async def _document(self, _: Request) -> Response:
        return json_response(document.openapi(with_keys=bool(self._config.http_keys)))


def _accepted(request_id: str) -> Response:
    url = f"/queue/requests/{request_id}"
    fields = {"object": "headrace.accepted", "id": request_id, "url": url, "events_url": events_url(request_id)}
    headers = {"location": url, "preference-applied": "respond-async", "x-request-id": request_id}
    return json_response(fields, 202, headers)


async def _body(request: Request, *, limit: int, within_s: float) -> bytes:
    """A request's body.

    Raises:
        HttpError: 413 where it is too large, 408 where it does not come in time, 415 where it is compressed.
    """
    if (coding := request.headers.get("content-encoding", "identity").lower()) != "identity":
        message = f"a body with the content-encoding {coding[:40]!r} is not read here: send it as it is"
        raise HttpError(415, ErrorCode.INVALID_REQUEST, message, param="Content-Encoding")
    length = request.headers.get("content-length", "")
    body, size = bytearray(), 0
    # A client that is still sending would see its connection break and not the answer, so what is too large is read
    # to its end and dropped, unless that has no end.
    patience = limit * _DROPPED_BODIES
    if not (length.isdecimal() and int(length) > patience):
        try:
            async with asyncio.timeout(within_s):
                async for part in request.stream():
                    size += len(part)
                    if size > patience:
                        break
                    if size <= limit:
                        body += part
        except TimeoutError:
            raise HttpError(408, ErrorCode.INVALID_REQUEST, f"the body did not come within {within_s:g} s") from None
        if size <= limit:
            return bytes(body)
    raise HttpError(413, ErrorCode.REQUEST_TOO_LARGE, f"at most {limit} bytes are accepted")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HeadraceError)  # noqa: S101 - registered for it
    return error_response(error, request.url.path)


async def _not_served(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for it
    message = f"{request.method} {request.url.path[:200]} is not served here: see /docs"
    response = error_response(HttpError(error.status_code, ErrorCode.INVALID_REQUEST, message), request.url.path)
    if error.status_code == 405:
        # Each method of a path has a route of its own, and the one that refused knows only its own.
        there = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
        response.headers["allow"] = ", ".join(sorted({method for route in there for method in route.methods}))
    return response


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _failed(request: Request, error: Exception) -> Response:
    message = f"the gateway has failed: {type(error).__name__}"
    return error_response(HttpError(500, ErrorCode.UNAVAILABLE, message), request.url.path)
