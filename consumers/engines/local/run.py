"""One request as the parent sees it: what the reader has not taken yet, and what is needed to go on elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from pipeline.engine import Piece, Work
from pipeline.wire.errors import HeadraceError

_NOTHING = Piece()


class Run:
    """A `Generation`. Its writer is the engine process, its reader whoever asked; both live in one event loop.

    `key` is its number here for good, `wire` the one by which the child knows it while it is there,
    `crashes` how often the engine went down with it.

    What waits for the reader is merged into one piece, so a slow reader costs no more than its answer's own size.
    """

    def __init__(self, key: int, work: Work, on_close: Callable[[Run], None]) -> None:
        self.key = key
        self.wire: int | None = None
        self.crashes = 0
        self._work = work
        self._on_close = on_close
        self._tokens = list(work.resume_tokens)
        self._text = work.resume_text
        self._waiting = Piece()
        self._error: HeadraceError | None = None
        self._over = False
        self._changed = asyncio.Event()

    # ---- the reader's side -------------------------------------------------------------------------------------------

    async def next(self) -> Piece:
        """As `Generation.next`. After the last piece or an error there is nothing to wait for: it raises
        RuntimeError.
        """
        while self._waiting == _NOTHING and self._error is None:
            if self._over:
                raise RuntimeError("the answer is over: its last piece or error was taken, or it was closed")
            self._changed.clear()
            await self._changed.wait()
        if self._waiting == _NOTHING and self._error is not None:
            error, self._error = self._error, None
            raise error
        piece, self._waiting = self._waiting, Piece()
        return piece

    async def close(self) -> None:
        """As `Generation.close`."""
        self._over, self._error, self._waiting = True, None, Piece()
        self._changed.set()
        self._on_close(self)

    # ---- the engine's side -------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> int:
        """How many tokens the answer has, those resumed included."""
        return len(self._tokens)

    def work(self) -> Work:
        """The request as it goes on from here."""
        return msgspec.structs.replace(self._work, resume_tokens=list(self._tokens), resume_text=self._text)

    def take(self, piece: Piece) -> None:
        """The child produced piece."""
        self._tokens += piece.token_ids
        self._text += piece.text
        waiting = self._waiting
        waiting.text += piece.text
        waiting.token_ids += piece.token_ids
        waiting.tool_calls += piece.tool_calls
        waiting.finish_reason, waiting.usage = piece.finish_reason, piece.usage
        self._over = piece.finish_reason is not None
        self._changed.set()

    def restarted(self) -> None:
        """The engine has to begin this request again."""
        self.crashes += 1
        self._waiting.restarted += 1
        self._changed.set()

    def fail(self, error: HeadraceError) -> None:
        """The request ends with error, once the reader has what was produced before."""
        self._error = error
        self._over = True
        self._changed.set()
