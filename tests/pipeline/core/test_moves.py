"""The ids of moved requests: made and read with a key, and by no one without it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.moves import MoveIds
from pipeline.wire.subjects import STREAM_OLLAMA, STREAM_REQUESTS, Move, is_request_id

IDS = MoveIds(b"k" * 32)
OTHER = MoveIds(b"o" * 32)
names = st.text("abcXYZ019_-", min_size=1, max_size=128)
anything = st.text(st.characters(), max_size=300)


def read(text, *, ids=IDS, stream=STREAM_REQUESTS, sequence=100):
    return ids.read(text, stream, sequence)


@given(
    names,
    st.sampled_from([move for move in Move if move is not Move.PRIORITY]),
    st.integers(1, 2**63),
    st.floats(0, 1e10),
)
def test_a_moved_id_is_split_into_what_it_was_made_of(request_id, move, sequence, stored_at):
    made = IDS.make(request_id, move, sequence, stored_at)
    assert read(made) == (request_id, move)
    assert not is_request_id(made)
    assert made == IDS.make(request_id, move, sequence, stored_at)


def test_a_change_of_priority_is_called_what_an_older_version_can_read():
    """The header `Llm-Moved-By` tells it from a replay."""
    assert read(IDS.make("a", Move.PRIORITY, 7, 1e9)) == ("a", Move.REPLAYED)


def test_another_delivery_and_another_request_have_other_ids():
    made = IDS.make("a", Move.SPILLED, 7, 1e9)
    assert made != IDS.make("a", Move.SPILLED, 8, 1e9)
    assert made != IDS.make("a", Move.SPILLED, 7, 1e9 + 1e-6)


def test_an_id_that_was_made_without_the_key_is_no_move():
    for made in ("victim:complex:1-2", "LLM-7:spilled:1", OTHER.make("victim", Move.COMPLEX, 1, 2.0)):
        assert read(made) == (made, None)
    genuine = IDS.make("mine", Move.COMPLEX, 1, 2.0)
    forged = genuine.replace("mine", "victim")
    assert read(forged) == (forged, None)
    # The message id of a real move cannot be taken beforehand.
    assert OTHER.make("mine", Move.COMPLEX, 1, 2.0) != genuine


def test_moves_from_before_the_key_are_read_up_to_its_sequence_and_at_ollama():
    ids = MoveIds(b"k", before=10)
    assert read("r1:complex:3-5", ids=ids, sequence=10) == ("r1", Move.COMPLEX)
    assert read("r1:complex:3-5", ids=ids, sequence=11) == ("r1:complex:3-5", None)
    assert read("r1:spilled:3", stream=STREAM_OLLAMA) == ("r1", Move.SPILLED)
    assert read(OTHER.make("r1", Move.SPILLED, 3, 5.0), stream=STREAM_OLLAMA) == ("r1", Move.SPILLED)


@pytest.mark.parametrize(
    "text",
    ["", ":", "a", "a:", ":a", "a:spilled", "a:spill:1", "a:SPILLED:1", "a:spilled:", "a:spilled:1 ", "a:spilled:x"],
)
def test_an_id_without_a_move_is_left_as_it_is(text):
    assert read(text, stream=STREAM_OLLAMA) == (text, None)


@given(anything)
def test_reading_never_fails_and_loses_nothing(text):
    for stream in (STREAM_REQUESTS, STREAM_OLLAMA):
        request_id, move = read(text, stream=stream)
        assert text.startswith(request_id if move is None else f"{request_id}:{move}:")
