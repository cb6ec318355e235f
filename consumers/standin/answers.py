"""One answer of the stand-in, from the model's pieces to lines of JSON. A client that hangs up cancels it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Protocol

import msgspec
from starlette.types import Receive, Scope, Send

from consumers.standin.wire import ApiError, api_error
from pipeline.engine import Generation, Piece, Work
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.ollama import AssistantTurn, OllamaCall, Part, WholeCalls, time_text

_JSON = (b"content-type", b"application/json; charset=utf-8")
_NDJSON = (b"content-type", b"application/x-ndjson")


class Generator(Protocol):
    """What the stand-in needs of an engine."""

    simulated: bool

    async def submit(self, work: Work) -> Generation:
        """As `Engine.submit`."""
        ...


class Parallel:
    """Runs a fixed number of requests at once, as Ollama's parallel setting does. The others wait in order."""

    def __init__(self, engine: Generator, parallel: int) -> None:
        self.engine = engine
        self._free = asyncio.Semaphore(parallel)

    async def pieces(self, work: Work, phases: Phases) -> AsyncGenerator[Piece, None]:
        """The answer's pieces. Closing takes the request out of the engine and lets the next one begin.

        Raises:
            HeadraceError: as the engine.
        """
        async with self._free:
            phases.begun = time.monotonic_ns()
            try:
                async with aclosing(self._pieces(work, phases)) as pieces:
                    async for piece in pieces:
                        yield piece
            except HeadraceError as error:
                # An engine may refuse a limit beyond the context. At Ollama the answer ends with the context.
                too_long = error.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED and error.param == "max_tokens"
                if not too_long or phases.first:
                    raise
                unlimited = msgspec.structs.replace(work.request, max_tokens=None)
                retry = msgspec.structs.replace(work, request=unlimited)
                async with aclosing(self._pieces(retry, phases)) as pieces:
                    async for piece in pieces:
                        yield piece

    async def _pieces(self, work: Work, phases: Phases) -> AsyncGenerator[Piece, None]:
        generation = await self.engine.submit(work)
        try:
            while True:
                piece = await generation.next()
                if piece != Piece():
                    phases.first = phases.first or time.monotonic_ns()
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            await generation.close()


class Phases:
    """When the phases of an answer began, in monotonic nanoseconds; 0 before they begin."""

    def __init__(self) -> None:
        self.arrived = time.monotonic_ns()
        self.begun = 0
        self.first = 0


class StandinAnswer:
    """An ASGI response that is generated while it is sent.

    Args:
        parallel: runs the request.
        work: what to generate.
        model: the model's name as the client wrote it.
        chat: whether parts have a `message` (chat) or a `response` (generate).
        stream: whether parts are sent as they come, or as one at the end.
    """

    def __init__(self, parallel: Parallel, work: Work, *, model: str, chat: bool, stream: bool) -> None:
        self._parallel = parallel
        self._work = work
        self._model = model
        self._chat = chat
        self._stream = stream
        self._phases = Phases()
        self._started = False
        self._calls = WholeCalls()

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer. Stop when the client hangs up."""
        async with asyncio.TaskGroup() as group:
            answering = group.create_task(self._answer(send))
            watching = group.create_task(_hung_up(receive))
            done, _ = await asyncio.wait((answering, watching), return_when=asyncio.FIRST_COMPLETED)
            for task in {answering, watching} - done:
                task.cancel()

    async def _answer(self, send: Send) -> None:
        try:
            if self._stream:
                await self._send_parts(send)
            else:
                await self._send_whole(send)
        except HeadraceError as error:
            await self._send_error(send, api_error(error, self._model))

    async def _send_parts(self, send: Send) -> None:
        async with aclosing(self._parallel.pieces(self._work, self._phases)) as pieces:
            async for piece in pieces:
                # An engine that reads a long prompt shows with empty pieces that it is alive. Clients ignore the line.
                calls = self._calls.take(piece.tool_calls, ended=piece.finish_reason is not None)
                if piece.text or piece.reasoning or calls or piece.scores or piece == Piece():
                    await self._send_line(send, self._part(piece, calls))
                if piece.finish_reason is not None:
                    await self._send_line(send, self._last(Piece(), piece))
        await send({"type": "http.response.body", "body": b""})

    async def _send_whole(self, send: Send) -> None:
        whole, last = Piece(), Piece()
        async with aclosing(self._parallel.pieces(self._work, self._phases)) as pieces:
            async for last in pieces:
                whole.text += last.text
                whole.reasoning += last.reasoning
                whole.tool_calls += last.tool_calls
                whole.scores += last.scores
        calls = self._calls.take(whole.tool_calls, ended=True)
        await send_json(send, 200, msgspec.json.encode(self._last(whole, last, calls)))

    async def _send_line(self, send: Send, part: Part) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": [_NDJSON]})
        line = msgspec.json.encode(part) + b"\n"
        await send({"type": "http.response.body", "body": line, "more_body": True})

    async def _send_error(self, send: Send, error: ApiError) -> None:
        body = msgspec.json.encode({"error": error.message})
        if self._started:
            await send({"type": "http.response.body", "body": body + b"\n"})
        else:
            await send_json(send, error.status, body)

    def _part(self, piece: Piece, calls: Sequence[OllamaCall] = ()) -> Part:
        part = Part(model=self._model, created_at=time_text(time.time()), logprobs=piece.scores, done=False)
        if self._chat:
            part.message = AssistantTurn("assistant", piece.text, list(calls) or None, piece.reasoning)
        else:
            part.response, part.thinking = piece.text, piece.reasoning
        return part

    def _last(self, whole: Piece, piece: Piece, calls: Sequence[OllamaCall] = ()) -> Part:
        """The last part: `piece` ended the answer, and `whole` is what it still has to show."""
        now = time.monotonic_ns()
        part = self._part(whole, calls)
        part.done = True
        part.done_reason = "length" if piece.finish_reason == "length" else "stop"
        part.total_duration = now - self._phases.arrived
        part.load_duration = self._phases.begun - self._phases.arrived
        part.prompt_eval_duration = self._phases.first - self._phases.begun
        part.eval_duration = now - self._phases.first
        if piece.usage is not None:
            part.prompt_eval_count = piece.usage.prompt_tokens
            part.eval_count = piece.usage.completion_tokens
        return part


async def send_json(send: Send, status: int, body: bytes) -> None:
    """A whole JSON response."""
    headers = [_JSON, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
