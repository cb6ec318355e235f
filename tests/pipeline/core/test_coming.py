"""Announcements that were not followed by a delivery, for a short time."""

from __future__ import annotations

from pipeline.core.coming import Coming


def test_a_request_that_was_announced_is_on_its_way_until_it_is_taken():
    coming = Coming()
    for sequence in (1, 2, 3):
        coming.announced(sequence, 10.0)
    coming.taken(2, 10.1)
    assert coming.count(10.1) == 2


def test_an_announcement_that_comes_after_the_delivery_counts_for_nothing():
    coming = Coming()
    coming.taken(7, 10.0)
    coming.announced(7, 10.01)
    assert coming.count(10.02) == 0


def test_an_announcement_is_forgotten_soon():
    coming = Coming()
    coming.announced(1, 10.0)
    coming.announced(2, 10.4)
    assert coming.count(10.6) == 1
    assert coming.count(11.0) == 0
