"""The words of the batch's planner: its bounds, the sequences and their stages, and the plan of one turn."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Literal, NamedTuple

from pipeline.core.kv import KvSize
from pipeline.core.prefixes import KeptPart
from pipeline.core.stored import CacheFile, Due
from pipeline.wire.subjects import Priority

EXACT_PIECE_TOKENS: Final = 32
"""The size of a piece of an exact sequence's prompt. Another size makes another text of the same seed."""

Reuse = Literal["", "segments", "snapshots"]
"""How the caches of an engine can be kept for later sequences: not, cut at any token, or whole."""

RANK: Final = {priority: rank for rank, priority in enumerate(Priority)}


def batch_kv_bytes(longest_tokens: Iterable[int], size: KvSize) -> int:
    """The caches of a batch whose sequences have their greatest lengths. All are padded to the longest."""
    lengths = list(longest_tokens)
    return len(lengths) * size.padded(max(lengths)) if lengths else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """The bounds of one engine's batch.

    Attributes:
        slots: sequences that run at once; 0 if their number is found.
        most_slots: the most that is found; 0 for no limit.
        piece_tokens: the most prompt tokens of one piece, of all its sequences together.
        target_s: the inter-token target.
        hold_s: how long other answers stand still in a row while HIGH prompts are read.
        suspensions: how often one sequence may lose its place to a more urgent one.
        suspended_s: how long one sequence may stand still in all.
        kept_bytes: the budget of the caches that are kept: of suspended sequences, and of earlier prompts.
        kv_bytes: memory for the caches of the sequences that run; 0 for no limit.
        free_bytes: memory that was free when the model had been loaded, which limits what is found; 0 if not known.
        suspends: whether the engine can suspend a sequence.
        kv_bytes_per_token, kv_bytes_fixed, kv_windows: the measured size of one sequence's cache, as in `KvSize`.
        reuse: how caches are kept for later sequences.
    """

    slots: int
    piece_tokens: int
    target_s: float
    hold_s: float
    suspensions: int
    suspended_s: float
    kept_bytes: int
    kv_bytes: int = 0
    free_bytes: int = 0
    most_slots: int = 0
    suspends: bool = True
    kv_bytes_per_token: int = 0
    kv_bytes_fixed: int = 0
    kv_windows: tuple[tuple[int, int], ...] = ()
    reuse: Reuse = ""

    @property
    def kv(self) -> KvSize:
        """The size of one sequence's cache."""
        return KvSize(self.kv_bytes_per_token, self.kv_bytes_fixed, self.kv_windows)


class Stage(Enum):
    """Where a sequence is."""

    WAITING = "waiting"
    READING = "reading"
    DECODING = "decoding"
    SUSPENDED = "suspended"


class ReusablePrompt(NamedTuple):
    """The tokens of a prompt, and who can reuse what is computed for it.

    Attributes:
        tokens: all that are known when its sequence comes; empty if nothing is kept.
        scope: sequences of one scope use each other's caches.
        marks: depths at which a cache that cannot be cut is kept.
    """

    tokens: Sequence[int] = ()
    scope: Hashable = None
    marks: Sequence[int] = ()


@dataclass(slots=True, eq=False)
class Member:
    """One sequence.

    Attributes:
        order: of arrival.
        left: tokens that are still to be read before the next one can be sampled.
        depth: tokens in its cache.
        longest: the most tokens that it may have.
        extra: whether it runs beyond the slots, because another worker had begun it.
        exact_prompt: the tokens of its prompt if it is exact; 0 if it is not.
        times: how often it lost its place to a more urgent one.
        stood_s: how long it has been suspended in all, without the present time.
        since: when it was suspended.
        kept_bytes: the size of its cache while it is suspended; 0 if it has none.
        prompt: its tokens when it came.
        heads: how many tokens its prompt shares with those of others, by key.
        expected: tokens that it will not have to read, as is expected while it waits. They are not in `left`.
        begun: whether it ran before.
    """

    key: int
    priority: Priority
    order: int
    left: int
    longest: int
    extra: bool = False
    exact_prompt: int = 0
    stage: Stage = Stage.WAITING
    depth: int = 0
    times: int = 0
    stood_s: float = 0.0
    since: float = 0.0
    kept_bytes: int = 0
    prompt: ReusablePrompt = field(default_factory=ReusablePrompt)
    heads: dict[int, int] = field(default_factory=dict)
    expected: int = 0
    begun: bool = False

    @property
    def runs(self) -> bool:
        """Whether it is in the batch."""
        return self.stage in (Stage.READING, Stage.DECODING)

    @property
    def rank(self) -> int:
        """Its priority as a number, 0 for the most urgent."""
        return RANK[self.priority]

    @property
    def joins(self) -> bool:
        """Whether its last token is read by a step, with those of the others, and not by a pass for it alone."""
        return self.left == 1 and self.priority is not Priority.HIGH and not self.exact_prompt

    @property
    def exact_piece(self) -> int:
        """How many tokens of an exact sequence are read next. The last one of its prompt is read alone."""
        until = min(self.depth + EXACT_PIECE_TOKENS - self.depth % EXACT_PIECE_TOKENS, self.exact_prompt - 1)
        return max(1, until - self.depth)

    def within_mark(self, tokens: int) -> int:
        """So many tokens, but not beyond the next mark."""
        return min(
            (mark - self.depth for mark in self.prompt.marks if self.depth < mark < self.depth + tokens), default=tokens
        )

    def stood(self, now: float) -> float:
        """How long it has been suspended in all, in seconds."""
        return self.stood_s + (now - self.since if self.stage is Stage.SUSPENDED else 0.0)


class Keep(NamedTuple):
    """Keep a part of the cache of the sequence `key`, which stays as it is."""

    key: int
    part: KeptPart


class FetchKept(NamedTuple):
    """Keep a part in memory that is in these files: one after another, from `start` or an earlier token on."""

    part: KeptPart
    files: list[CacheFile]


class Restore(NamedTuple):
    """Give the sequence `key` a cache of `tokens` tokens, made of these parts: handles, and tokens of each.

    `first` is whether nothing of the sequence was read before. `fetch` comes first, if it is set.
    """

    key: int
    tokens: int
    parts: list[tuple[int, int]]
    first: bool
    fetch: FetchKept | None = None


class StoreKept(NamedTuple):
    """Write a file, made of these parts, which are in memory: handles, and the first and the last token of each."""

    due: Due
    parts: list[tuple[int, int, int]]


@dataclass(slots=True)
class Plan:
    """One turn. To be carried out in this order; at most one of `read` and `step` is set.

    Attributes:
        keep: keep these for later sequences.
        suspend: take these out of the batch, with their caches.
        drop: free the caches of these suspended sequences.
        load: these go on from what was kept.
        resume: put these back.
        free: free what was kept under these handles.
        read: how many tokens to read of each of these prompts. One that is read to its end yields a token.
        join: of these prompts the last token is left. The step reads it, and yields their first token.
        step: one token for each sequence whose prompt has been read.
        wait_s: for so long nothing is done, unless a request comes.
    """

    keep: list[Keep] = field(default_factory=list)
    suspend: list[int] = field(default_factory=list)
    drop: list[int] = field(default_factory=list)
    load: list[Restore] = field(default_factory=list)
    resume: list[int] = field(default_factory=list)
    free: list[int] = field(default_factory=list)
    read: list[tuple[int, int]] = field(default_factory=list)
    join: list[int] = field(default_factory=list)
    step: bool = False
    wait_s: float = 0.0
