"""One answer of llama.cpp: a task reads it, the caller takes it piece by piece."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx

from consumers.engines.llamacpp.wire import EventReader, refusal
from pipeline.engine import Misbehaved, Piece
from pipeline.wire.errors import HeadraceError

log = logging.getLogger(__name__)


class LlamaGeneration:
    """A running request. Only its task reads the stream, so that cancelling `next` loses nothing.

    Args:
        request_id: the request's id.
        http: the connection to the server.
        path, body: of the call.
        ended: called once, at the end.
    """

    def __init__(
        self, request_id: str, http: httpx.AsyncClient, path: str, body: dict[str, Any], *, ended: Callable[[], None]
    ) -> None:
        self._reader = EventReader(request_id)
        self._http = http
        self._path = path
        self._body = body
        self._news: asyncio.Queue[Piece | HeadraceError] = asyncio.Queue()
        self._task = asyncio.create_task(self._read(), name=f"llamacpp-{request_id}")
        # A callback, because a task that is cancelled before its first step runs no `finally`.
        self._task.add_done_callback(lambda _: ended())

    async def next(self) -> Piece:
        """As `Generation.next`."""
        news = await self._news.get()
        if isinstance(news, HeadraceError):
            raise news
        return news

    async def close(self) -> None:
        """Disconnect, which stops the server after the step that it computes. Does nothing the second time."""
        if not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _read(self) -> None:
        try:
            async for line in self._lines():
                piece = self._reader.read(line)
                if piece is None:
                    continue
                self._news.put_nowait(piece)
                if piece.finish_reason is not None:
                    return
            self._news.put_nowait(Misbehaved("llama.cpp ended the answer too early."))
        except HeadraceError as error:
            self._news.put_nowait(error)
        except httpx.HTTPError as error:
            self._news.put_nowait(Misbehaved(f"llama.cpp does not answer ({type(error).__name__}: {error})."))
        except Exception as error:
            log.exception("An answer of llama.cpp could not be read.")
            self._news.put_nowait(Misbehaved(f"llama.cpp cannot be read ({type(error).__name__}: {error})."))

    async def _lines(self) -> AsyncIterator[bytes]:
        async with self._http.stream("POST", self._path, json=self._body) as response:
            if response.status_code != httpx.codes.OK:
                raise refusal(await response.aread())
            rest = b""
            # Not `aiter_lines`, which also splits at the line separators of Unicode, inside a text.
            async for data in response.aiter_bytes():
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    yield line
