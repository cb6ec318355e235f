"""What a dead worker had begun, and nothing else, is looked for when its leases have run out, and shared."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.takeover import AGAIN_S, Takeover

LEASE_S = 3.0


def takeover(me="a", now=0.0):
    return Takeover(me, LEASE_S, now)


def settled(me="a", now=0.0, **peers):
    """One whose first look has passed, and which has just heard its peers hold so many."""
    subject = takeover(me, now - LEASE_S)
    subject.look({}, {}, now)
    for name, held in peers.items():
        subject.heard(name, held, now)
    return subject


def test_a_worker_that_has_just_come_looks_when_the_leases_of_the_dead_have_run_out_and_takes_all():
    subject = takeover(now=10.0)
    assert subject.next_look() == 10.0 + LEASE_S
    assert subject.look({"high": 3, "low": 1}, {"low": 1}, 13.0) == {"high": 3}


def test_while_everybody_speaks_there_is_nothing_to_look_for():
    subject = settled("a", b={"high": 2})
    for tick in range(1, 50):
        now = float(tick)
        assert subject.next_look() > now
        subject.heard("b", {"high": 2}, now)
    assert settled("a").next_look() == math.inf


def test_a_worker_that_falls_silent_is_looked_for_a_lease_after_its_last_word():
    subject = settled("a", b={"high": 2, "low": 1})
    assert subject.next_look() == LEASE_S
    assert subject.look({"high": 2, "low": 1}, {}, LEASE_S) == {"high": 2, "low": 1}


def test_what_the_living_hold_is_left_to_them():
    subject = settled("a", b={"high": 2}, c={"high": 1})
    subject.heard("c", {"high": 1}, 2.5)
    assert subject.look({"high": 5, "low": 1}, {"high": 2, "low": 1}, LEASE_S) == {"high": 1}


def test_a_worker_that_leaves_is_looked_after_at_once():
    subject = settled("a", b={"high": 2})
    subject.left("b", 1.0)
    assert subject.next_look() == 1.0
    assert subject.look({"high": 2}, {}, 1.0) == {"high": 2}
    subject.left("b", 1.1)
    subject.left("nobody", 1.1)
    assert subject.next_look() == 1.0 + AGAIN_S


def test_the_most_urgent_come_first_and_the_living_share_them():
    subject = settled("a", b={}, c={"high": 1, "low": 3})
    subject.heard("b", {}, 2.0)
    assert subject.look({"high": 1, "medium": 0, "low": 3}, {}, LEASE_S) == {"high": 1, "low": 1}


def test_the_workers_look_one_after_another():
    looks = [
        settled(me, **{name: {} for name in "abcd" if name not in (me, "d")}, d={"high": 1}).next_look() for me in "abc"
    ]
    assert looks == sorted(looks)
    assert len(set(looks)) == 3
    assert looks[-1] < LEASE_S + 0.5


def test_looking_ends_when_nothing_is_orphaned_any_more_or_after_a_lease():
    subject = settled("a", b={"high": 2})
    assert subject.look({"high": 2}, {}, LEASE_S)
    assert subject.next_look() == LEASE_S + AGAIN_S
    assert subject.look({"high": 2}, {"high": 2}, LEASE_S + AGAIN_S) == {}
    assert subject.next_look() == math.inf
    subject = settled("a", b={"high": 2})
    looks, now = 0, LEASE_S
    while (now := subject.next_look()) < math.inf:
        subject.look({"high": 1}, {}, now)
        looks += 1
    assert looks <= LEASE_S / AGAIN_S + 1


def test_after_an_outage_nobody_is_taken_for_dead_who_has_had_no_lease_to_speak():
    subject = settled("a", b={"high": 2})
    subject.begin(100.0)
    assert subject.next_look() == 100.0 + LEASE_S
    subject.heard("b", {"high": 2}, 102.9)
    assert subject.look({"high": 2}, {}, 103.0) == {}


def test_ones_own_word_is_no_peers():
    subject = settled("a")
    subject.heard("a", {"high": 1}, 1.0)
    assert subject.next_look() == math.inf


holdings = st.dictionaries(st.sampled_from(["high", "medium", "low"]), st.integers(0, 4))


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from("bcde"), st.tuples(st.booleans(), holdings), min_size=1), holdings)
def test_all_that_the_dead_held_is_taken_once_within_a_lease_of_looking(others, own):
    """Workers that speak truly, some of whom die at 0; whatever one takes the next one sees."""
    everyone = {"a": (True, own)} | others
    living = {name: dict(held) for name, (lives, held) in everyone.items() if lives}
    orphans = {
        consumer: sum(held.get(consumer, 0) for lives, held in everyone.values() if not lives)
        for consumer in ("high", "medium", "low")
    }
    before, taken = sum(orphans.values()), 0
    subjects = {me: settled(me, **{name: held for name, (_, held) in everyone.items()}) for me in living}
    for tick in range(int(2 * LEASE_S / 0.05) + 1):
        now = tick * 0.05
        for me, subject in subjects.items():
            for name, held in living.items():
                subject.heard(name, dict(held), now)
            if subject.next_look() > now:
                continue
            held = {c: orphans[c] + sum(theirs.get(c, 0) for theirs in living.values()) for c in orphans}
            for consumer, count in subject.look(held, living[me], now).items():
                assert 0 < count <= orphans[consumer]
                assert now >= LEASE_S
                orphans[consumer] -= count
                living[me][consumer] = living[me].get(consumer, 0) + count
                taken += count
    assert taken == before
