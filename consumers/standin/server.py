"""The stand-in's endpoints in front of one engine: Ollama's paths, bodies and statuses."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from consumers.standin.answers import Generator, Parallel, StandinAnswer
from consumers.standin.embedding import DIMENSIONS, count, embedding
from consumers.standin.shown import FEATURE_HASHING, Shown
from consumers.standin.wire import ApiError, decode, work_of
from pipeline.core.models import same_model
from pipeline.engine import Work
from pipeline.wire.ollama import AssistantTurn, Body, ChatBody, EmbedBody, GenerateBody, Part, ShowBody, time_text

VERSION = "0.0.0-headrace-standin"


class Server:
    """The endpoints in front of an engine.

    Args:
        engine: entered, and ready.
        model: the model that chats.
        behind: what runs the model, for people.
        parallel: how many requests run at once; the others wait.
        internal: the same weights under the name that the pipeline's own work uses. It runs and is not listed.
        hashes: whether embeddings are made, by feature hashing.
    """

    def __init__(
        self,
        engine: Generator,
        *,
        model: Shown,
        behind: str,
        parallel: int,
        internal: Shown | None = None,
        hashes: bool = False,
    ) -> None:
        self._parallel = Parallel(engine, parallel)
        self._model = model
        self._behind = behind
        self._embedder = FEATURE_HASHING if hashes else None
        self._listed = [model, *filter(None, [self._embedder])]
        self._chatting = [model, *filter(None, [internal])]

    def app(self) -> Starlette:
        """The server as an ASGI application."""
        routes = [
            Route("/", self._about, methods=["GET"]),
            Route("/api/version", self._version, methods=["GET"]),
            Route("/api/tags", self._tags, methods=["GET"]),
            Route("/api/ps", self._ps, methods=["GET"]),
            Route("/api/show", self._show, methods=["POST"]),
            Route("/api/chat", self._chat, methods=["POST"]),
            Route("/api/generate", self._generate, methods=["POST"]),
            Route("/api/embed", self._embed, methods=["POST"]),
        ]
        return Starlette(routes=routes, exception_handlers={ApiError: _refusal})

    async def _about(self, _: Request) -> Response:
        return PlainTextResponse(
            "This is headrace's stand-in for Ollama: it speaks Ollama's protocol in front of one model, "
            f"{self._model.name}, on {self._behind}. Ollama itself is not running here."
        )

    async def _version(self, _: Request) -> Response:
        return _json({"version": VERSION})

    async def _tags(self, _: Request) -> Response:
        return _json({"models": [shown.tag() for shown in self._listed]})

    async def _ps(self, _: Request) -> Response:
        running = [*self._chatting, *filter(None, [self._embedder])]
        return _json({"models": [shown.running() for shown in running]})

    async def _show(self, request: Request) -> Response:
        body = decode(await request.body(), ShowBody)
        return _json(self._known(body.model, self._listed).about(VERSION))

    async def _chat(self, request: Request) -> Response | StandinAnswer:
        body = decode(await request.body(), ChatBody)
        shown = self._known(body.model, self._chatting)
        if not body.messages:
            message = AssistantTurn("assistant", "")
            return self._loaded(Part(model=body.model, created_at=time_text(time.time()), message=message, done=True))
        return self._answer(body, work_of(body, shown.name), chat=True)

    async def _generate(self, request: Request) -> Response | StandinAnswer:
        body = decode(await request.body(), GenerateBody)
        shown = self._known(body.model, self._chatting, may_be_missing=True)
        if not body.prompt:
            return self._loaded(Part(model=body.model, created_at=time_text(time.time()), response="", done=True))
        return self._answer(body, work_of(body, shown.name), chat=False)

    async def _embed(self, request: Request) -> Response:
        began_ns = time.monotonic_ns()
        body = decode(await request.body(), EmbedBody)
        if self._known(body.model, [*self._chatting, *self._listed]) is not self._embedder:
            raise ApiError(501, "this model does not support embeddings")
        texts = [body.input] if isinstance(body.input, str) else body.input or []
        dimensions = DIMENSIONS if body.dimensions is None else int(body.dimensions)
        if not 0 < dimensions <= DIMENSIONS:
            raise ApiError(400, f"dimensions must be 1 to {DIMENSIONS}")
        vectors = [embedding(text, dimensions) for text in texts if text]
        took_ns = time.monotonic_ns() - began_ns
        counts = {"total_duration": took_ns, "load_duration": 0, "prompt_eval_count": sum(map(count, texts))}
        return _json({"model": body.model, "embeddings": vectors, **counts})

    def _answer(self, body: Body, work: Work, *, chat: bool) -> StandinAnswer:
        return StandinAnswer(self._parallel, work, model=body.model, chat=chat, stream=body.stream is not False)

    def _loaded(self, part: Part) -> Response:
        """A request without a prompt loads the model. Here it is always loaded, whatever `keep_alive` is."""
        part.done_reason = "load"
        return _json(part)

    def _known(self, name: str, among: list[Shown], *, may_be_missing: bool = False) -> Shown:
        # At Ollama only `generate` treats a missing name as an unknown model.
        if not name and not may_be_missing:
            raise ApiError(400, "model is required")
        for shown in among:
            if same_model(name, shown.name):
                return shown
        raise ApiError(404, f"model '{name}' not found")


def _json(body: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json; charset=utf-8")


async def _refusal(_: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    return _json({"error": error.message}, error.status)
