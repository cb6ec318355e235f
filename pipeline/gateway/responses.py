"""Responses that live as long as their client: written while there is news, ended when it goes or the gateway stops."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from enum import StrEnum

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pipeline.gateway.dialects import ollama, openai
from pipeline.gateway.statuses import headers_of, status_of
from pipeline.wire.errors import HeadraceError
from pipeline.wire.messages import ErrorBody

JSON = "application/json"
SSE_HEADERS = {"content-type": openai.SSE, "cache-control": "no-store", "x-accel-buffering": "no"}
# So that what stands between keeps the connection, and a reader knows that somebody is there.
KEEP_ALIVE_S = 10.0
# Of the drain time, what is kept for telling those who still read that they must come back.
FAREWELL_S = 0.5


class End(StrEnum):
    """Why a response ends before it is complete."""

    GONE = "gone"
    STOPPING = "stopping"


class Registry:
    """The responses that are being sent. While it drains, those that have no end are ended as they come."""

    def __init__(self) -> None:
        self._open: set[Live] = set()
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._open)

    def add(self, response: Live) -> None:
        """One begins."""
        self._open.add(response)
        self._idle.clear()
        if self._draining and response.endless:
            asyncio.get_running_loop().call_soon(response.end, End.STOPPING)

    def remove(self, response: Live) -> None:
        """One has ended."""
        self._open.discard(response)
        if not self._open:
            self._idle.set()

    async def drain(self, within_s: float) -> None:
        """Let all come to their end; those that have not, for want of time or of an end, are ended."""
        self._draining = True
        for response in list(self._open):
            if response.endless:
                response.end(End.STOPPING)
        if not await self._idle_within(within_s - FAREWELL_S):
            for response in list(self._open):
                response.end(End.STOPPING)
            await self._idle_within(FAREWELL_S)

    async def _idle_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


class Live:
    """An ASGI response that `write` sends. When the client goes away, or `end` is called, `write` is cancelled.

    Subclasses say what is then to be done in `ended`. `registry` holds those that are being sent.

    Attributes:
        endless: whether it goes on for as long as the client likes, or may be read on elsewhere as well.
        begun: whether its head has been sent.
    """

    endless = False

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._task: asyncio.Task[None] | None = None
        self._why: End | None = None
        self.begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response; of its head alone, which Starlette has every GET answer, there is nothing to wait for."""
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
        """End the response. Once it is complete this does nothing; the first reason holds."""
        if self._task is not None and self._why is None:
            self._why = why
            self._task.cancel()

    async def write(self, send: Send) -> None:
        """Send all of it."""
        raise NotImplementedError

    async def ended(self, why: End, send: Send) -> None:
        """It was cut short; where the gateway is what ends, the client is told that there is no more."""
        if why is End.STOPPING:
            await (finish(send) if self.begun else send_whole(send, 503, b"{}", {"retry-after": "1"}))

    async def begin(self, send: Send, headers: Mapping[str, str]) -> None:
        """Begin the response, with status 200; the second time this does nothing."""
        if not self.begun:
            self.begun = True
            await start(send, 200, headers)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.end(End.GONE)


async def start(send: Send, status: int, headers: Mapping[str, str]) -> None:
    """Begin a response."""
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})


async def more(send: Send, data: bytes) -> None:
    """Go on with it."""
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def finish(send: Send, data: bytes = b"") -> None:
    """End it."""
    await send({"type": "http.response.body", "body": data})


async def send_whole(send: Send, status: int, body: bytes, headers: Mapping[str, str]) -> None:
    """A response in one piece."""
    await start(send, status, {"content-type": JSON, "content-length": str(len(body)), **headers})
    await finish(send, body)


def json_response(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response."""
    return Response(msgspec.json.encode(body), status, headers, JSON)


def error_response(error: HeadraceError, path: str) -> Response:
    """An error in the dialect of the path."""
    body = ErrorBody.of(error)
    text = ollama.error_body(body) if path.startswith("/api/") else openai.error_body(body)
    headers = headers_of(error)
    if status_of(error) == 401:
        headers["www-authenticate"] = "Bearer"
    if status_of(error) in (408, 413):
        headers["connection"] = "close"  # the rest of the body is not read
    return Response(text, status_of(error), headers, JSON)
