"""A cancelled request that is sent again."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from pipeline.core.anew import cancelled_at, headers_anew
from pipeline.core.ending import Moved, moved_headers
from pipeline.core.envelope import Envelope, read_envelope
from pipeline.core.moves import MoveIds
from pipeline.wire.answers import ErrorAnswer, ErrorBody
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.subjects import ANEW, MOVED_STORED_AT, MSG_ID, STREAM_REQUESTS, Move, Priority, Task
from tests.pipeline.gateway.answers import CHUNKS, COMPLETION

IDS = MoveIds(b"key")


@dataclass
class Stored:
    headers: dict[str, str]
    subject: str = "llm.request.high"
    sequence: int = 1
    stored_at: float = 101.0
    delivered: int = 1


def read(headers: dict[str, str]) -> Envelope:
    return read_envelope(Stored(headers), Priority.HIGH, moves=IDS)


def ended(code: ErrorCode) -> ErrorAnswer:
    return ErrorAnswer(id="a", created=100, error=ErrorBody.of(HeadraceError(code, "")))


def test_only_a_cancelled_request_begins_anew():
    assert cancelled_at(ended(ErrorCode.CANCELLED)) == 100
    others = [ended(code) for code in ErrorCode if code is not ErrorCode.CANCELLED]
    assert {cancelled_at(last) for last in (*others, *CHUNKS, COMPLETION)} == {None}


@pytest.mark.parametrize("wall_now", [99.0, 100.5, 200.0])
def test_it_is_stored_as_a_replay_in_a_later_second(wall_now: float):
    headers = headers_anew("a", 7, 100, wall_now, IDS)
    assert IDS.read(headers[MSG_ID], STREAM_REQUESTS, 1) == ("a", Move.REPLAYED)
    assert int(float(headers[MOVED_STORED_AT])) > 100


@pytest.mark.parametrize("move", [Move.SPILLED, Move.COMPLEX, Move.RETURNED])
def test_wherever_it_is_moved_it_is_known_as_sent_again(move: Move):
    first = read(headers_anew("a", 7, 100, 101.0, IDS))
    assert first.anew
    moved = moved_headers(
        Moved("llm.request.high", move, Task.SIMPLE, "why"),
        first,
        headers_anew("a", 7, 100, 101.0, IDS),
        ids=IDS,
        sequence=1,
        stored_at=101.0,
    )
    assert read(moved).anew
    assert not read({MSG_ID: "a", ANEW: "7"}).anew


def test_calls_at_once_store_one_request_and_the_next_cancel_allows_another():
    once, again = headers_anew("a", 7, 100, 101.0, IDS), headers_anew("a", 7, 100, 102.0, IDS)
    assert once[MSG_ID] == again[MSG_ID]
    assert headers_anew("a", 9, 101, 102.0, IDS)[MSG_ID] != once[MSG_ID]
