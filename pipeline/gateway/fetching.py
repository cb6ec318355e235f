"""`POST /api/pull`: a worker fetches a model that is not here. With API keys, for operators only."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from pipeline.broker.connection import BusError
from pipeline.broker.fetching import WorkerFetch
from pipeline.config import Config
from pipeline.gateway.bodies import read_body
from pipeline.gateway.dialects import ollama, openai
from pipeline.gateway.models import Models
from pipeline.gateway.operating import operator_of
from pipeline.gateway.responses import KEEP_ALIVE_S, End, Live, Registry, finish, more, send_whole
from pipeline.gateway.statuses import error_of, headers_of, status_of
from pipeline.process.role import Role
from pipeline.wire.answers import ErrorBody
from pipeline.wire.errors import ErrorCode, HeadraceError, quoted
from pipeline.wire.fetches import FetchReport, FetchStep

_MAX_BODY_BYTES = 1 << 16
_HEADERS = {"content-type": ollama.NDJSON, "cache-control": "no-store", "x-accel-buffering": "no"}
# A model that a worker has just got is in its next status: it is looked for so often, and so many seconds apart.
_LOOKS, _LOOK_EVERY_S = 100, 0.05


@dataclass(slots=True)
class ModelFetches:
    """The handler of the endpoint.

    Args:
        me: the role.
        config: the settings.
        models: the models that clients can name.
        registry: holds the open responses.
    """

    me: Role
    config: Config
    models: Models
    registry: Registry

    async def pull(self, request: Request) -> Response | PullResponse:
        """`POST /api/pull`."""
        body = await read_body(request, limit=_MAX_BODY_BYTES, within_s=self.config.http_stall_timeout_s)
        name, stream = ollama.read_pull(body)
        if self.models.has(name):
            done = ollama.PULLED_BEFORE if stream else ollama.PULLED
            return Response(done, media_type=ollama.NDJSON if stream else openai.JSON)
        operator_of(request)
        fetch, first = await self._begun(name)
        return PullResponse(self.registry, fetch, first, self.models, stream=stream)

    async def _begun(self, name: str) -> tuple[WorkerFetch, FetchReport]:
        """The fetch by the first worker that takes it: MLX's, and then Ollama's."""
        known = [*self.me.peers.workers("mlx"), *self.me.peers.workers("ollama")]
        # In one order for all callers, so that they share a fetch.
        known.sort(key=lambda status: (status.engine, status.worker))
        refusals, away = list[HeadraceError](), not known
        for status in known:
            if not status.fetches or status.state == "draining":
                continue
            fetch = WorkerFetch(self.me.bus, status.worker, name)
            try:
                said = await fetch.ask()
            except BusError:
                away = True
                continue
            if isinstance(said, FetchReport):
                return fetch, said
            refusals.append(error_of(said.error))
        raise _refusal(name, refusals, away=away)


def _refusal(name: str, refusals: list[HeadraceError], *, away: bool) -> HeadraceError:
    """Why no worker fetches a model. `away`: one that might does not answer."""
    for refusal in refusals:
        if refusal.code is not ErrorCode.MODEL_NOT_FOUND:
            return refusal
    if away:
        message = (
            f"Model {quoted(name)} is not stored here, and a worker that may fetch it does not answer. Retry later."
        )
        return HeadraceError(ErrorCode.UNAVAILABLE, message)
    if refusals:
        return HeadraceError(ErrorCode.MODEL_NOT_FOUND, refusals[0].message, param="model")
    message = (
        f"Model {quoted(name)} is not stored here, and no worker can fetch models. Run `headrace pull {name}` on the "
        "engine's machine, and start its worker with --model."
    )
    return HeadraceError(ErrorCode.MODEL_NOT_FOUND, message, param="model")


class PullResponse(Live):
    """The progress of a fetch in lines of JSON, or its end alone.

    Args:
        registry: holds the open responses.
        fetch: the fetch.
        first: its first report.
        models: the models that clients can name.
        stream: whether the client wants the progress.
    """

    # It can take an hour, and a client that pulls again goes on from there.
    endless = True

    def __init__(
        self, registry: Registry, fetch: WorkerFetch, first: FetchReport, models: Models, *, stream: bool
    ) -> None:
        super().__init__(registry)
        self._fetch = fetch
        self._first = first
        self._models = models
        self._stream = stream
        self._line = b""
        self._line_at = 0.0

    async def write(self, send: Send) -> None:
        """Send the progress as it comes, and how the fetch ended."""
        try:
            async with self._fetch:
                last = await self._followed(send)
            if last.error is not None:
                raise error_of(last.error)
            if last.served:
                await self._until_listed(last.served)
        except HeadraceError as error:
            await self._fail(error, send)
            return
        if self._stream:
            await finish(send, ollama.PULLED + b"\n")
        else:
            await send_whole(send, 200, ollama.PULLED, {})

    async def _followed(self, send: Send) -> FetchReport:
        """Show the progress. Returns the last report."""
        last = self._first
        await self._show(last.steps, send)
        async with aclosing(self._fetch.reports()) as reports:
            async for last in reports:
                await self._show(last.steps, send)
        return last

    async def _show(self, steps: list[FetchStep], send: Send) -> None:
        """Send steps; where nothing has changed for a while, the last one again."""
        if not self._stream:
            return
        await self.begin(send, _HEADERS)
        lines, now = [ollama.pull_line(step) for step in steps], asyncio.get_running_loop().time()
        if not lines and self._line and now - self._line_at > KEEP_ALIVE_S:
            lines = [self._line]
        for line in lines:
            self._line, self._line_at = line, now
            await more(send, line)

    async def _fail(self, error: HeadraceError, send: Send) -> None:
        body = ollama.error_body(ErrorBody.of(error))
        if self.begun:
            await finish(send, body + b"\n")
        else:
            await send_whole(send, status_of(error), body, headers_of(error))

    async def _until_listed(self, name: str) -> None:
        """Wait until the gateway knows the model: the client's next call names it."""
        for _ in range(_LOOKS):
            if self._models.has(name):
                return
            await asyncio.sleep(_LOOK_EVERY_S)

    async def ended(self, why: End, send: Send) -> None:
        """The gateway stops, or the client is gone."""
        if why is End.STOPPING:
            message = "The gateway is stopping. Pull again."
            await self._fail(HeadraceError(ErrorCode.UNAVAILABLE, message), send)
