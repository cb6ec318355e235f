"""A sorted set of sequences that counts what is below one."""

from __future__ import annotations

from bisect import bisect_left

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pipeline.core import sequences
from pipeline.core.sequences import Sequences


def filled(*members):
    found = Sequences()
    for member in members:
        found.add(member)
    return found


def test_an_empty_set_has_nothing_below_anything():
    assert (len(Sequences()), Sequences().rank(7), 7 in Sequences()) == (0, 0, False)
    assert not Sequences().discard(7)


def test_the_rank_counts_what_is_below_whether_or_not_the_sequence_is_a_member():
    found = filled(2, 4, 8)
    assert [found.rank(sequence) for sequence in (0, 2, 3, 4, 8, 9)] == [0, 0, 1, 1, 2, 3]


def test_a_member_is_added_once():
    found = filled(5)
    assert not found.add(5)
    assert (len(found), list(found)) == (1, [5])


def test_what_is_below_a_sequence_is_removed_across_chunks(monkeypatch):
    monkeypatch.setattr(sequences, "CHUNK", 3)
    found = filled(*range(1, 20))
    found.discard_below(11)
    assert (len(found), list(found)) == (9, list(range(11, 20)))
    assert found.rank(15) == 4
    found.discard_below(100)
    assert (len(found), list(found), found.rank(100)) == (0, [], 0)


@pytest.mark.parametrize("count", [1, 511, 512, 513, 5000])
def test_a_long_set_ranks_as_a_sorted_list_does(count):
    members = list(range(10, 10 + 3 * count, 3))
    found = filled(*members)
    assert all(found.rank(sequence) == bisect_left(members, sequence) for sequence in range(10 + 3 * count + 5))


class SortedSet(RuleBasedStateMachine):
    """Any order of calls, against a plain set."""

    numbers = st.integers(0, 60)

    @initialize()
    def begin(self):
        self.chunk, sequences.CHUNK = sequences.CHUNK, 4
        self.found, self.model = Sequences(), set()

    def teardown(self):
        sequences.CHUNK = self.chunk

    @rule(number=numbers)
    def add(self, number):
        assert self.found.add(number) == (number not in self.model)
        self.model.add(number)

    @rule(number=numbers)
    def discard(self, number):
        assert self.found.discard(number) == (number in self.model)
        self.model.discard(number)

    @rule(number=numbers)
    def discard_below(self, number):
        self.found.discard_below(number)
        self.model = {member for member in self.model if member >= number}

    @rule(number=numbers)
    def rank(self, number):
        assert self.found.rank(number) == sum(member < number for member in self.model)
        assert (number in self.found) == (number in self.model)

    @invariant()
    def members_are_those_of_the_model(self):
        assert list(self.found) == sorted(self.model)
        assert len(self.found) == len(self.model)


TestSortedSet = SortedSet.TestCase
TestSortedSet.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
