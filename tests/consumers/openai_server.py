"""A small HTTP server with OpenAI's paths that misbehaves to order."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from tests.consumers.ollama_server import Connection, Handler, refuse


def event(**fields: Any) -> bytes:
    """An event of a stream."""
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def said(text: str, finish_reason: str | None = None, **delta: Any) -> bytes:
    """An event with a text."""
    delta = ({"content": text} if text else {}) | delta
    return event(choices=[{"index": 0, "delta": delta, "finish_reason": finish_reason}])


def counted(prompt: int, answer: int, **details: Any) -> bytes:
    """The event with the counts."""
    usage = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer} | details
    return event(choices=[], usage=usage)


DONE = b"data: [DONE]\n\n"


class OpenAIServer:
    """Answers `/v1/models` with its models, or as `lists` says. A handler that a test may change at any time has the
    rest.
    """

    def __init__(self) -> None:
        self.models: list[dict[str, Any]] = [{"id": "good"}]
        self.lists: Handler | None = None
        self.chat: Handler = refuse
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            length = head.lower().partition("content-length: ")[2].partition("\r\n")[0]
            connection = Connection(head.split()[1], await reader.readexactly(int(length or 0)), writer)
            if connection.path != "/v1/models":
                self.bodies.append(json.loads(connection.body))
                await self.chat(connection)
            elif self.lists is not None:
                await self.lists(connection)
            else:
                await connection.answer({"object": "list", "data": self.models})
        writer.close()


@contextlib.asynccontextmanager
async def openai_server() -> AsyncIterator[OpenAIServer]:
    double = OpenAIServer()
    server = await asyncio.start_server(double.serve, "127.0.0.1", 0)
    double.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield double
        server.close()
