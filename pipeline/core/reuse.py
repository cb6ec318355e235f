"""Which sequences go on from the KV cache of an earlier one: what is kept, who uses it, and who waits for it.

- **Kept** is the prompt of a sequence as soon as it has been read, and its answer when it ends. A cache that cannot be
  cut is kept at the marks of the prompt: the end of the system prompt, and the end of the last message.
- **Who waits.** A sequence whose prompt begins like one that is being read waits until that head has been read, and
  then continues from it. Reading it twice at once would take as long, and delay both.
- **Exact** sequences only use what exact sequences have computed in whole pieces. Every product then has the same shape
  as without it.
- **The budget** is the one of the suspended sequences. They come first: prompts are kept in what they leave.
- **Stored** on disk are kept prompts as well, if the settings give room (`pipeline.core.stored`). A sequence whose head
  is stored and not in memory has it fetched before it begins.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from pipeline.core.batch_plan import EXACT_PIECE_TOKENS, BatchLimits, FetchKept, Keep, Member, Restore, Stage, StoreKept
from pipeline.core.prefixes import Prefixes, PrefixHit, common_tokens
from pipeline.core.stored import CacheFile, StoredPrompts

_LEAST_TOKENS: Final = 16
"""A shorter head is neither kept nor used: reading it takes about as long as fetching it."""

_LEAST_SHARED_TOKENS: Final = 64
"""No sequence waits for a shorter head. To read so few tokens of several prompts costs little more than of one."""


class PromptReuse:
    """The kept prompts of one engine. One writer: the batch's planner, which owns the budget.

    Args:
        limits: of the batch.
        stored: the index of what is on disk.
    """

    def __init__(self, limits: BatchLimits, stored: StoredPrompts) -> None:
        self._limits = limits
        self._stored = stored
        self._prefixes = Prefixes(snapshots=limits.reuse == "snapshots", size=limits.kv)
        self._due: list[Member] = []
        self.prompt_tokens = 0
        self.cached_tokens = 0

    @property
    def nbytes(self) -> int:
        """The size of all kept prompts."""
        return self._prefixes.nbytes

    def count_on(self, before: PromptReuse) -> None:
        """This object takes the place of another one, and counts on from there."""
        self.prompt_tokens, self.cached_tokens = before.prompt_tokens, before.cached_tokens

    # ---- before a sequence runs --------------------------------------------------------------------------------------

    def arrived(self, member: Member, others: Iterable[Member]) -> None:
        """A sequence has come. What it will not have to read is taken from what is left to read."""
        if not self._limits.reuse or not member.prompt.tokens:
            return
        expected = self._kept_head(member)
        for other in others:
            if other.prompt.scope == member.prompt.scope and other.stage in (Stage.WAITING, Stage.READING):
                common = common_tokens(other.prompt.tokens, member.prompt.tokens)
                member.heads[other.key] = other.heads[member.key] = common
                expected = max(expected, self._shared(other, member))
        self._expect(member, expected)

    def waits(self, member: Member, others: Iterable[Member]) -> bool:
        """Whether another sequence is reading a head of this one's prompt, which can be used soon."""
        if not member.heads or member.depth:
            return False
        leaders = (
            other
            for other in others
            if other.key in member.heads and other.stage is Stage.READING and other.rank <= member.rank
        )
        most = max((shared for other in leaders if (shared := self._shared(other, member)) > other.depth), default=0)
        if most < _LEAST_SHARED_TOKENS:
            return False
        return most - self._kept_head(member) >= _LEAST_SHARED_TOKENS

    def begin(self, member: Member, suspended_bytes: int) -> Restore | None:
        """A sequence of which nothing is in a cache begins to run. Returns what it goes on from."""
        self._expect(member, 0)
        fetch, hit = None, None
        if self._limits.reuse and member.prompt.tokens:
            scope, usable, align = member.prompt.scope, member.prompt.tokens[: _usable(member)], _align(member)
            fetch = self._fetch(member, suspended_bytes)
            hit = self._prefixes.find(scope, usable, align=align)
        tokens = hit.tokens if hit is not None and hit.tokens >= _LEAST_TOKENS else 0
        first, member.begun = not member.begun, True
        if first:
            self.prompt_tokens += len(member.prompt.tokens)
            self.cached_tokens += tokens
        if hit is None or not tokens:
            return None
        member.left -= tokens
        member.depth = tokens
        return Restore(member.key, tokens, hit.parts, first=first, fetch=fetch)

    def _fetch(self, member: Member, suspended_bytes: int) -> FetchKept | None:
        """What is to be fetched from disk for a sequence; noted as kept in memory."""
        scope, tokens = member.prompt.scope, member.prompt.tokens[: _usable(member)]
        files = self._stored_head(member, self._prefixes.peek(scope, tokens, align=_align(member)).tokens)
        if not files:
            return None
        self._stored.use(files)
        room = max(0, self._limits.kept_bytes - suspended_bytes)
        part = self._prefixes.keep(scope, tokens[: files[-1].end], room=room)
        return None if part is None else FetchKept(part, [file for file in files if file.end > part.start])

    # ---- what is kept ------------------------------------------------------------------------------------------------

    def was_read(self, member: Member, before: int, others: Iterable[Member]) -> None:
        """Some of a prompt was read, from the depth `before`. It is kept with the next plan where that is of use."""
        if not self._limits.reuse or not member.prompt.tokens or member in self._due:
            return
        if self._limits.reuse == "snapshots":
            if member.depth in member.prompt.marks:
                self._due.append(member)
            return
        awaited = any(
            other.stage is Stage.WAITING and before < self._shared(member, other) <= member.depth
            for other in others
            if other.key in member.heads
        )
        if awaited or member.left <= 1:
            self._due.append(member)

    def keep_due(self, suspended_bytes: int) -> list[Keep]:
        """What is to be kept now of the prompts that were read."""
        due, self._due = self._due, []
        kept = []
        for member in due:
            # A short rest of a prompt is kept with the answer.
            least = _LEAST_SHARED_TOKENS if member.left <= 1 else _LEAST_TOKENS
            if keep := self._keep(member, list(member.prompt.tokens[: member.depth]), suspended_bytes, least):
                kept.append(keep)
        return kept

    def ended(self, member: Member, tokens: list[int], suspended_bytes: int) -> Keep | None:
        """A sequence leaves, and the state of these tokens is in its cache. Returns what is to be kept of it."""
        if member in self._due:
            self._due.remove(member)
        if not self._limits.reuse or (member.exact_prompt and self._limits.reuse == "snapshots"):
            return None
        return self._keep(member, tokens, suspended_bytes, _LEAST_TOKENS)

    def measured(self, handle: int, nbytes: int) -> None:
        """The size of what was kept, as it was found."""
        self._prefixes.measured(handle, nbytes)

    def shrink(self, suspended_bytes: int) -> list[int]:
        """Forget what exceeds the budget. Returns the handles to free."""
        return self._prefixes.shrink(max(0, self._limits.kept_bytes - suspended_bytes))

    def clear(self) -> None:
        """All caches in memory are lost."""
        self._due.clear()
        self._prefixes.clear()
        self._stored.clear()

    # ---- what is stored ----------------------------------------------------------------------------------------------

    def next_to_store(self) -> StoreKept | None:
        """What is to be written to disk next; None if there is nothing."""
        while (due := self._stored.next()) is not None:
            hit = self._prefixes.peek(due.scope, due.tokens)
            if hit.tokens == due.file.end:
                return StoreKept(due, _within(hit, due.file.start))
            self._stored.skip()
        return None

    def _keep(self, member: Member, tokens: list[int], suspended_bytes: int, least: int) -> Keep | None:
        if member.exact_prompt:
            whole = min(len(tokens), member.exact_prompt - 1)
            tokens = tokens[: whole - whole % EXACT_PIECE_TOKENS]
        room = max(0, self._limits.kept_bytes - suspended_bytes)
        part = self._prefixes.keep(member.prompt.scope, tokens, least=least, room=room)
        if part is None:
            return None
        self._stored.kept(member.prompt.scope, tokens)
        return Keep(member.key, part)

    def _kept_head(self, member: Member) -> int:
        scope, tokens = member.prompt.scope, member.prompt.tokens[: _usable(member)]
        kept = self._prefixes.peek(scope, tokens, align=_align(member)).tokens
        stored = self._stored_head(member, kept)
        return stored[-1].end if stored else kept

    def _stored_head(self, member: Member, kept: int) -> list[CacheFile]:
        """The files of a head of a prompt, if fetching them saves enough beside so many tokens that are in memory."""
        files = self._stored.head(member.prompt.scope, member.prompt.tokens[: _usable(member)])
        return files if files and files[-1].end - kept >= _LEAST_SHARED_TOKENS else []

    def _shared(self, leader: Member, member: Member) -> int:
        """How many tokens of member's prompt will be kept while leader's is read."""
        align, common = _align(member), min(member.heads[leader.key], _usable(member))
        if self._limits.reuse == "snapshots":
            return max((mark for mark in leader.prompt.marks if mark <= common), default=0)
        return common - common % align

    def _expect(self, member: Member, tokens: int) -> None:
        member.left += member.expected - tokens
        member.expected = tokens


def _within(hit: PrefixHit, start: int) -> list[tuple[int, int, int]]:
    """The parts of a hit from the token `start` on: handles, and the first and the last token of each."""
    parts, at = [], 0
    for handle, tokens in hit.parts:
        if at + tokens > start:
            parts.append((handle, max(0, start - at), tokens))
        at += tokens
    return parts


def _usable(member: Member) -> int:
    """How many tokens can be taken over at most: the last one has to be read, because it is followed by sampling."""
    return (member.exact_prompt or len(member.prompt.tokens)) - 1


def _align(member: Member) -> int:
    return EXACT_PIECE_TOKENS if member.exact_prompt else 1
