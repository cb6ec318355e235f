"""Which of several processes acts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.leadership import HOLD_S, LEASE_S, Leadership


def standing_by(sequence=1, heard_at=0.0):
    found = Leadership()
    found.heard(sequence, heard_at)
    return found


def test_a_holder_stops_before_its_lease_runs_out_counted_from_when_it_sent():
    found = Leadership()
    assert not found.leads(0.0)
    found.renewed(1, sent_at=10.0)
    assert found.leads(10.0)
    assert found.leads(10.0 + HOLD_S - 0.01)
    assert not found.leads(10.0 + HOLD_S)
    assert found.holds, "until it learns of another one"
    assert HOLD_S < LEASE_S


def test_a_renewal_prolongs():
    found = Leadership()
    found.renewed(1, sent_at=0.0)
    found.renewed(2, sent_at=2.0)
    assert found.leads(2.0 + HOLD_S - 0.01)


def test_a_holder_that_hears_of_another_one_stops_at_once():
    found = Leadership()
    found.renewed(1, sent_at=0.0)
    found.heard(2, 0.5)
    assert (found.leads(0.5), found.holds, found.sequence) == (False, False, 2)


def test_a_holder_that_lost_its_connection_acts_again_once_it_has_renewed():
    found = Leadership()
    found.renewed(1, sent_at=0.0)
    found.doubt()
    assert (found.leads(0.5), found.holds) == (False, True)
    found.renewed(2, sent_at=0.6)
    assert found.leads(0.6)


@pytest.mark.parametrize("now", [0.0, 100.0])
def test_a_process_that_answers_is_left_alone(now):
    assert not standing_by().may_take(now, "answers")
    assert not standing_by(0).may_take(now, "answers")


def test_a_process_that_does_not_listen_is_followed_at_once():
    assert standing_by().may_take(0.0, "absent")


def test_a_silent_process_has_the_time_of_its_lease():
    found = standing_by(heard_at=1.0)
    assert not found.may_take(1.0 + LEASE_S - 0.01, "silent")
    assert found.may_take(1.0 + LEASE_S, "silent")


def test_a_renewal_that_is_heard_gives_the_holder_its_time_anew_and_the_same_note_does_not():
    found = standing_by(1, heard_at=0.0)
    found.heard(1, 2.0)
    assert found.may_take(LEASE_S, "silent")
    found.heard(2, 3.0)
    assert not found.may_take(LEASE_S, "silent")


def test_a_lease_that_was_never_held_is_free():
    assert Leadership().may_take(0.0, "silent")
    assert standing_by(0).may_take(0.0, "silent")


@given(
    sent=st.floats(0, 100),
    took_s=st.floats(0, 5),
    late_s=st.floats(0, 5),
    now=st.floats(0, 200),
)
def test_a_candidate_never_takes_the_lease_of_a_silent_holder_that_acts(sent, took_s, late_s, now):
    """The renewal is sent, stored a while later, and heard a while after that."""
    holder, candidate = Leadership(), Leadership()
    holder.renewed(7, sent_at=sent)
    heard_at = sent + took_s + late_s
    candidate.heard(7, heard_at)
    if now >= heard_at and candidate.may_take(now, "silent"):
        assert not holder.leads(now)
