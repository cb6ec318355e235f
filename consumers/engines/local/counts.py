"""The prompts whose tokens the child process counts."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Final

from consumers.engines.local.protocol import Count, Counted, ToChild
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatRequest

# Longer than the longest prompt takes. A child that hangs is killed by its watchdog.
_PATIENCE_S: Final = 10.0


class Counts:
    """The open questions to one engine's child. One event loop; the writer is the `EngineProcess`."""

    def __init__(self) -> None:
        self._send: Callable[[ToChild], None] | None = None
        self._open: dict[int, asyncio.Future[int]] = {}
        self._numbers = itertools.count(1)

    def connect(self, send: Callable[[ToChild], None]) -> None:
        """A new child is ready. `send` gives it a frame."""
        self._send = send

    def disconnect(self) -> None:
        """The child has ended: its questions fail."""
        self._send = None
        for question in self._open.values():
            if not question.done():
                question.set_exception(_unavailable())

    async def count_tokens(self, request: ChatRequest) -> int:
        """As `TokenCounter.count_tokens`."""
        if self._send is None:
            raise _unavailable()
        key = next(self._numbers)
        question = self._open[key] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(_PATIENCE_S):
                self._send(Count(key, request))
                return await question
        except TimeoutError:
            raise _unavailable() from None
        finally:
            del self._open[key]

    def counted(self, frame: Counted) -> None:
        """The child has counted, or refused to."""
        question = self._open.get(frame.key)
        if question is None or question.done():
            return
        if frame.refusal is not None:
            question.set_exception(frame.refusal.error())
        else:
            question.set_result(frame.tokens)


def _unavailable() -> HeadraceError:
    return HeadraceError(ErrorCode.UNAVAILABLE, "The engine cannot count tokens now. Retry later.")
