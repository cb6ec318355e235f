"""The index of kept prefixes, against a plain model: the tokens of each handle, and all sequences that were kept."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.kv import KvSize
from pipeline.core.prefixes import Prefixes, common_tokens

BYTES = 10
ROOM = 1 << 40


class Store:
    """The index, and what an engine would hold: the tokens of each handle instead of arrays."""

    def __init__(self, *, snapshots: bool, room: int = ROOM) -> None:
        self.prefixes = Prefixes(snapshots=snapshots, size=KvSize(BYTES))
        self.room = room
        self.held: dict[int, list[int]] = {}

    def keep(self, scope: str, tokens: list[int], *, least: int = 1) -> bool:
        part = self.prefixes.keep(scope, tokens, least=least, room=self.room)
        if part is not None:
            for split in part.splits:
                whole = self.held[split.handle]
                self.held[split.head], self.held[split.handle] = whole[: split.at], whole[split.at :]
            self.held[part.handle] = tokens[part.start : part.end]
        for handle in self.prefixes.shrink(self.room):
            del self.held[handle]
        return part is not None

    def find(self, scope: str, tokens: list[int], *, align: int = 1) -> int:
        peeked = self.prefixes.peek(scope, tokens, align=align)
        hit = self.prefixes.find(scope, tokens, align=align)
        assert peeked == hit
        loaded = [token for handle, count in hit.parts for token in self.held[handle][:count]]
        assert loaded == tokens[: hit.tokens]
        assert hit.tokens % align == 0
        return hit.tokens

    def check(self) -> None:
        assert self.prefixes.nbytes == BYTES * sum(map(len, self.held.values())) <= self.room
        assert len(self.prefixes) == len(self.held)


def alike(first: list[int], second: list[int]) -> int:
    """How many tokens two lists have in common from the start."""
    shorter = min(len(first), len(second))
    return next((at for at in range(shorter) if first[at] != second[at]), shorter)


tokens_ = st.lists(st.integers(0, 2), min_size=1, max_size=12)
# A turn: whose it is, which earlier conversation it goes on from, where it leaves that one, and what it adds.
turns = st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 50), st.integers(0, 40), tokens_), max_size=40)


def conversations(said: list[tuple[str, int, int, list[int]]]) -> Iterator[tuple[str, list[int]]]:
    """Conversations that grow and fork."""
    known: list[list[int]] = [[]]
    for scope, base, cut, added in said:
        known.append(known[base % len(known)][:cut] + added)
        yield scope, known[-1]


@pytest.mark.parametrize("snapshots", [False, True])
@given(turns)
def test_the_longest_kept_head_is_found(snapshots, said):
    store, kept = Store(snapshots=snapshots), []
    for scope, tokens in conversations(said):
        own = [other for whose, other in kept if whose == scope]
        if snapshots:
            longest = max((len(other) for other in own if tokens[: len(other)] == other), default=0)
        else:
            longest = max((alike(other, tokens) for other in own), default=0)
        assert store.find(scope, tokens) == longest
        assert store.find(scope, tokens, align=4) <= longest
        assert store.keep(scope, tokens) == (longest < len(tokens))
        assert store.find(scope, tokens) == len(tokens)
        kept.append((scope, tokens))
        store.check()
    if not snapshots:  # what several have in common is kept once
        heads = {(scope, tuple(tokens[:end])) for scope, tokens in kept for end in range(1, len(tokens) + 1)}
        assert store.prefixes.nbytes == BYTES * len(heads)


@pytest.mark.parametrize("snapshots", [False, True])
@given(turns, st.integers(0, 60 * BYTES))
def test_a_budget_holds_and_what_was_used_last_stays(snapshots, said, room):
    store = Store(snapshots=snapshots, room=room)
    for scope, tokens in conversations(said):
        store.find(scope, tokens)
        kept = store.keep(scope, tokens)
        store.check()
        assert store.find(scope, tokens) <= len(tokens)
        if kept and len(tokens) * BYTES <= room:
            assert store.find(scope, tokens) == len(tokens)
    store.room = 0
    for handle in store.prefixes.shrink(0):
        del store.held[handle]
    store.check()
    assert not store.prefixes._roots


def test_an_older_conversation_goes_before_the_head_that_it_shares_with_a_newer_one():
    store = Store(snapshots=False, room=25 * BYTES)
    head = [1] * 10
    store.keep("a", head + [2] * 10)
    store.keep("a", head + [3] * 10)
    assert store.find("a", head + [2] * 10) == 10
    assert store.find("a", head + [3] * 10) == 20


def test_a_short_rest_and_what_exceeds_the_budget_are_not_kept():
    store = Store(snapshots=False, room=20 * BYTES)
    assert store.keep("a", [1] * 10)
    assert not store.keep("a", [1] * 10 + [2] * 5, least=6)
    assert not store.keep("a", [2] * 21)
    assert store.find("a", [2] * 21) == 0
    assert store.find("a", [1] * 10) == 10


def test_the_measured_size_counts():
    prefixes = Prefixes(snapshots=True, size=KvSize(BYTES, 7))
    part = prefixes.keep("a", [1, 2, 3], room=ROOM)
    assert part is not None
    assert prefixes.nbytes == 3 * BYTES + 7
    prefixes.measured(part.handle, 4000)
    assert prefixes.nbytes == 4000
    prefixes.measured(99, 1)
    assert prefixes.shrink(3999) == [part.handle]
    assert prefixes.nbytes == 0


@given(tokens_, tokens_, st.integers(0, 12))
def test_common_tokens_are_counted(first, second, at):
    assert common_tokens(first, second, at) == alike(first, second[at:])
