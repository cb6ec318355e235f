"""The stand-in's endpoints: one model that chats and one that embeds, Ollama's paths, bodies and statuses."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from consumers.standin.answers import Parallel, StandinAnswer
from consumers.standin.embedding import DIMENSIONS, EMBEDDER, count, embedding
from consumers.standin.wire import ApiError, decode, work_of
from pipeline.core.models import same_model
from pipeline.engine import Engine
from pipeline.wire.ollama import (
    NEVER,
    AssistantTurn,
    Body,
    ChatBody,
    EmbedBody,
    GenerateBody,
    Part,
    ShowBody,
    time_text,
)

VERSION = "0.0.0-headrace-standin"


class Server:
    """The endpoints in front of an engine.

    Args:
        engine: entered, and ready.
        name: the one model's name here.
        behind: the model's own name.
        parallel: how many requests run at once; the others wait.
        weights: the folder of the model's files, or None if it has none.
    """

    def __init__(self, engine: Engine, *, name: str, behind: str, parallel: int, weights: Path | None) -> None:
        self._engine = engine
        self._name = name
        self._parallel = Parallel(engine, parallel)
        can = ["completion", "tools"] if _calls_tools(weights) else ["completion"]
        self._entry = _entry(name, behind, weights, family="simulated" if engine.simulated else "headrace", can=can)
        self._embedder = _entry(EMBEDDER, "", None, family="headrace", can=["embedding"])

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
            f"{self._name}, and makes embeddings by {EMBEDDER}. Ollama itself is not running here."
        )

    async def _version(self, _: Request) -> Response:
        return _json({"version": VERSION})

    async def _tags(self, _: Request) -> Response:
        return _json({"models": [self._entry, self._embedder]})

    async def _ps(self, _: Request) -> Response:
        shown = ("name", "model", "size", "digest", "details")
        entries = [{key: entry[key] for key in shown} for entry in (self._entry, self._embedder)]
        return _json({"models": [entry | {"expires_at": NEVER, "size_vram": 0} for entry in entries]})

    async def _show(self, request: Request) -> Response:
        body = decode(await request.body(), ShowBody)
        entry = self._embedder if same_model(body.model or body.name, EMBEDDER) else self._entry
        if entry is self._entry:
            self._check_model(body.model or body.name)
        shown = {key: entry[key] for key in ("details", "capabilities", "modified_at")}
        about = {"general.architecture": entry["details"]["family"], "general.basename": entry["name"]}
        return _json(shown | {"modelfile": f"# {VERSION}\n", "parameters": "", "template": "", "model_info": about})

    async def _chat(self, request: Request) -> Response | StandinAnswer:
        body = decode(await request.body(), ChatBody)
        self._check_model(body.model)
        if not body.messages:
            message = AssistantTurn("assistant", "")
            return self._loaded(Part(model=body.model, created_at=time_text(time.time()), message=message, done=True))
        return self._answer(body, work_of(body, self._engine.resolve(None)), chat=True)

    async def _generate(self, request: Request) -> Response | StandinAnswer:
        body = decode(await request.body(), GenerateBody)
        self._check_model(body.model, may_be_missing=True)
        if not body.prompt:
            return self._loaded(Part(model=body.model, created_at=time_text(time.time()), response="", done=True))
        return self._answer(body, work_of(body, self._engine.resolve(None)), chat=False)

    async def _embed(self, request: Request) -> Response:
        began_ns = time.monotonic_ns()
        body = decode(await request.body(), EmbedBody)
        if same_model(body.model, self._name):
            raise ApiError(501, "this model does not support embeddings")
        self._check_model(body.model, EMBEDDER)
        texts = [body.input] if isinstance(body.input, str) else body.input or []
        dimensions = body.dimensions or DIMENSIONS
        if not 0 < dimensions <= DIMENSIONS:
            raise ApiError(400, f"dimensions must be 1 to {DIMENSIONS}")
        vectors = [embedding(text, dimensions) for text in texts if text]
        took_ns = time.monotonic_ns() - began_ns
        counts = {"total_duration": took_ns, "load_duration": 0, "prompt_eval_count": sum(map(count, texts))}
        return _json({"model": body.model, "embeddings": vectors, **counts})

    def _answer(self, body: Body, work: Any, *, chat: bool) -> StandinAnswer:
        return StandinAnswer(self._parallel, work, model=body.model, chat=chat, stream=body.stream is not False)

    def _loaded(self, part: Part) -> Response:
        """A request without a prompt loads the model. Here it is always loaded, whatever `keep_alive` is."""
        part.done_reason = "load"
        return _json(part)

    def _check_model(self, model: str, known: str = "", *, may_be_missing: bool = False) -> None:
        # At Ollama only `generate` treats a missing name as an unknown model.
        if not model and not may_be_missing:
            raise ApiError(400, "model is required")
        if not same_model(model, known or self._name):
            raise ApiError(404, f"model '{model}' not found")


def _entry(name: str, behind: str, weights: Path | None, *, family: str, can: list[str]) -> dict[str, Any]:
    """The model as `/api/tags` lists it. The digest is that of the list of its files."""
    files = sorted(path for path in weights.rglob("*") if path.is_file()) if weights else []
    listing = "\n".join(f"{path.name} {path.stat().st_size}" for path in files) or name
    modified = max((path.stat().st_mtime for path in files), default=time.time())
    full = name if ":" in name else f"{name}:latest"
    return {
        "name": full,
        "model": full,
        "modified_at": time_text(modified),
        "size": sum(path.stat().st_size for path in files),
        "digest": hashlib.sha256(listing.encode()).hexdigest(),
        "details": {
            "parent_model": behind,
            "format": "safetensors" if files else "",
            "family": family,
            "families": [family],
            "parameter_size": "",
            "quantization_level": "",
        },
        "capabilities": can,
    }


def _calls_tools(weights: Path | None) -> bool:
    """Whether the model's chat template, a file of its own or part of the tokenizer's, has a form for tool calls."""
    places = [weights / name for name in ("chat_template.jinja", "tokenizer_config.json")] if weights else []
    return any("<tool_call>" in place.read_text() for place in places if place.is_file())


def _json(body: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json; charset=utf-8")


async def _refusal(_: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    return _json({"error": error.message}, error.status)
