"""The engine's loop: take commands, plan a turn, carry it out, report. It runs in the child's main thread.

`pipeline.core.batch` plans each turn. The model determines its cost. The cost of the loop itself is bounded by the
number of sequences.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable

from consumers.engines.local.child.backend import Backend, Prepared
from consumers.engines.local.child.faults import Fault
from consumers.engines.local.child.storing import StoredCaches
from consumers.engines.local.protocol import Cancel, Facts, FromChild, Rejected, Reset, Shutdown, Stats, Step
from pipeline.config import Config
from pipeline.core.batch import BatchPlanner
from pipeline.core.batch_plan import BatchLimits, Plan, ReusablePrompt, StoreKept
from pipeline.core.together import BatchFaults
from pipeline.engine import Piece
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.subjects import Priority

log = logging.getLogger(__name__)

_SMOOTHING = 0.1
"""The weight of the latest answer in the average length of answers."""

_KEPT_SHARE = 0.25
"""The part of the memory for the batch's caches that the kept ones may have beside it."""

_KEPT_BYTES = 1 << 30
"""The same where the free memory is not known."""

_QUIET_S = 0.05
"""While there is nothing to do for so long, a file of a kept prompt is written."""

_RATE_WINDOW_S = 1.0
"""A rate is averaged over about this much time of reading or writing."""


