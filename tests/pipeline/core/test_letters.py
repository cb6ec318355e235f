from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.envelope import Envelope
from pipeline.core.letters import REPLAY_REASON, DeadLetter, letter_headers, read_letter
from pipeline.core.moves import MoveIds
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.subjects import (
    DEAD_ATTEMPTS,
    DEAD_ERROR,
    MOVED_REASON,
    MOVED_STORED_AT,
    MSG_ID,
    STREAM_REQUESTS,
    TASK,
    TENANT,
    TIMEOUT,
    Move,
    Priority,
    Task,
)

STORED_AT = 1_700_000_000.25
DIED_AT = STORED_AT + 9
IDS = MoveIds(b"key")
OWN = {TENANT: "alice", TIMEOUT: "30", "traceparent": "00-1-2-01"}
CRASH = HeadraceError(ErrorCode.ENGINE_FAILED, "it crashed the engine")


def buried(subject: str = "llm.request.high", *, sequence: int = 7, owner: str = "", **headers: str) -> dict[str, str]:
    envelope = Envelope("r1", Priority.HIGH, Task.UNTRIAGED, STORED_AT, 3, owner=owner)
    return letter_headers(
        envelope, {**OWN, **headers}, subject=subject, sequence=sequence, error=CRASH, attempts=3, trace_id="abc"
    )


def read(headers: dict[str, str], subject: str = "llm.dead.high") -> DeadLetter:
    return read_letter(subject, 12, DIED_AT, headers, b'{"prompt": "x"}')


def test_a_letter_says_who_died_where_of_what():
    letter = read(buried())
    assert (letter.id, letter.priority, letter.subject) == ("r1", Priority.HIGH, "llm.request.high")
    assert (letter.error.code, letter.error.message) == ("engine_failed", "it crashed the engine")
    assert (letter.attempts, letter.trace_id, letter.died_at) == (3, "abc", DIED_AT)
    assert letter.body == b'{"prompt": "x"}'


def test_a_letter_keeps_the_requests_own_headers_and_no_others():
    brought = {"Nats-Expected-Stream": "LLM", MSG_ID: "r1", MOVED_REASON: "was spilled", MOVED_STORED_AT: "1.5"}
    assert read(buried(**brought)).headers == OWN


def test_burying_a_request_again_is_the_same_letter_and_another_delivery_is_another():
    assert buried()[MSG_ID] == buried()[MSG_ID]
    assert buried(sequence=8)[MSG_ID] != buried()[MSG_ID]
    assert buried("llm.request.low")[MSG_ID] != buried()[MSG_ID]


def test_a_replay_is_the_request_with_its_id_and_headers_on_its_lane():
    subject, headers = read(buried("llm.request.high.complex", **{TASK: "complex"})).replay(DIED_AT + 60, IDS)
    assert subject == "llm.request.high.complex"
    assert IDS.read(headers[MSG_ID], STREAM_REQUESTS, 8) == ("r1", Move.REPLAYED)
    assert headers[MOVED_REASON] == REPLAY_REASON
    assert {name: headers[name] for name in OWN} == OWN
    assert float(headers[MOVED_STORED_AT]) == DIED_AT + 60
    assert not {DEAD_ERROR, DEAD_ATTEMPTS} & set(headers)


def test_what_died_at_ollama_starts_on_its_own_lane_again():
    subject, _ = read(buried("llm.ollama.high")).replay(DIED_AT, IDS)
    assert subject == "llm.request.high"


@pytest.mark.parametrize(
    ("died_on", "starts_on"),
    [
        ("llm.request.high.t.acme.complex", "llm.request.high.t.acme.complex"),
        ("llm.ollama.high", "llm.request.high.t.acme"),
    ],
)
def test_a_tenants_request_starts_on_its_tenants_lane_under_its_name(died_on: str, starts_on: str):
    letter = read(buried(died_on, owner="acme"))
    subject, headers = letter.replay(DIED_AT, IDS)
    assert (letter.id, subject) == ("t.acme.r1", starts_on)
    assert IDS.read(headers[MSG_ID], STREAM_REQUESTS, 8) == ("t.acme.r1", Move.REPLAYED)
    assert buried(died_on, owner="bolt")[MSG_ID] != buried(died_on, owner="acme")[MSG_ID]


def test_a_letter_whose_id_is_no_name_starts_on_a_lane_of_the_default_tenant():
    assert read({"Llm-Id": "t.a b.x"}).replay(DIED_AT, IDS)[0] == "llm.request.high"


@pytest.mark.parametrize("wall_now", [0.0, STORED_AT, STORED_AT + 0.5, DIED_AT])
def test_a_replay_is_always_of_a_later_second_than_what_died(wall_now: float):
    _, headers = read(buried()).replay(wall_now, IDS)
    assert int(float(headers[MOVED_STORED_AT])) > int(STORED_AT)


def test_replaying_a_letter_twice_is_one_request():
    letter = read(buried())
    assert letter.replay(DIED_AT, IDS)[1][MSG_ID] == letter.replay(DIED_AT + 5, IDS)[1][MSG_ID]


def test_a_letter_that_says_nothing_is_read_all_the_same():
    letter = read({}, "llm.dead.nonsense")
    assert (letter.id, letter.priority, letter.error.code) == ("DEAD-12", Priority.LOW, "engine_failed")
    assert letter.replay(DIED_AT, IDS)[0] == "llm.request.low"


@pytest.mark.parametrize("number", ["9" * 400, "9" * 5000, "1.5.5", "-1", "٣", "inf"])
def test_a_number_that_is_none_is_unknown(number: str):
    letter = read({DEAD_ATTEMPTS: number, MOVED_STORED_AT: number})
    assert (letter.attempts, letter.created) == (0, 0)


@given(
    st.dictionaries(
        st.sampled_from([DEAD_ERROR, DEAD_ATTEMPTS, MOVED_STORED_AT, "Llm-Id", "Llm-Subject", TENANT]),
        st.text(max_size=40) | st.just(msgspec.json.encode({"code": "x"}).decode()),
    ),
    st.text(max_size=30),
)
def test_reading_a_letter_never_raises_and_it_can_be_replayed(headers, subject):
    letter = read(headers, subject)
    lane, _ = letter.replay(DIED_AT, IDS)
    assert lane.startswith("llm.request.")
