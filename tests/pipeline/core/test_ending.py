"""The table of outcomes: what is done for each, in which order, and what is published about it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import get_args

import pytest

from pipeline.core import ending
from pipeline.core.answer import AnswerWriter, error_answer, expired
from pipeline.core.ending import (
    NEEDS_LEASE,
    Abandoned,
    Answered,
    Buried,
    EndStep,
    Failed,
    Loss,
    Moved,
    Returned,
    Settled,
)
from pipeline.core.envelope import Envelope
from pipeline.core.moves import MoveIds
from pipeline.wire.answers import Usage
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.subjects import MSG_ID, STREAM_OLLAMA, STREAM_REQUESTS, Move, Priority, Task
from tests.support import ROOT

IDS = MoveIds(b"key")
ENVELOPE = Envelope("r1", Priority.HIGH, Task.SIMPLE, stored_at=1000.5, delivered=1, tenant="alice")
ANSWER = AnswerWriter(ENVELOPE, "mlx", "m", 1, 1001.5, "its turn").completion("stop", Usage(1, 2, 3), now=1002.5)


def error(code):
    return HeadraceError(code, "over")


def moved(how):
    return Moved("llm.ollama.high", how, Task.SIMPLE, "saturated")


# The rows of the table in docs/delivery.md, by their first cell.
OUTCOMES = {
    "answered": [Answered(ANSWER)],
    "failed": [Failed(error(code)) for code in ErrorCode if code not in ("cancelled", "deadline_exceeded")],
    "cancelled": [Failed(error(ErrorCode.CANCELLED))],
    "expired": [Failed(expired())],
    "buried": [Buried(error(ErrorCode.ENGINE_FAILED))],
    "moved, spilled": [moved(Move.SPILLED)],
    "moved, triaged": [moved(Move.COMPLEX)],
    "moved, back from Ollama": [moved(Move.RETURNED)],
    "returned": [Returned(), Returned(2.0)],
    "returned, a failed attempt": [Returned(2.0, uses_attempt=True)],
    "settled": [Settled(ANSWER)],
    "settled, a second copy": [Settled(None)],
    "abandoned": [Abandoned(why) for why in Loss if why is not Loss.STOOD_STILL],
    "abandoned, after a standstill": [Abandoned(Loss.STOOD_STILL)],
}
ALL = [outcome for outcomes in OUTCOMES.values() for outcome in outcomes]


def documented():
    """The table of docs/delivery.md: the steps and the event of each row."""
    text = (ROOT / "docs/delivery.md").read_text()
    section = text.split("## How a request ends")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")] for line in re.findall(r"^\|(.*)\|$", section, re.MULTILINE)]
    return {name: (steps, event.strip("`")) for name, _, steps, event in rows[2:]}


def test_the_document_has_a_row_for_each_outcome():
    assert list(documented()) == list(OUTCOMES)
    assert {type(outcome) for outcome in ALL} == set(get_args(ending.Outcome))


@pytest.mark.parametrize("name", OUTCOMES)
def test_steps_and_events_are_those_of_the_document(name):
    steps, event = documented()[name]
    for outcome in OUTCOMES[name]:
        told = ending.event_kind(outcome)
        done = [step for step in ending.steps(outcome) if step is not EndStep.TELL or told is not None]
        assert (", ".join(done) or "nothing", told or "none") == (steps, event)


@pytest.mark.parametrize("name", OUTCOMES)
def test_what_makes_a_request_findable_comes_before_what_removes_it(name):
    outcome = OUTCOMES[name][0]
    steps = list(ending.steps(outcome))
    assert len(set(steps)) == len(steps)
    assert not {EndStep.REMOVE, EndStep.RETURN} <= set(steps)
    # No step that may end the process's hold of the request comes before one that needs it.
    over = [steps.index(step) for step in (EndStep.REMOVE, EndStep.RETURN) if step in steps]
    assert all(step not in NEEDS_LEASE for step in steps[over[0] + 1 :]) if over else True
    assert steps == sorted(steps, key=list(EndStep).index), "each step has one place in the order"
    removed = EndStep.REMOVE in steps and outcome != Settled(None)
    assert removed is bool({EndStep.CLOSE, EndStep.MOVE, EndStep.FORWARD} & set(steps))


def test_a_process_without_the_lease_notes_and_publishes_and_does_nothing_else():
    assert set(EndStep) - NEEDS_LEASE == {EndStep.NOTE, EndStep.TELL}


@pytest.mark.parametrize("name", OUTCOMES)
def test_a_record_is_closed_with_the_message_of_the_outcome(name):
    outcome = OUTCOMES[name][0]
    last = ending.last_message(outcome, ENVELOPE)
    needs = {EndStep.CLOSE, EndStep.FORWARD} & set(ending.steps(outcome))
    assert (last is not None) is bool(needs)
    if isinstance(outcome, Failed | Buried):
        assert last == error_answer(ENVELOPE, outcome.error)


def test_each_outcome_has_one_word():
    words = {name: {ending.word(outcome) for outcome in outcomes} for name, outcomes in OUTCOMES.items()}
    assert words == {name: {name.split(",")[0]} for name in OUTCOMES}


def test_engine_failed_is_kept_in_the_dead_letters_and_nothing_else_is():
    for code in ErrorCode:
        assert isinstance(ending.failure(error(code)), Buried if code is ErrorCode.ENGINE_FAILED else Failed)


def told(outcome, *, began=True):
    return ending.event(outcome, ENVELOPE, engine="mlx", began=began, waited_ms=12.3456)


def test_the_event_of_an_answer_has_its_times():
    event = told(Answered(ANSWER))
    assert (event.kind, event.engine, event.tenant, event.priority) == ("done", "mlx", "alice", "high")
    assert (event.wait_ms, event.total_ms, event.reason) == (1000.0, 2000.0, "its turn")


def test_the_event_of_an_error_has_its_code():
    assert told(Failed(error(ErrorCode.CANCELLED))).code is ErrorCode.CANCELLED
    assert told(Buried(error(ErrorCode.ENGINE_FAILED))).code is ErrorCode.ENGINE_FAILED


def test_the_event_of_a_move_says_why_and_belongs_to_no_engine():
    event = told(moved(Move.SPILLED))
    assert (event.kind, event.engine, event.wait_ms, event.reason) == ("spilled", None, 12.346, "saturated")
    assert told(moved(Move.RETURNED)) is None


def test_a_return_is_news_only_of_a_request_that_had_begun():
    assert told(Returned()).kind == "returned"
    assert told(Returned(), began=False) is None
    assert told(Abandoned(Loss.LEASE)) is None
    assert told(Settled(ANSWER)) is None


def test_a_tenants_request_moves_and_is_told_of_by_its_name():
    mine = replace(ENVELOPE, owner="acme")
    headers = ending.moved_headers(moved(Move.SPILLED), mine, {}, ids=IDS, sequence=7, stored_at=1000.5)
    assert IDS.read(headers[MSG_ID], STREAM_OLLAMA, 8) == (mine.name, Move.SPILLED)
    event = ending.event(moved(Move.SPILLED), mine, engine=None, began=False, waited_ms=1.0)
    assert event.id == mine.name == f"t.acme.{mine.id}"


def test_a_full_lane_makes_a_move_a_return_that_costs_no_attempt():
    outcome = ending.when_full(moved(Move.SPILLED))
    assert outcome.delay_s > 0
    assert not outcome.uses_attempt
    assert "llm.ollama.high" in outcome.error.message


def test_a_moved_request_has_an_id_of_its_move_and_none_of_what_its_publisher_told_the_broker():
    headers = {MSG_ID: "r1", "Nats-Expected-Stream": "LLM", "Llm-Tenant": "alice", "Llm-Task": "complex"}
    again = [
        ending.moved_headers(moved(Move.SPILLED), ENVELOPE, headers, ids=IDS, sequence=7, stored_at=1000.5)
        for _ in range(2)
    ]
    assert again[0] == again[1]
    assert IDS.read(again[0].pop(MSG_ID), STREAM_REQUESTS, 8) == ("r1", Move.SPILLED)
    expected = {"Llm-Tenant": "alice", "Llm-Task": "simple", "Llm-Reason": "saturated", "Llm-Stored-At": "1000.5"}
    assert again[0] == expected
