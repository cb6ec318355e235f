"""The requests of one engine: which of them the child works on, which wait, and which run alone after a crash.

Everything here is synchronous. The child is a function that takes frames, so that no process is needed to test it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from consumers.engines.local.protocol import Cancel, Submit, ToChild
from consumers.engines.local.run import Run
from pipeline.core.probation import Probation
from pipeline.engine import Misbehaved, Piece, Work
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.subjects import Priority

log = logging.getLogger(__name__)

MOST_CRASHES = 4
"""A request that was in the engine during this many crashes and caused none has used up one of its attempts."""


class InFlight:
    """The requests of one engine, and where each of them is. One writer: the `EngineProcess`.

    A request has a key for its whole life here, and a new number each time it goes to a child, so that a late frame
    about an earlier try is ignored.

    Args:
        on_close: called after a reader has closed a request.
    """

    def __init__(self, on_close: Callable[[], None]) -> None:
        self._on_close = on_close
        self._send: Callable[[ToChild], None] | None = None
        self._runs: dict[int, Run] = {}
        self._in_child: dict[int, Run] = {}
        self._probation = Probation()
        self._parked: set[int] = set()
        self._epoch = 0
        self._numbers = 0

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def busy(self) -> bool:
        """Whether the child works on any request."""
        return bool(self._in_child)

    def is_oldest(self, number: int) -> bool:
        """Whether the child got no request that it still has before the one that has this number."""
        return next(iter(self._in_child), None) == number

    def count(self, upto: Priority) -> int:
        """How many requests are as urgent as this priority, or more."""
        order = list(Priority)
        return sum(order.index(run.priority) <= order.index(upto) for run in self._runs.values())

    @property
    def most_urgent(self) -> Priority | None:
        """The priority of the most urgent request; None if there is none."""
        return min((run.priority for run in self._runs.values()), key=list(Priority).index, default=None)

    @property
    def on_probation(self) -> bool:
        """Whether requests run one at a time, until it is known which one crashed the engine."""
        return self._probation.active

    # ---- the child ---------------------------------------------------------------------------------------------------

    def connect(self, send: Callable[[ToChild], None]) -> None:
        """A new child is ready. `send` gives it a frame."""
        self._send = send
        self._epoch = 0

    def disconnect(self) -> None:
        """The child has ended. Its requests stay here until `crashed` or `give_up` is called."""
        self._send = None

    def reset(self, epoch: int, cause: str) -> None:
        """A step of the child raised, and its batch is empty. `epoch` is the new epoch."""
        self._epoch = epoch
        self.crashed(cause)

    def crashed(self, cause: str) -> None:
        """The child lost its requests. They run again from the tokens that they have, except the one that is guilty.

        Args:
            cause: what happened, in a few words, for the errors.
        """
        lost, self._in_child = list(self._in_child.values()), {}
        guilty = self._probation.crashed({run.key: run.tokens for run in lost})
        if lost:
            log.warning("The engine crashed (%s) with %d requests in it.", cause, len(lost))
        for run in lost:
            run.number = None
            if run.key == guilty:
                text = f"This request crashed the engine twice ({cause}). "
                text += "It was moved to the dead letters; do not retry it."
                self._fail(run, HeadraceError(ErrorCode.ENGINE_FAILED, text))
            elif run.crashes >= MOST_CRASHES:
                text = f"The engine crashed {run.crashes + 1} times while this request ran in it (last: {cause})."
                self._fail(run, Misbehaved(text))
            else:
                run.restarted()

    def park(self) -> None:
        """The child is ended while requests run in it. They are suspended, and go on in the next child."""
        self.disconnect()
        lost, self._in_child = list(self._in_child.values()), {}
        for run in lost:
            run.number = None
            run.moved(out=True)
            self._parked.add(run.key)
            self._probation.gone(run.key)

    # ---- requests ----------------------------------------------------------------------------------------------------

    def submit(self, work: Work) -> Run:
        """Take a request. It goes to the child with the next `dispatch` that finds room for it."""
        self._numbers += 1
        run = Run(self._numbers, work, self._closed)
        self._runs[run.key] = run
        return run

    def dispatch(self) -> None:
        """Send the child the requests that may run now."""
        if self._send is None:
            return
        if not self._probation.active:
            for run in [run for run in self._runs.values() if run.number is None]:
                self._begin(self._send, run)
        while (key := self._probation.call_next()) is not None:
            self._begin(self._send, self._runs[key])

    def produced(self, number: int, piece: Piece) -> None:
        """The child produced a piece of the request that has this number."""
        run = self._in_child.get(number)
        if run is None:
            return
        run.take(piece)
        if piece.finish_reason is not None:
            self._forget(run)
        elif self._probation.progressed(run.key, run.tokens) and self._probation.active:
            # This request is cleared. It goes on when the other suspects have been tried.
            self._withdraw(run)

    def moved(self, *, suspended: list[int], resumed: list[int]) -> None:
        """The child took the requests that have the numbers `suspended` out of its batch, and put `resumed` back."""
        for numbers, out in ((resumed, False), (suspended, True)):
            for number in numbers:
                if run := self._in_child.get(number):
                    run.moved(out=out)

    def rejected(self, number: int, error: HeadraceError) -> None:
        """The child refused the request that has this number, or failed on it alone."""
        if run := self._in_child.get(number):
            self._fail(run, error)

    def give_up(self, reason: str) -> None:
        """End every request with `unavailable`, so that its worker hands it to another engine."""
        for run in list(self._runs.values()):
            self._fail(run, HeadraceError(ErrorCode.UNAVAILABLE, reason))

    def _begin(self, send: Callable[[ToChild], None], run: Run) -> None:
        self._numbers += 1
        run.number = self._numbers
        self._in_child[run.number] = run
        if run.key in self._parked:
            self._parked.discard(run.key)
            run.moved(out=False)
        try:
            send(Submit(run.number, self._epoch, run.work()))
        except (OverflowError, TypeError, ValueError, RecursionError) as error:
            text = f"The request cannot be sent to the engine process: {error}."
            self._fail(run, HeadraceError(ErrorCode.INVALID_REQUEST, text))

    def _withdraw(self, run: Run) -> None:
        if run.number is None:
            return
        if self._send is not None:
            self._send(Cancel(run.number))
        del self._in_child[run.number]
        run.number = None

    def _closed(self, run: Run) -> None:
        if run.key not in self._runs:
            return
        self._withdraw(run)
        self._forget(run)
        self._on_close()

    def _forget(self, run: Run) -> None:
        self._runs.pop(run.key, None)
        self._parked.discard(run.key)
        if run.number is not None:
            self._in_child.pop(run.number, None)
        self._probation.gone(run.key)

    def _fail(self, run: Run, error: HeadraceError) -> None:
        self._forget(run)
        run.fail(error)
