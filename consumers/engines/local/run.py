"""One request in the parent: the part of the answer that its reader has not taken, and what a restart needs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from pipeline.engine import Piece, Work
from pipeline.wire.errors import HeadraceError
from pipeline.wire.subjects import Priority

_NOTHING = Piece()


class Run:
    """A `Generation`. Its writer is `InFlight`, its reader the worker; both run in one event loop.

    Pieces that wait for the reader are merged into one, so a slow reader costs no more memory than the answer itself.

    Attributes:
        key: identifies the request here for its whole life.
        number: identifies it in the child's frames; None while the child does not have it.
        crashes: how many times the engine crashed while the request ran in it.
    """

    def __init__(self, key: int, work: Work, on_close: Callable[[Run], None]) -> None:
        self.key = key
        self.number: int | None = None
        self.crashes = 0
        self._work = work
        self._on_close = on_close
        self._tokens = list(work.resume_tokens)
        # The tokens of a text that another engine wrote are not known here, so those after it are not the whole.
        self._knows_all = bool(work.resume_tokens) or not (work.resume_text or work.resume_reasoning)
        self._text = work.resume_text
        self._reasoning = work.resume_reasoning
        self._waiting = Piece()
        self._error: HeadraceError | None = None
        self._over = False
        self._changed = asyncio.Event()

    # ---- the reader's side -------------------------------------------------------------------------------------------

    async def next(self) -> Piece:
        """As `Generation.next`.

        Raises:
            RuntimeError: the last piece or the error was taken already, or the request was closed.
        """
        while self._waiting == _NOTHING and self._error is None:
            if self._over:
                raise RuntimeError("next() was called after the end of the answer")
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
    def priority(self) -> Priority:
        """The request's."""
        return self._work.priority

    @property
    def tokens(self) -> int:
        """The number of tokens in the answer, resumed ones included."""
        return len(self._tokens)

    def work(self) -> Work:
        """The request with the answer so far, for the child to go on from there."""
        return msgspec.structs.replace(
            self._work,
            resume_tokens=list(self._tokens) if self._knows_all else [],
            resume_text=self._text,
            resume_reasoning=self._reasoning,
            # What was on its way at first has come, or has crashed as well.
            coming=0 if self.crashes else self._work.coming,
        )

    def take(self, piece: Piece) -> None:
        """Add a piece that the child produced."""
        self._tokens += piece.token_ids
        self._text += piece.text
        self._reasoning += piece.reasoning
        waiting = self._waiting
        waiting.text += piece.text
        waiting.reasoning += piece.reasoning
        waiting.token_ids += piece.token_ids
        waiting.tool_calls += piece.tool_calls
        waiting.scores += piece.scores
        waiting.notes = piece.notes
        waiting.finish_reason, waiting.usage, waiting.stop = piece.finish_reason, piece.usage, piece.stop
        self._over = piece.finish_reason is not None
        self._changed.set()

    def moved(self, *, out: bool) -> None:
        """The engine suspended this request (out), or resumed it."""
        self._waiting.suspended = out
        self._waiting.preempted += out
        self._changed.set()

    def restarted(self) -> None:
        """The engine crashed, and runs this request again."""
        self.crashes += 1
        self._waiting.restarted += 1
        self._waiting.suspended = None
        self._changed.set()

    def fail(self, error: HeadraceError) -> None:
        """End the request with error, after the reader has taken what was produced before it."""
        self._error = error
        self._over = True
        self._changed.set()
