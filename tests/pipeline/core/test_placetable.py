"""A hash table in plain arrays."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pipeline.core.placetable import PlaceTable, table_key


def table():
    return PlaceTable(lambda _: True)


def test_a_key_that_was_never_put_has_no_value():
    found = table()
    assert found.find(0) is None
    found.remove(0)
    assert len(found) == 0


def test_the_extreme_keys_and_values_are_kept():
    found = table()
    found.put(0, 1)
    found.put(2**64 - 1, 2**64 - 1)
    assert (found.find(0), found.find(2**64 - 1), len(found)) == (1, 2**64 - 1, 2)


def test_many_names_keep_their_values():
    found = table()
    for number in range(1, 20_001):
        found.put(table_key(f"r{number}"), number)
    assert all(found.find(table_key(f"r{number}")) == number for number in range(1, 20_001))
    assert sorted(found) == list(range(1, 20_001))


def test_entries_that_do_not_count_any_more_do_not_pile_up():
    alive = {1}
    found = PlaceTable(alive.__contains__)
    found.put(1, 1)
    for number in range(2, 5000):
        found.put(number, number)
    assert len(found) < 100
    assert found.find(1) == 1


class Table(RuleBasedStateMachine):
    """Any order of calls, against a dict. All keys fall into one part, and most of them collide."""

    keys = st.integers(0, 3).flatmap(lambda low: st.integers(0, 12).map(lambda high: low | high << 16))

    def __init__(self):
        super().__init__()
        self.table, self.model = table(), {}

    @rule(key=keys, value=st.integers(1, 2**64 - 1))
    def put(self, key, value):
        self.table.put(key, value)
        self.model[key] = value

    @rule(key=keys)
    def remove(self, key):
        self.table.remove(key)
        self.model.pop(key, None)

    @invariant()
    def values_are_those_of_the_model(self):
        assert len(self.table) == len(self.model)
        assert sorted(self.table) == sorted(self.model.values())
        for low in range(4):
            for high in range(13):
                key = low | high << 16
                assert self.table.find(key) == self.model.get(key)


TestTable = Table.TestCase
TestTable.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
