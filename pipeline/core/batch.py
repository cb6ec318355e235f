"""What an engine's batch does next: which sequences run, which prompt is read, and whether all take a step.

One plan is made for each turn, as vLLM's scheduler makes one for each step. A turn reads one piece of prompts or takes
one step, so that the next plan, with the requests that have arrived meanwhile, is never far away.

- **Places.** As many sequences run as pay (`pipeline.core.width`), or as there are slots. A more urgent sequence that
  finds no place takes that of a less urgent one: the least urgent first, then the one preempted least, then the latest.
  The victim is suspended. It keeps its KV cache while the caches of all suspended sequences fit a budget. Beyond it,
  its tokens are read again later.
- **Prompts.** The most urgent are read first. While a HIGH prompt is read, the other answers stand still, at most
  `hold_s` in a row, and so do the prompts of the other priorities. HIGH answers that are being written wait for a HIGH
  prompt of up to two inter-token targets; a longer one is read in pieces, with a step after each.
- **Pieces.** Below HIGH, a piece of prompts is as long as can be read within the inter-token target, at the rate
  measured at this depth. Only the short rest of a MEDIUM prompt that is alone is read at once. Prompts of one priority
  and of similar depth are read together. A step follows each piece, unless the answers are few and no more urgent than
  the prompts. The last token of a prompt is read by the next step.
- **Exact.** The prompt of an exact sequence is read alone, in pieces of a fixed size. Tokens of its answer that are
  read again are read one by one, as they were sampled.
- **Gathering.** An engine with nothing to do waits a moment for HIGH requests that are known to be on their way, and
  reads the prompts together, in one pass. Below HIGH, prompts are read in pieces, and those that come later join.
- **Reuse.** A sequence goes on from what an earlier one has left of the same tokens (`pipeline.core.reuse`). One whose
  prompt begins like one that is being read waits for that head.
- **Width.** While a HIGH answer is being written, no more sequences run beside it than one step serves within the
  inter-token target, but half of the slots that HIGH leaves in any case.

No sequence stays suspended: a sequence that has stood still for `suspended_s` in all runs on as soon as there is
memory for it, and one whose place was taken `suspensions` times keeps it from then on. HIGH does not wait for those
either: where no place can be taken, half as many HIGH sequences as there are slots run beyond them.
"""

from __future__ import annotations

from typing import Final

from pipeline.core.batch_plan import RANK, BatchLimits, Keep, Member, Plan, ReusablePrompt, Stage, batch_kv_bytes
from pipeline.core.engine_pace import EnginePace
from pipeline.core.reuse import PromptReuse
from pipeline.core.stored import StoredPrompts
from pipeline.core.width import WidthFinder
from pipeline.wire.subjects import Priority

_FIRST_PIECE_TOKENS: Final = 32
"""The size of a piece before any reading rate was measured. Pieces of this size cost no more than longer ones."""

_LEAST_PIECE_TOKENS: Final = 8
"""A smaller piece takes about as long as this one."""

_LEAST_HIGH_TOKENS: Final = 32
"""A piece of HIGH prompts has at least this many tokens: the answers beside it wait for each pass, however short."""

_LONG_PIECE_TARGETS: Final = 5.0
"""A long piece takes this many inter-token targets: a cancelled request stops at its next piece."""

_GATHERING: Final = 0.5
"""For those that are on their way, a prompt waits this part of the time in which it could be read alone."""

_HIGH_AROUND_S: Final = 60.0
"""For so long after a HIGH request, another one is expected."""

_SIMILAR_TOKENS: Final = 256
"""Sequences whose depths differ by at most this much are read together: the shallower ones are padded."""


