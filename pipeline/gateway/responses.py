"""Responses that are written over time, and that end when the client disconnects or the gateway stops."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from enum import StrEnum

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pipeline.aio import wait_set
from pipeline.gateway.dialects import anthropic, ollama, openai
from pipeline.gateway.statuses import headers_of, status_of
from pipeline.wire.answers import ErrorBody
from pipeline.wire.errors import HeadraceError

JSON = "application/json"
SSE_HEADERS = {"content-type": openai.SSE, "cache-control": "no-store", "x-accel-buffering": "no"}
# A message at least this often keeps proxies from closing the connection, and tells the client that it is alive.
KEEP_ALIVE_S = 10.0
# The part of the drain time that is kept for telling clients where to read on.
FAREWELL_S = 0.5


class End(StrEnum):
    """Why a response ends before it is complete: the client is gone, or the gateway stops."""

    GONE = "gone"
    STOPPING = "stopping"


class Registry:
    """The open responses. While the gateway drains, endless ones are ended as they begin."""

    def __init__(self) -> None:
        self._open: set[Live] = set()
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._open)

    def add(self, response: Live) -> None:
        """A response begins."""
        self._open.add(response)
        self._idle.clear()
        if self._draining and response.endless:
            asyncio.get_running_loop().call_soon(response.end, End.STOPPING)

    def remove(self, response: Live) -> None:
        """A response has ended."""
        self._open.discard(response)
        if not self._open:
            self._idle.set()

    async def drain(self, within_s: float) -> None:
        """Let responses finish. End the endless ones at once, and the others when the time is up."""
        self._draining = True
        for response in list(self._open):
            if response.endless:
                response.end(End.STOPPING)
        if not await self._idle_within(within_s - FAREWELL_S):
            for response in list(self._open):
                response.end(End.STOPPING)
            await self._idle_within(FAREWELL_S)

    async def _idle_within(self, seconds: float) -> bool:
        return await wait_set(self._idle, max(0.0, seconds))


class Live:
    """An ASGI response that `write` sends. If the client disconnects, or `end` is called, `write` is cancelled and
    `ended` runs. `registry` holds the open responses.

    Attributes:
        endless: whether it lasts until the client disconnects, or the client can read the rest elsewhere.
        begun: whether its head has been sent.
    """

    endless = False

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._task: asyncio.Task[None] | None = None
        self._why: End | None = None
        self.begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response. A HEAD request, which Starlette routes like a GET, gets the head at once."""
        if scope["method"] == "HEAD":
            await self.begin(send, SSE_HEADERS)
            await finish(send)
            return
        self._task = task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine runs in a task
        watcher = asyncio.get_running_loop().create_task(self._watch(receive))
        self._registry.add(self)
        try:
            await self.write(send)
            self._task = None
        except asyncio.CancelledError:
            self._task = None
            if self._why is None:
                raise
            task.uncancel()
            await self.ended(self._why, send)
        finally:
            self._registry.remove(self)
            watcher.cancel()

    def end(self, why: End) -> None:
        """End the response. The first reason counts. Does nothing once the response is complete."""
        if self._task is not None and self._why is None:
            self._why = why
            self._task.cancel()

    async def write(self, send: Send) -> None:
        """Send the response."""
        raise NotImplementedError

    async def ended(self, why: End, send: Send) -> None:
        """Called after `write` was cut short. If the gateway stops, the response is closed properly."""
        if why is End.STOPPING:
            await (finish(send) if self.begun else send_whole(send, 503, b"{}", {"retry-after": "1"}))

    async def begin(self, send: Send, headers: Mapping[str, str]) -> None:
        """Send the head with status 200. Does nothing the second time."""
        if not self.begun:
            self.begun = True
            await start(send, 200, headers)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.end(End.GONE)


async def start(send: Send, status: int, headers: Mapping[str, str]) -> None:
    """Send the head of a response."""
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})


async def more(send: Send, data: bytes) -> None:
    """Send a part of the body."""
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def finish(send: Send, data: bytes = b"") -> None:
    """Send the last part of the body."""
    await send({"type": "http.response.body", "body": data})


async def send_whole(send: Send, status: int, body: bytes, headers: Mapping[str, str]) -> None:
    """Send a whole response."""
    await start(send, status, {"content-type": JSON, "content-length": str(len(body)), **headers})
    await finish(send, body)


def json_response(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response."""
    return Response(msgspec.json.encode(body), status, headers, JSON)


def error_response(error: HeadraceError, path: str) -> Response:
    """An error response in the dialect of the path."""
    body = ErrorBody.of(error)
    if path.startswith("/v1/messages"):
        text = anthropic.error_body(body, status=status_of(error))
    else:
        text = ollama.error_body(body) if path.startswith("/api/") else openai.error_body(body)
    headers = headers_of(error)
    if status_of(error) == 401:
        headers["www-authenticate"] = "Bearer"
    if status_of(error) in (408, 413):
        headers["connection"] = "close"  # the rest of the body stays unread
    return Response(text, status_of(error), headers, JSON)
