"""The engine's loop: read commands, insert and remove sequences, step, report. It runs in the child's main thread.

The model determines the cost of a step. The cost of the loop itself is bounded by the number of sequences in the batch.
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
"""The weight of the latest answer in the average length of answers."""

_RATE_WINDOW_S = 1.0
"""The token rate is averaged over about this much time, without idle time."""


class Begin:
    """A prepared request that waits for the batch or is in it."""

    def __init__(self, epoch: int, sequence: Prepared, fault: Fault | None) -> None:
        self.epoch = epoch
        self.sequence = sequence
        self.fault = fault


Command = Begin | Cancel | Shutdown


class EngineLoop:
    """Runs the sequences of one backend.

    Args:
        backend: a loaded backend. Only this loop uses it, except `prepare`.
        commands: filled by the reading thread, in the order in which the parent sent them.
        send: writes a frame to the parent.
        config: the settings.
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
        """Run until a `Shutdown`."""
        while self.turn():
            pass

    def turn(self) -> bool:
        """Run the loop once. Returns False when it should end."""
        try:
            if not self._take_commands():
                return False
            self._admit()
            if self._running:
                self._report(self._step())
        except Exception as error:
            log.exception("A step failed with %d requests in the batch. They run again.", len(self._running))
            self._reset(f"{type(error).__name__}: {error}")
        return True

    def _take_commands(self) -> bool:
        """Handle the commands in the queue. Wait for one only if there is no other work."""
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
        """Begin waiting requests, in order, while the KV cache has room for all answers at their greatest lengths."""
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
            log.exception("An answer could not be decoded.")
            self._drop(key)
            failure = HeadraceError(ErrorCode.ENGINE_FAILED, f"The engine failed to decode the answer ({error}).")
            self._send(Rejected.of(key, failure))
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
    """Measured rates; 0 means not known yet."""

    def __init__(self) -> None:
        self.tokens_per_s = 0.0
        self.tokens_per_request = 0.0

    def stepped(self, tokens: int, duration_s: float) -> None:
        """A step took duration_s seconds and produced tokens, one for each sequence."""
        if not tokens:
            return
        rate = tokens / max(duration_s, 1e-6)
        weight = min(1.0, duration_s / _RATE_WINDOW_S) if self.tokens_per_s else 1.0
        self.tokens_per_s += weight * (rate - self.tokens_per_s)

    def finished(self, tokens: int) -> None:
        """An answer ended after this many tokens."""
        weight = _SMOOTHING if self.tokens_per_request else 1.0
        self.tokens_per_request += weight * (tokens - self.tokens_per_request)

    def pending(self, sequence: Prepared) -> float:
        """Tokens still expected of an answer, if it gets the average length: at least one, at most its limit."""
        left = sequence.transcript.max_tokens - sequence.transcript.tokens
        expected = self.tokens_per_request or sequence.transcript.max_tokens
        return min(left, max(1.0, expected - sequence.transcript.tokens))