class BatchPlanner:
    """The sequences of one engine, and the plan of each turn. One writer: the engine's loop. Times are monotonic.

    A plan takes effect here as it is made: the loop carries it out, then reports with `was_read` or `has_stepped`.
    """

    def __init__(self, limits: BatchLimits, stored: StoredPrompts | None = None) -> None:
        self.pace = EnginePace()
        self.reuse = PromptReuse(limits, StoredPrompts() if stored is None else stored)
        self._limits = limits
        self._found = WidthFinder(limits.target_s, limits.most_slots)
        self._high_at: float | None = None
        self._members: dict[int, Member] = {}
        self._arrivals = 0
        # HIGH requests that are on their way to this engine, and since when it waits for them.
        self._coming = 0
        self._gathering_since: float | None = None
        # The greatest length of the sequences here, and of the latest ones when none is here.
        self._longest = 0
        self._pieces = 0
        self._just_read = False
        # Since when the answers stand still, and since when no prompt of a priority was read; absent if there is none.
        self._standing_since: float | None = None
        self._unread_since: dict[Priority, float] = {}

    def __len__(self) -> int:
        return len(self._members)

    # ---- what happens ------------------------------------------------------------------------------------------------

    def arrived(
        self,
        key: int,
        priority: Priority,
        *,
        tokens: int,
        longest: int,
        extra: bool = False,
        exact_prompt: int = 0,
        coming: int = 0,
        prompt: ReusablePrompt | None = None,
    ) -> None:
        """A sequence of so many known tokens has come, which may grow to longest tokens.

        Args:
            key, priority, tokens, longest, extra, exact_prompt, prompt: as in `Member`.
            coming: so many more requests of this priority are coming, as far as its worker knows.
        """
        self._arrivals += 1
        if priority is Priority.HIGH:
            self._coming = coming
        member = Member(key, priority, self._arrivals, tokens, longest, extra, exact_prompt)
        member.prompt = prompt or ReusablePrompt()
        self.reuse.arrived(member, self._members.values())
        self._members[key] = member
        self._longest = max(member.longest for member in self._members.values())

    def ended(self, key: int, tokens: list[int] | None = None) -> Keep | None:
        """A sequence has ended or was cancelled. Unknown keys are ignored.

        Args:
            key: the sequence.
            tokens: those whose state is in its cache.

        Returns:
            What is to be kept of it.
        """
        member = self._members.pop(key, None)
        if member is None:
            return None
        return self.reuse.ended(member, tokens or [], self._suspended_bytes())

    def clear(self) -> None:
        """All sequences and caches are lost."""
        self._members.clear()
        self.reuse.clear()

    def excess(self) -> list[int]:
        """The handles of kept prompts that exceed the budget, and are no longer known."""
        return self.reuse.shrink(self._suspended_bytes())

    def kept(self, key: int, nbytes: int) -> None:
        """The measured size of the cache of a sequence that was suspended."""
        member = self._members.get(key)
        if member is not None and member.stage is Stage.SUSPENDED and member.kept_bytes:
            member.kept_bytes = nbytes

    def was_read(self, pieces: list[tuple[int, int]], *, seconds: float, now: float) -> None:
        """The pieces of a plan were read within so many seconds."""
        read = [(self._members[key], tokens) for key, tokens in pieces if key in self._members]
        self._just_read = True
        self._pieces += 1
        if not read:
            return
        depth, longest = max(member.depth for member, _ in read), max(tokens for _, tokens in read)
        # The last tokens of prompts are read by a pass like a step. Too long a guess of it would raise the rate.
        ending = sum(member.left == tokens for member, tokens in read)
        self.pace.was_read(longest * len(read), depth, max(seconds - self.pace.least_step_s(ending), seconds / 2))
        for member, tokens in read:
            member.left -= tokens
            member.depth += tokens
            member.stage = Stage.READING if member.left else Stage.DECODING
            self._unread_since[member.priority] = now
            self.reuse.was_read(member, member.depth - tokens, self._members.values())

    def has_stepped(self, *, seconds: float, now: float, ahead: int = 0) -> None:
        """All sequences whose prompts had been read got one token, within so many seconds.

        Args:
            seconds, now: the duration, and the present.
            ahead: how many more the only one of them got.
        """
        decoding = self._in(Stage.DECODING)
        self._just_read = False
        self._standing_since = now
        self.pace.has_stepped(len(decoding), seconds)
        self._found.has_stepped(len(decoding), seconds, high=self._expects_high(now), now=now)
        for member in decoding:
            member.depth += 1 + ahead

    # ---- the plan ----------------------------------------------------------------------------------------------------

    def plan(self, now: float) -> Plan:
        """The next turn. It does nothing only if there is no sequence, or if it waits."""
        plan = Plan()
        if any(member.priority is Priority.HIGH for member in self._members.values()):
            self._high_at = now
        plan.wait_s = self._gather_s(now)
        if plan.wait_s:
            return plan
        plan.keep = self.reuse.keep_due(self._suspended_bytes())
        self._place(plan, now)
        self._drop_beyond_budget(plan)
        plan.free = self.excess()
        self._work(plan, now)
        return plan

    def running(self) -> list[int]:
        """The keys of the sequences in the batch."""
        return [member.key for member in self._members.values() if member.runs]

    def decoding(self) -> list[int]:
        """The keys of the sequences that the next step serves."""
        return [member.key for member in self._in(Stage.DECODING)]

    def unread_tokens(self) -> int:
        """The tokens that are still to be read, of all sequences."""
        return sum(member.left for member in self._members.values())

    def slots(self) -> int:
        """How many sequences run at once at present: those that pay, as far as there is memory for them."""
        if self._limits.slots:
            return self._limits.slots
        each = batch_kv_bytes([self._longest], self._limits.kv)
        room = min((some for some in (self._limits.kv_bytes, self._limits.free_bytes) if some), default=0)
        return max(1, min(self._found.now, room // each)) if room and each else self._found.now

    # ---- gathering

    def _gather_s(self, now: float) -> float:
        """How long the HIGH prompts that are here wait for those on their way, at most; 0 if they do not."""
        high = [member for member in self._members.values() if member.priority is Priority.HIGH]
        begun = any(member.stage is not Stage.WAITING for member in self._members.values())
        if begun or not self._coming or not 0 < len(high) < self.slots():
            self._gathering_since = None
            return 0.0
        if self._gathering_since is None:
            self._gathering_since = now
        rate = self.pace.reading_rate(0)
        first = min(high, key=lambda member: member.order)
        alone_s = self._limits.target_s if rate is None else first.left / rate
        left_s = self._gathering_since + min(_GATHERING * alone_s, self._limits.target_s) - now
        if left_s <= 0:
            self._coming, self._gathering_since = 0, None
        return max(0.0, left_s)

    # ---- places

    def _expects_high(self, now: float) -> bool:
        return self._high_at is not None and now - self._high_at < _HIGH_AROUND_S

    def _place(self, plan: Plan, now: float) -> None:
        wanting = [member for member in self._members.values() if not member.runs]
        # In this order, because one that begins can be awaited by those behind it.
        wanting.sort(key=lambda member: (member.rank, member.stage is Stage.WAITING, member.order))
        for member in wanting:
            if member.stage is Stage.SUSPENDED and member.stood(now) >= self._limits.suspended_s:
                if not self._has_memory(member, []):
                    return  # nothing begins before it
                self._run(member, plan, now)
        full = False
        for member in wanting:
            if member.runs or (full and not member.extra) or self.reuse.waits(member, self._members.values()):
                continue
            victims = self._victims_for(member, now)
            if victims is None:
                if self._has_place(member, []):
                    return  # only memory is missing: it goes to the first in line
                # Those behind it are no more urgent, so they find no place either.
                full = member.priority is not Priority.HIGH and not self._preemptable(member.rank, now)
                continue
            for victim in victims:
                victim.times += 1
                self._suspend(victim, plan, now)
            self._run(member, plan, now)
        self._narrow(plan, now)

    def _victims_for(self, member: Member, now: float) -> list[Member] | None:
        """The sequences to suspend so that member can run, possibly none; None if it has to wait."""
        victims: list[Member] = []
        pool = self._preemptable(member.rank, now)
        while not (self._has_place(member, victims) and self._has_memory(member, victims)):
            if not pool:
                return [] if self._goes_beyond(member) else None
            victims.append(pool.pop(0))
        return victims

    def _goes_beyond(self, member: Member) -> bool:
        """Whether a HIGH sequence that can take no place runs beyond the slots."""
        high = sum(other.runs and other.priority is Priority.HIGH for other in self._members.values())
        may = self._limits.suspends and self._limits.suspensions > 0 and member.priority is Priority.HIGH
        return may and high < max(1, self.slots() // 2) and self._has_memory(member, [], self._limits.free_bytes)

    def _has_place(self, member: Member, without: list[Member]) -> bool:
        taken = [other for other in self._members.values() if other.runs and not other.extra and other not in without]
        places = self.slots() if member.priority is Priority.HIGH else self._width()
        return member.extra or len(taken) < places

    def _has_memory(self, member: Member, without: list[Member], most: int = 0) -> bool:
        """Whether the caches of those that run and of member fit the memory for caches, and `most` bytes if it is set.

        One sequence alone always fits.
        """
        running = [other for other in self._members.values() if other.runs and other not in without]
        needed = batch_kv_bytes((other.longest for other in (*running, member)), self._limits.kv)
        return not running or all(needed <= room for room in (self._limits.kv_bytes, most) if room)

    def _preemptable(self, rank: int, now: float) -> list[Member]:
        """The running sequences that are less urgent than rank and may be suspended, the first to go in front."""
        pool = [
            member
            for member in self._members.values()
            if self._limits.suspends
            and member.runs
            and not member.extra
            and member.rank > rank
            and member.times < self._limits.suspensions
            and member.stood(now) < self._limits.suspended_s
        ]
        return sorted(pool, key=lambda member: (-member.rank, member.times, -member.order))

    def _width(self) -> int:
        """How many sequences may run; fewer than there are slots while a HIGH answer is being written.

        Half of the slots that HIGH leaves are used in any case: an engine whose shortest step misses the target would
        starve the others.
        """
        slots = self.slots()
        high = sum(member.priority is Priority.HIGH for member in self._in(Stage.DECODING))
        if not high:
            return slots
        least = high + (slots - high + 1) // 2
        return max(least, self.pace.width_within(self._limits.target_s, slots))

    def _narrow(self, plan: Plan, now: float) -> None:
        """Suspend what a HIGH answer cannot have beside it. A width that has fallen otherwise suspends none."""
        if all(member.priority is not Priority.HIGH for member in self._in(Stage.DECODING)):
            return
        beyond = sum(member.runs and not member.extra for member in self._members.values()) - self._width()
        if beyond > 0:
            for member in self._preemptable(RANK[Priority.HIGH], now)[:beyond]:
                if member.key not in plan.resume:
                    self._suspend(member, plan, now)

    def _suspend(self, member: Member, plan: Plan, now: float) -> None:
        member.stage, member.since = Stage.SUSPENDED, now
        if member.depth:
            member.kept_bytes = self._limits.kv.of(member.depth)
        plan.suspend.append(member.key)

    def _run(self, member: Member, plan: Plan, now: float) -> None:
        if member.stage is Stage.SUSPENDED:
            member.stood_s = member.stood(now)
            member.kept_bytes = 0
            plan.resume.append(member.key)
        if not member.depth and (load := self.reuse.begin(member, self._suspended_bytes())) is not None:
            plan.load.append(load)
        member.stage = Stage.READING if member.left else Stage.DECODING

    def _drop_beyond_budget(self, plan: Plan) -> None:
        kept = [member for member in self._in(Stage.SUSPENDED) if member.kept_bytes]
        kept.sort(key=lambda member: (member.rank, member.order))
        while kept and self._suspended_bytes() > self._limits.kept_bytes:
            self._drop(kept.pop(), plan)

    def _suspended_bytes(self) -> int:
        return sum(member.kept_bytes for member in self._in(Stage.SUSPENDED))

    def _drop(self, member: Member, plan: Plan) -> None:
        # The token that was sampled last is not in the cache.
        member.left += member.depth + (0 if member.left else 1)
        member.depth = member.kept_bytes = 0
        plan.drop.append(member.key)

    # ---- work

    def _work(self, plan: Plan, now: float) -> None:
        reading = [member for member in self._in(Stage.READING) if not member.joins]
        joining = [member for member in self._in(Stage.READING) if member.joins]
        decoding = self._in(Stage.DECODING) + joining
        self._decide(plan, decoding, reading, now)
        if plan.step:
            for member in joining:
                member.left, member.stage = 0, Stage.DECODING
                plan.join.append(member.key)

    def _decide(self, plan: Plan, decoding: list[Member], reading: list[Member], now: float) -> None:
        priority = self._note_standing(decoding, reading, now)
        if priority is None:
            plan.step = bool(decoding)
        elif not decoding:
            targets = _LONG_PIECE_TARGETS if self._reads_at_once(priority, reading) else 1.0
            plan.read = self._piece(priority, reading, targets * self._limits.target_s)
        elif priority is Priority.HIGH:
            self._read_high(plan, decoding, reading, now)
        elif self._just_read and not self._may_pause(priority, decoding, reading, now):
            plan.step = True
        else:
            plan.read = self._piece(priority, reading, self._beside(decoding))

    def _reads_at_once(self, priority: Priority, reading: list[Member]) -> bool:
        """Whether prompts are read in long pieces while no answer is written: HIGH, and a short rest of a lone MEDIUM.

        Each piece is a pass over all weights. For a few tokens, such as those of a conversation's next turn, several
        passes take much longer than one.
        """
        if priority is not Priority.MEDIUM or len(self._members) > 1:
            return priority is Priority.HIGH
        rate = self.pace.reading_rate(reading[0].depth)
        return rate is not None and reading[0].left <= rate * _LONG_PIECE_TARGETS * self._limits.target_s

    def _note_standing(self, decoding: list[Member], reading: list[Member], now: float) -> Priority | None:
        """Note since when answers and prompts stand still. Returns the priority whose prompts are next, None if none.

        That is the most urgent one, unless another has waited for `hold_s`.
        """
        if not decoding:
            self._standing_since = None
        elif self._standing_since is None:
            self._standing_since = now
        waiting = {member.priority for member in reading}
        self._unread_since = {priority: self._unread_since.get(priority, now) for priority in waiting}
        overdue = [priority for priority in waiting if now - self._unread_since[priority] >= self._limits.hold_s]
        if overdue:
            return min(overdue, key=lambda priority: (self._unread_since[priority], -RANK[priority]))
        return min(waiting, key=lambda priority: RANK[priority], default=None)

    def _read_high(self, plan: Plan, decoding: list[Member], reading: list[Member], now: float) -> None:
        """Read HIGH prompts while others stand still, unless those have stood long enough."""
        target_s, hold_s, stood_s = self._limits.target_s, self._limits.hold_s, self._stood_s(now)
        if stood_s >= hold_s:
            plan.step = True
        elif all(member.priority is not Priority.HIGH for member in decoding):
            seconds = min(_LONG_PIECE_TARGETS * target_s, hold_s - stood_s)
            plan.read = self._piece(Priority.HIGH, reading, seconds)
        elif stood_s + self._seconds_to_read(reading) <= 2 * target_s:
            plan.read = self._piece(Priority.HIGH, reading, 2 * target_s)
        elif self._just_read:
            plan.step = True
        else:
            plan.read = self._piece(Priority.HIGH, reading, target_s)

    def _stood_s(self, now: float) -> float:
        """How long the answers have stood still."""
        return 0.0 if self._standing_since is None else now - self._standing_since

    def _may_pause(self, priority: Priority, decoding: list[Member], reading: list[Member], now: float) -> bool:
        """Whether answers wait for more than one piece of the prompts of priority.

        A step costs about as much for few sequences as for many. So answers wait, at most for `hold_s`, if they are
        fewer than the prompts and not more urgent.
        """
        readers = sum(member.priority is priority for member in reading)
        as_urgent = all(member.rank >= RANK[priority] for member in decoding)
        return as_urgent and len(decoding) < readers and self._stood_s(now) < self._limits.hold_s

    def _beside(self, decoding: list[Member]) -> float:
        """How long a piece may take beside these answers: with a step, HIGH's wait for the inter-token target."""
        if all(member.priority is not Priority.HIGH for member in decoding):
            return self._limits.target_s
        return self._limits.target_s - self.pace.step_s(len(decoding))

    def _seconds_to_read(self, reading: list[Member]) -> float:
        """The expected time to read the HIGH prompts to their ends; 0 if no rate was measured."""
        high = [member for member in reading if member.priority is Priority.HIGH]
        rate = self.pace.reading_rate(max(member.depth for member in high))
        return 0.0 if rate is None else sum(member.left for member in high) / rate

    def _piece(self, priority: Priority, reading: list[Member], seconds: float) -> list[tuple[int, int]]:
        """What is read of the prompts of one priority within so many seconds.

        Those that are about as deep as the shallowest take turns with those about as deep as the oldest: short prompts
        are not behind long ones, and a long one is not behind an endless row of short ones. In both groups the oldest
        come first, so that a group stays together until one of it has been read.
        """
        own = sorted((m for m in reading if m.priority is priority), key=lambda member: member.order)
        depth = own[0].depth if self._pieces % 2 else min(member.depth for member in own)
        similar = [member for member in own if abs(member.depth - depth) <= _SIMILAR_TOKENS]
        if similar[0].exact_prompt:
            return [(similar[0].key, similar[0].exact_piece)]
        similar = [member for member in similar if not member.exact_prompt]
        rate = self.pace.reading_rate(depth)
        tokens = _FIRST_PIECE_TOKENS if rate is None else int(rate * seconds)
        least = _LEAST_HIGH_TOKENS if priority is Priority.HIGH else _LEAST_PIECE_TOKENS
        tokens = min(max(tokens, least), self._limits.piece_tokens)
        count = max(1, min(len(similar), tokens // _LEAST_PIECE_TOKENS))
        group = similar[:count]
        each = max(1, tokens // count)
        if priority is Priority.HIGH:
            # One last token alone would cost a pass of its own.
            pieces = [(member, member.left if member.left <= each + 1 else each) for member in group]
        else:
            pieces = [(member, min(each, member.left - 1)) for member in group]
        return [(member.key, member.within_mark(tokens)) for member, tokens in pieces]

    def _in(self, stage: Stage) -> list[Member]:
        return [member for member in self._members.values() if member.stage is stage]