class Begin:
    """A prepared request, and how urgent it is. `extra`: it runs beyond the slots; `coming`: as in `Work`."""

    def __init__(
        self,
        epoch: int,
        sequence: Prepared,
        fault: Fault | None,
        priority: Priority = Priority.MEDIUM,
        *,
        extra: bool = False,
        coming: int = 0,
    ) -> None:
        self.epoch = epoch
        self.sequence = sequence
        self.fault = fault
        self.priority = priority
        self.extra = extra
        self.coming = coming


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
        snapshots = backend.facts.reuse == "snapshots"
        self._stored = StoredCaches(backend.files, config.prompt_disk_bytes, snapshots=snapshots)
        self._planner = BatchPlanner(batch_limits(config, backend.facts), self._stored.index)
        self._config = config
        self._faults = BatchFaults()
        self._begun: dict[int, Begin] = {}
        self._epoch = 0
        self._rates = _Rates()
        self._pause_s = 0.0

    def run(self) -> None:
        """Run until a `Shutdown`."""
        while self.turn():
            pass

    def turn(self) -> bool:
        """Run the loop once. Returns False when it should end."""
        try:
            if not self._take_commands():
                return False
            if self._begun:
                plan, sampled = self._carry_out()
                if not plan.wait_s:
                    self._report(plan, sampled)
            elif store := self._due():
                self._stored.write(self._backend.batch, store, time.monotonic())
        except Exception as error:
            log.exception("A step failed with %d requests in the engine. They run again.", len(self._begun))
            self._reset(f"{type(error).__name__}: {error}")
        return True

    def _take_commands(self) -> bool:
        """Handle the commands in the queue. Wait for one only if there is no other work, or if the plan says so."""
        wait, pause_s = not self._begun or self._pause_s > 0, self._pause_s if self._begun else None
        if not self._begun and self._due():
            pause_s = _QUIET_S
        self._pause_s = 0.0
        while True:
            try:
                command = self._commands.get(wait, pause_s)
            except queue.Empty:
                return True
            wait = False
            if isinstance(command, Shutdown):
                return False
            if isinstance(command, Cancel):
                self._drop(command.key)
            elif command.epoch == self._epoch:
                self._begin(command)

    def _begin(self, begin: Begin) -> None:
        sequence = begin.sequence
        piece = sequence.transcript.replay(sequence.prompt[len(sequence.prompt) - sequence.position :])
        if piece.text or piece.reasoning or piece.finish_reason:
            self._send(Step([(sequence.key, piece)], self._stats()))
        if piece.finish_reason is None:
            self._begun[sequence.key] = begin
            prompt = ReusablePrompt(
                sequence.prompt, (sequence.tenant, sequence.exact, sequence.adapter), sequence.marks
            )
            self._stored.check(prompt)
            self._planner.arrived(
                sequence.key,
                begin.priority,
                tokens=len(sequence.prompt),
                longest=sequence.longest_tokens,
                extra=begin.extra,
                exact_prompt=len(sequence.prompt) - sequence.position if sequence.exact else 0,
                coming=begin.coming,
                prompt=prompt,
            )
            self._backend.insert(sequence)

    def _drop(self, key: int) -> None:
        """Remove a request. What is in its cache is kept for later ones, within the budget."""
        if self._begun.pop(key, None):
            batch = self._backend.batch
            if keep := self._planner.ended(key, batch.cached(key)):
                self._planner.reuse.measured(keep.part.handle, batch.keep(keep))
            batch.free(self._planner.excess())
            batch.remove(key)

    def _carry_out(self) -> tuple[Plan, list[tuple[int, int]]]:
        """Make a plan and carry it out. Returns it, and pairs of key and token."""
        planner, batch = self._planner, self._backend.batch
        started = time.monotonic()
        plan = planner.plan(started)
        self._pause_s = plan.wait_s
        sampled = self._arrange(plan)
        began = time.monotonic()
        if plan.read:
            self._strike([key for key, _ in plan.read])
            sampled += batch.read(plan.read)
            now = time.monotonic()
            planner.was_read(plan.read, seconds=now - began, now=now)
        elif plan.step:
            self._strike(planner.decoding())
            if plan.join:
                batch.join(plan.join)
            sampled += batch.step()
            now = time.monotonic()
            planner.has_stepped(seconds=now - began, now=now, ahead=batch.ahead)
        self._rates.took(plan, len(sampled), time.monotonic() - started)
        return plan, sampled

    def _arrange(self, plan: Plan) -> list[tuple[int, int]]:
        """Keep, suspend, drop, load, resume and free. Returns the tokens that suspended sequences had not returned."""
        batch, sampled = self._backend.batch, list[tuple[int, int]]()
        for keep in plan.keep:
            self._planner.reuse.measured(keep.part.handle, batch.keep(keep))
        if plan.suspend:
            suspended = batch.suspend(plan.suspend)
            sampled += suspended.sampled
            for key, nbytes in suspended.kept_bytes.items():
                self._planner.kept(key, nbytes)
        for key in plan.drop:
            batch.drop(key)
        for load in plan.load:
            if load.fetch:
                self._planner.reuse.measured(load.fetch.part.handle, self._stored.fetch(batch, load.fetch))
            batch.load(load)
            sequence = self._begun[load.key].sequence
            # What a resumed answer takes over is its own: it was computed for this request.
            if load.first and not sequence.position:
                sequence.transcript.took_over(load.tokens)
        if plan.resume:
            batch.resume(plan.resume)
        # What was measured can be more than was expected.
        batch.free([*plan.free, *self._planner.excess()])
        return sampled

    def _due(self) -> StoreKept | None:
        """The file that is written next, if no request comes."""
        return self._planner.reuse.next_to_store() if self._stored.writes(time.monotonic()) else None

    def _strike(self, keys: list[int]) -> None:
        for key in keys:
            begin = self._begun[key]
            if begin.fault and begin.sequence.transcript.tokens >= begin.fault.after_tokens:
                begin.fault.strike()

    def _reset(self, error: str) -> None:
        """Begin anew after a step that failed, with each sequence by itself if batches are at fault."""
        at_fault = self._faults.failed(len(self._planner.running()))
        self._backend.reset(alone=error if at_fault else "")
        self._begun.clear()
        self._planner.clear()
        if at_fault:
            before = self._planner.reuse
            self._planner = BatchPlanner(batch_limits(self._config, self._backend.facts), self._stored.index)
            self._planner.reuse.count_on(before)
        self._epoch += 1
        self._send(Reset(self._epoch, error, self._backend.facts))

    def _report(self, plan: Plan, sampled: list[tuple[int, int]]) -> None:
        pieces = []
        for key, token in sampled:
            if key not in self._begun:
                # Its answer ended with an earlier token of this turn: the one that was due when it was suspended.
                continue
            piece = self._feed(key, token)
            if piece is not None:
                pieces.append((key, piece))
        suspended = [key for key in plan.suspend if key in self._begun]
        self._send(Step(pieces, self._stats(), suspended, plan.resume))

    def _feed(self, key: int, token: int) -> Piece | None:
        sequence = self._begun[key].sequence
        transcript = sequence.transcript
        try:
            if sequence.guide is not None:
                sequence.guide.check()
            piece = transcript.feed(token)
        except HeadraceError as error:
            self._drop(key)
            self._send(Rejected.of(key, error))
            return None
        except Exception as error:
            log.exception("An answer could not be decoded.")
            self._drop(key)
            failure = HeadraceError(ErrorCode.ENGINE_FAILED, f"The engine failed to decode the answer ({error}).")
            self._send(Rejected.of(key, failure))
            return None
        if piece.finish_reason is not None:
            self._rates.finished(transcript.tokens, len(self._begun[key].sequence.prompt) - transcript.cached_tokens)
            self._drop(key)
        return piece

    def _stats(self) -> Stats:
        sequences = [begin.sequence for begin in self._begun.values()]
        drafted, accepted = self._backend.drafted()
        return Stats(
            pending_tokens=sum(self._rates.pending(sequence) for sequence in sequences),
            kv_bytes=self._backend.batch.kv_bytes(),
            tokens_per_s=self._rates.tokens_per_s,
            tokens_per_request=self._rates.tokens_per_request,
            pending_prompt_tokens=self._planner.unread_tokens(),
            prompt_tokens_per_s=self._rates.prompt_tokens_per_s,
            prompt_tokens_per_request=self._rates.prompt_tokens_per_request,
            slots=self._planner.slots(),
            prompt_tokens=self._planner.reuse.prompt_tokens,
            reused_tokens=self._planner.reuse.cached_tokens,
            kept_bytes=self._planner.reuse.nbytes,
            drafted_tokens=drafted,
            accepted_tokens=accepted,
            stored_bytes=self._stored.index.nbytes,
        )


