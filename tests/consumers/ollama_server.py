"""A small HTTP server with Ollama's paths that misbehaves to order."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any


class Connection:
    """One request, and the way back."""

    def __init__(self, path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        self.path = path
        self.body = body
        self._writer = writer

    async def answer(self, body: Any, status: int = 200, headers: bytes = b"") -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = b"HTTP/1.1 %d X\r\ncontent-length: %d\r\nconnection: close\r\n" % (status, len(data))
        self._writer.write(head + headers + b"\r\n" + data)
        await self._writer.drain()

    async def lines(self, *lines: Any) -> None:
        """The beginning of a streamed answer."""
        self._writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n")
        await self.lines_more(*lines)

    async def lines_more(self, *lines: Any) -> None:
        """More of a streamed answer."""
        for line in lines:
            data = line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n"
            self._writer.write(b"%x\r\n%s\r\n" % (len(data), data))
        await self._writer.drain()

    async def end(self) -> None:
        """The end of a streamed answer; without it the answer breaks off."""
        self._writer.write(b"0\r\n\r\n")
        await self._writer.drain()


Handler = Callable[[Connection], Awaitable[None]]


class OllamaServer:
    """Answers `/api/tags`, `/api/ps` and `/api/show` with its models. A handler that a test may change at any time has
    the rest.
    """

    def __init__(self) -> None:
        self.models: list[dict[str, Any]] = [{"name": "good:latest"}]
        self.loaded: list[dict[str, Any]] = []
        self.shown: dict[str, dict[str, Any]] = {}
        self.shows: list[str] = []
        self.chat: Handler = refuse
        self.bodies: list[dict[str, Any]] = []
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = head.partition("content-length: ")[2].partition("\r\n")[0]
            body = await reader.readexactly(int(length or 0))
            connection = Connection(head.split()[1], body, writer)
            if connection.path == "/api/tags":
                await connection.answer({"models": self.models})
            elif connection.path == "/api/ps":
                await connection.answer({"models": self.loaded})
            elif connection.path == "/api/show":
                self.shows.append(name := json.loads(body)["model"])
                await connection.answer(*((self.shown[name],) if name in self.shown else ({"error": "unknown"}, 404)))
            else:
                self.bodies.append(json.loads(body))
                await self.chat(connection)
        writer.close()


async def refuse(connection: Connection) -> None:
    await connection.answer({"error": "the test has set no handler"}, 400)


@contextlib.asynccontextmanager
async def ollama_server() -> AsyncIterator[OllamaServer]:
    ollama = OllamaServer()
    server = await asyncio.start_server(ollama.serve, "127.0.0.1", 0)
    ollama.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield ollama
        server.close()
