"""Ids of tool calls."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from consumers.engines.local.child.calls.ids import nine_characters


@given(st.text(max_size=60))
def test_an_id_has_nine_letters_and_digits(given_id: str):
    made = nine_characters(given_id)
    assert len(made) == 9
    assert made.isascii()
    assert made.isalnum()
    assert nine_characters(given_id) == made


def test_an_id_of_this_form_stays():
    assert nine_characters("aB3dE6gH9") == "aB3dE6gH9"


def test_different_ids_stay_different():
    assert len({nine_characters(f"call_{number}") for number in range(1000)}) == 1000