def batch_limits(config: Config, facts: Facts) -> BatchLimits:
    """The bounds of a batch by the settings and the model."""
    return BatchLimits(
        slots=facts.slots,
        most_slots=config.slots,
        piece_tokens=config.prefill_step_tokens,
        target_s=config.inter_token_target_s,
        hold_s=config.high_hold_s,
        suspensions=config.max_preemptions,
        suspended_s=config.max_suspended_s,
        kept_bytes=kept_bytes(config, facts),
        kv_bytes=config.kv_bytes_limit or facts.free_bytes,
        free_bytes=facts.free_bytes,
        suspends=facts.suspends,
        kv_bytes_per_token=facts.kv_bytes_per_token,
        kv_bytes_fixed=facts.kv_bytes_fixed,
        kv_windows=facts.kv_windows,
        reuse=facts.reuse if config.prompt_cache else "",
    )


def kept_bytes(config: Config, facts: Facts) -> int:
    """The budget of the caches that are kept: as the settings say, else a share of the free memory."""
    if config.kept_kv_bytes is not None:
        return config.kept_kv_bytes
    return int(facts.free_bytes * _KEPT_SHARE) if facts.free_bytes else _KEPT_BYTES


class _Rates:
    """Measured rates and averages; 0 means not known yet. Reading and writing are measured apart."""

    def __init__(self) -> None:
        self.tokens_per_s = 0.0
        self.prompt_tokens_per_s = 0.0
        self.tokens_per_request = 0.0
        self.prompt_tokens_per_request = 0.0
        self._silent_s = 0.0

    def took(self, plan: Plan, tokens: int, duration_s: float) -> None:
        """A turn took duration_s seconds and produced tokens. A step without tokens counts to the next one."""
        if plan.read:
            read = sum(count for _, count in plan.read)
            self.prompt_tokens_per_s = _averaged(self.prompt_tokens_per_s, read, duration_s)
        elif not tokens:
            self._silent_s += duration_s
        else:
            self.tokens_per_s = _averaged(self.tokens_per_s, tokens, duration_s + self._silent_s)
            self._silent_s = 0.0

    def finished(self, tokens: int, prompt_tokens: int) -> None:
        """An answer of so many tokens to a prompt of so many, resumed ones included, has ended."""
        weight = _SMOOTHING if self.tokens_per_request else 1.0
        self.tokens_per_request += weight * (tokens - self.tokens_per_request)
        self.prompt_tokens_per_request += weight * (prompt_tokens - self.prompt_tokens_per_request)

    def pending(self, sequence: Prepared) -> float:
        """Tokens still expected of an answer, if it gets the average length: at least one, at most its limit."""
        left = sequence.transcript.max_tokens - sequence.transcript.tokens
        expected = self.tokens_per_request or sequence.transcript.max_tokens
        return min(left, max(1.0, expected - sequence.transcript.tokens))


def _averaged(rate: float, tokens: int, duration_s: float) -> float:
    """A rate with the latest turn taken into it."""
    weight = min(1.0, duration_s / _RATE_WINDOW_S) if rate else 1.0
    return rate + weight * (tokens / max(duration_s, 1e-6) - rate)
