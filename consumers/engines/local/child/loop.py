"""The engine's loop: take commands, insert and remove, step, report. It runs in the child's main thread.

What a step costs is the model's; everything here is bounded by the number of sequences in the batch.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable

from consumers.engines.local.child.backend import Backend, Prepared
from consumers.engines.local.child.checks import batch_kv_bytes
from consumers.engines.local.child.faults import Fault
from consumers.engines.local.protocol import Cancel, FromChild, Rejected, Reset, Shutdown, Stats, Step
from pipeline.config import Config
from pipeline.engine import Piece
from pipeline.wire.errors import ErrorCode, HeadraceError

log = logging.getLogger(__name__)

_SMOOTHING = 0.1
"""Weight of the latest answer in the average length of answers."""

_RATE_WINDOW_S = 1.0
"""The token rate is averaged over about this long, idle time left out."""


class Begin:
    """A prepared request on its way into the batch."""

    def __init__(self, epoch: int, sequence: Prepared, fault: Fault | None) -> None:
        self.epoch = epoch
        self.sequence = sequence
        self.fault = fault


Command = Begin | Cancel | Shutdown


class EngineLoop:
    """The sequences of one backend.

    Args:
        backend: loaded; used by this loop alone but for `prepare`.
        commands: filled by the reading thread, in the order in which the parent sent them.
        send: writes a frame to the parent.
    """

    def __init__(
        self,
        backend: Backend,
        commands: queue.SimpleQueue[Command],
        send: Callable[[FromChild], None],
        config: Config,
    ) -> None:
        self._backend = backend
        self._commands = commands
        self._send = send
        self._kv_limit = config.kv_bytes_limit
        self._waiting: deque[Begin] = deque()
        self._running: dict[int, Begin] = {}
        self._epoch = 0
        self._rates = _Rates()

    def run(self) -> None:
        """Until a `Shutdown`."""
        while self.turn():
            pass

    def turn(self) -> bool:
        """Once around; False when the loop is to end."""
        try:
            if not self._take_commands():
                return False
            self._admit()
            if self._running:
                self._report(self._step())
        except Exception as error:
            log.exception("a step failed; a batch of %d begins anew", len(self._running))
            self._reset(f"{type(error).__name__}: {error}")
        return True

    def _take_commands(self) -> bool:
        """Handle what has come, waiting for it only where there is nothing else to do."""
        wait = not self._running and not self._waiting
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            wait = False
            if isinstance(command, Shutdown):
                return False
            if isinstance(command, Cancel):
                self._drop(command.key)
            elif command.epoch == self._epoch:
                self._waiting.append(command)

    def _drop(self, key: int) -> None:
        if self._running.pop(key, None):
            self._backend.remove(key)
        self._waiting = deque(begin for begin in self._waiting if begin.sequence.key != key)

    def _admit(self) -> None:
        """Let in, in order, what the memory has room for when every answer becomes as long as it may."""
        while self._waiting:
            begin = self._waiting[0]
            lengths = [running.sequence.longest_tokens for running in self._running.values()]
            lengths.append(begin.sequence.longest_tokens)
            needed = batch_kv_bytes(lengths, self._backend.facts.kv_bytes_per_token)
            if self._running and self._kv_limit and needed > self._kv_limit:
                return
            self._waiting.popleft()
            self._begin(begin)

    def _begin(self, begin: Begin) -> None:
        sequence = begin.sequence
        piece = sequence.transcript.replay(sequence.prompt[len(sequence.prompt) - sequence.position :])
        if piece.text or piece.finish_reason:
            self._send(Step([(sequence.key, piece)], self._stats()))
        if piece.finish_reason is None:
            self._running[sequence.key] = begin
            self._backend.insert(sequence)

    def _step(self) -> list[tuple[int, int]]:
        started = time.monotonic()
        for begin in self._running.values():
            if begin.fault and begin.sequence.transcript.tokens >= begin.fault.after_tokens:
                begin.fault.strike()
        sampled = self._backend.step()
        self._rates.stepped(len(sampled), time.monotonic() - started)
        return sampled

    def _reset(self, error: str) -> None:
        self._backend.reset()
        self._running.clear()
        self._waiting.clear()
        self._epoch += 1
        self._send(Reset(self._epoch, error))

    def _report(self, sampled: list[tuple[int, int]]) -> None:
        pieces = []
        for key, token in sampled:
            piece = self._feed(key, token)
            if piece is not None:
                pieces.append((key, piece))
        self._send(Step(pieces, self._stats()))

    def _feed(self, key: int, token: int) -> Piece | None:
        transcript = self._running[key].sequence.transcript
        try:
            piece = transcript.feed(token)
        except Exception as error:
            log.exception("an answer could not be decoded")
            self._drop(key)
            self._send(Rejected.of(key, HeadraceError(ErrorCode.ENGINE_FAILED, f"the answer broke off: {error}")))
            return None
        if piece.finish_reason is not None:
            self._rates.finished(transcript.tokens)
            self._drop(key)
        return piece

    def _stats(self) -> Stats:
        sequences = [begin.sequence for begin in (*self._running.values(), *self._waiting)]
        return Stats(
            pending_tokens=sum(self._rates.pending(sequence) for sequence in sequences),
            kv_bytes=self._backend.kv_bytes(),
            tokens_per_s=self._rates.tokens_per_s,
            tokens_per_request=self._rates.tokens_per_request,
        )


class _Rates:
    """Measured rates, 0 until they are known."""

    def __init__(self) -> None:
        self.tokens_per_s = 0.0
        self.tokens_per_request = 0.0

    def stepped(self, tokens: int, duration_s: float) -> None:
        """A step took duration_s and gave tokens, one a sequence."""
        if not tokens:
            return
        rate = tokens / max(duration_s, 1e-6)
        weight = min(1.0, duration_s / _RATE_WINDOW_S) if self.tokens_per_s else 1.0
        self.tokens_per_s += weight * (rate - self.tokens_per_s)

    def finished(self, tokens: int) -> None:
        """An answer was complete after tokens."""
        weight = _SMOOTHING if self.tokens_per_request else 1.0
        self.tokens_per_request += weight * (tokens - self.tokens_per_request)

    def pending(self, sequence: Prepared) -> float:
        """Tokens still expected: what is missing to an answer of average length, at least one, at most the limit."""
        left = sequence.transcript.max_tokens - sequence.transcript.tokens
        expected = self.tokens_per_request or sequence.transcript.max_tokens
        return min(left, max(1.0, expected - sequence.transcript.tokens))
