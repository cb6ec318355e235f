"""One answer of a model server: a task reads it, the worker takes it piece by piece."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

from consumers.engines.server.dialect import PartReader
from consumers.engines.server.errors import BadAnswer, ServerError
from pipeline.core.server_pace import Timing
from pipeline.engine import CUT_IN_REASONING, Piece
from pipeline.wire.errors import HeadraceError

# A part is a token, or a piece of one where a server or a proxy cuts it. An answer of more parts than these for each
# token of its limit, and some beside, has no end. What a model thinks may not count in the limit.
_PARTS_PER_TOKEN = 8
_PARTS_BESIDE = 1000
_THINKING_PARTS = 65_536

log = logging.getLogger(__name__)


class ServerGeneration:
    """A running request.

    Only its task reads the stream, so that cancelling `next` interrupts no read.

    Args:
        request_id: the request's id.
        reader: reads the parts.
        parts: the streamed answer. It is closed at the end.
        limit: the most tokens of the answer.
        parted: called at each part.
        failure: turns an error of the server into the request's.
        ended: called once, at the end of the stream, whatever ended it.
    """

    def __init__(
        self,
        request_id: str,
        reader: PartReader,
        parts: AsyncGenerator[dict[str, Any], None],
        *,
        limit: int,
        parted: Callable[[ServerGeneration], None],
        failure: Callable[[ServerError], HeadraceError],
        ended: Callable[[ServerGeneration], None],
    ) -> None:
        self.request_id = request_id
        self.whole = False
        self.begun = False
        self._reader = reader
        self._parts = parts
        self._parts_left = _PARTS_PER_TOKEN * limit + _PARTS_BESIDE
        self._thinking_left = _THINKING_PARTS
        self._parted = parted
        self._failure = failure
        self._ended = ended
        self._piece: Piece | None = None
        self._error: HeadraceError | None = None
        self._over = False
        self._reasoned = False
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._read(), name=f"answer-{request_id}")
        # A callback, because a task that is cancelled before its first step runs no `finally`.
        self._task.add_done_callback(self._end)

    @property
    def timing(self) -> Timing | None:
        """The server's figures of a whole answer, else None."""
        return self._reader.timing if self.whole else None

    async def next(self) -> Piece:
        """Wait for output, and take all of it. Cancelling is safe: no output is lost.

        Raises:
            HeadraceError: the request failed. Earlier output is given first.
        """
        await self._news.wait()
        if self._piece is not None:
            piece, self._piece = self._piece, None
            if not self._over:
                self._news.clear()
            return piece
        if self._error is not None:
            raise self._error
        raise RuntimeError("the generation has ended: nothing comes after its last piece")

    async def close(self) -> None:
        """Disconnect, which stops the server. Does nothing the second time."""
        if not self._over:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _read(self) -> None:
        try:
            async for part in self._parts:
                self._take(self._reader.read(part))
                if self.whole:
                    break
            else:
                self._error = self._failure(ServerError("the answer ended without its last part"))
        except ServerError as error:
            self._error = self._failure(error)
        except BadAnswer as error:
            self._error = self._failure(ServerError(str(error)))
        except HeadraceError as error:
            self._error = error
        except Exception as error:
            log.exception("Answer %s of a server could not be read.", self.request_id)
            self._error = self._failure(ServerError(f"the answer could not be read ({type(error).__name__}: {error})"))
        finally:
            await self._parts.aclose()

    def _end(self, _: asyncio.Task[None]) -> None:
        self._over = True
        self._news.set()
        self._ended(self)

    def _take(self, piece: Piece) -> None:
        self.whole = piece.usage is not None
        if not self.whole:
            self._count(piece)
            self._parted(self)
        self._reasoned |= bool(piece.reasoning)
        if piece.finish_reason == "length" and self._reasoned and not (self.begun or piece.text or piece.tool_calls):
            piece.notes = [*piece.notes, CUT_IN_REASONING]
        if piece.text or piece.tool_calls:
            self.begun = True
        elif piece.usage is None and not (piece.reasoning or piece.scores):
            return
        self._piece = piece if self._piece is None else _join(self._piece, piece)
        self._news.set()

    def _count(self, piece: Piece) -> None:
        """Raise BadAnswer if the answer has no end: nothing else would end its request, nor free its slot."""
        if piece.reasoning:
            self._thinking_left -= 1
        else:
            self._parts_left -= 1
        if self._parts_left < 0 or self._thinking_left < 0:
            raise BadAnswer("The answer goes on and on, far beyond the limit of its tokens.")


def _join(first: Piece, then: Piece) -> Piece:
    """Two consecutive pieces as one."""
    return Piece(
        text=first.text + then.text,
        tool_calls=first.tool_calls + then.tool_calls,
        finish_reason=then.finish_reason,
        usage=then.usage,
        stop=then.stop,
        reasoning=first.reasoning + then.reasoning,
        scores=first.scores + then.scores,
        notes=then.notes,
    )
