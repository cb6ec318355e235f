"""A cancelled request that is sent again."""

from __future__ import annotations

import pytest

from pipeline.core.anew import cancelled_at, headers_anew
from pipeline.core.moves import MoveIds
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.messages import ErrorAnswer, ErrorBody
from pipeline.wire.subjects import MOVED_STORED_AT, MSG_ID, STREAM_REQUESTS, Move
from tests.pipeline.gateway.answers import CHUNKS, COMPLETION

IDS = MoveIds(b"key")


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


def test_calls_at_once_store_one_request_and_the_next_cancel_allows_another():
    once, again = headers_anew("a", 7, 100, 101.0, IDS), headers_anew("a", 7, 100, 102.0, IDS)
    assert once[MSG_ID] == again[MSG_ID]
    assert headers_anew("a", 9, 101, 102.0, IDS)[MSG_ID] != once[MSG_ID]
