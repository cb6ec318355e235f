"""What calls to model servers over HTTP share: lines of streams, waiting for the first part, errors of connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import httpx

from consumers.engines.server.errors import BadAnswer, ServerError

_T = TypeVar("_T")

CONNECT_TIMEOUT_S = 5.0
# The longest line of a streamed answer, bytes. A server that sends more without an end would fill the memory.
LONGEST_LINE = 64 * 1024 * 1024
# A server that takes no call now: the same one can succeed later. A proxy says 502 and 504 as well where the server
# behind it broke or took too long over this very call: a failure. Its list of models shows whether it is away.
RETRY_LATER = frozenset({408, 425, 429, 503})
LOOK_TIMEOUT_S = 3.0
# While an answer has not begun, the server is asked this many times in each `idle_s` whether it is there.
_LOOKS = 3


class Patience:
    """How long a call may take to begin, and a part of its answer to come.

    Args:
        idle_s: the longest silence in an answer. Before its first part, the longest time for which the server answers
            no other call either.
        load_s: the longest time before the first part, in which the server may load the model.
        is_there: asks whether the server answers another call.
    """

    def __init__(self, idle_s: float, load_s: float, is_there: Callable[[], Awaitable[bool]]) -> None:
        self.idle_s = idle_s
        self._load_s = load_s
        self._is_there = is_there

    async def begun(self, call: Coroutine[Any, Any, _T]) -> _T:
        """Wait for the beginning of an answer, which can take minutes while the server loads the model.

        Raises:
            ServerError: the server answered no other call for `idle_s`, or `load_s` has passed.
        """
        loop = asyncio.get_running_loop()
        last = loop.time() + self._load_s
        try:
            async with asyncio.timeout_at(min(loop.time() + self.idle_s, last)) as bound:
                looking = asyncio.create_task(self._prolong(bound, last))
                try:
                    return await call
                finally:
                    looking.cancel()
        except TimeoutError:
            waited_s = self._load_s if loop.time() >= last else self.idle_s
            raise ServerError(f"no answer in time: it did not begin within {waited_s:g} s") from None

    async def parts(self, parts: AsyncGenerator[_T, None]) -> AsyncGenerator[_T, None]:
        """The parts of a streamed answer, each within the time that it may take.

        Raises:
            ServerError, TimeoutError: a part did not come in time.
        """
        part = await self.begun(_next(parts))
        while part is not None:
            yield part
            async with asyncio.timeout(self.idle_s):
                part = await _next(parts)

    async def _prolong(self, bound: asyncio.Timeout, last: float) -> None:
        """Move `bound` while the server answers other calls; to `last` at most (the event loop's time)."""
        loop = asyncio.get_running_loop()
        while not bound.expired():
            await asyncio.sleep(self.idle_s / _LOOKS)
            if await self._is_there() and not bound.expired():
                bound.reschedule(min(loop.time() + self.idle_s, last))


async def lines(data: AsyncIterator[bytes], *, sender: str) -> AsyncGenerator[bytes, None]:
    """The lines of a body, without empty ones.

    httpx's own `aiter_lines` also ends lines at U+2028 and other characters that a text may contain.

    Raises:
        BadAnswer: a line of more than `LONGEST_LINE` from the sender.
    """
    pieces: list[bytes] = []
    size = 0
    async for read in data:
        *ended, rest = read.split(b"\n")
        for line in ended:
            whole = b"".join([*pieces, line]).strip()
            pieces, size = [], 0
            if whole:
                yield whole
        pieces.append(rest)
        size += len(rest)
        if size > LONGEST_LINE:
            raise BadAnswer(f"{sender} sent a line of more than {LONGEST_LINE} bytes.")
    if whole := b"".join(pieces).strip():
        yield whole


async def _next(parts: AsyncGenerator[_T, None]) -> _T | None:
    return await anext(parts, None)


def translated(error: Exception, *, kind: str) -> ServerError:
    """The error of a call, from what httpx or the reader of the answer raised.

    Args:
        error: what was raised.
        kind: whose answers these should be: `Ollama's`.
    """
    if isinstance(error, ServerError):
        return error
    # For a refused connection the client of Ollama raises Python's ConnectionError.
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | ConnectionError):
        return ServerError(f"the connection failed: {str(error) or type(error).__name__}", away=True)
    if isinstance(error, httpx.TimeoutException | TimeoutError):
        return ServerError("no answer in time: nothing was sent for too long")
    if isinstance(error, httpx.TransportError | OSError):
        return ServerError(f"the connection broke: {str(error) or type(error).__name__}")
    if isinstance(error, BadAnswer):
        return ServerError(str(error))
    return ServerError(f"the answer is not {kind} ({type(error).__name__}: {str(error)[:200]})")
