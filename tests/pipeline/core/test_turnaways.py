"""How often a busy engine turned a request away."""

from __future__ import annotations

from pipeline.core import turnaways
from pipeline.core.turnaways import TurnAways


def test_each_request_is_counted_by_itself():
    counts = TurnAways()
    assert [counts.count("a", 1), counts.count("a", 1), counts.count("b", 1), counts.count("a", 2)] == [1, 2, 1, 1]


def test_the_one_that_was_turned_away_longest_ago_is_forgotten_first(monkeypatch):
    monkeypatch.setattr(turnaways, "_MOST", 2)
    counts = TurnAways()
    for name in ("a", "b", "a", "c"):
        counts.count(name, 1)
    assert (counts.count("a", 1), counts.count("b", 1)) == (3, 1)
