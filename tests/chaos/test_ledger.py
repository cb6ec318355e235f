"""The verdict of the chaos run finds the faults of an answer, and only those."""

from __future__ import annotations

import json

import pytest

from bench.chaos.ledger import Entry, Kept, Ledger, goes_on_after


def status(state="started", attempt=1):
    return {"object": "headrace.status", "state": state, "attempt": attempt, "engine": "mlx"}


def chunk(seq, text, attempt=1):
    return {
        "object": "chat.completion.chunk",
        "seq": seq,
        "attempt": attempt,
        "choices": [{"delta": {"content": text}}],
    }


def whole(text, *, engine="mlx", attempts=1):
    account = {"engine": engine, "attempts": attempts}
    return {"object": "chat.completion", "choices": [{"message": {"content": text}}], "headrace": account}


def error(code):
    return {"object": "error", "error": {"code": code, "message": code}}


def vectors(*rows, engine="ollama"):
    data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
    return {"object": "list", "data": data, "headrace": {"engine": engine, "attempts": 1}}


def entry(*messages, kind="plain", **more):
    encoded = [json.dumps(message).encode() for message in messages]
    record = [Kept(number, float(number), data) for number, data in enumerate(encoded, 1)]
    return Entry("r1", kind, **({"streams": True, "accepted_at": 0.0, "record": record, "live": encoded} | more))


GOOD = (status(), chunk(0, "a"), chunk(1, "b"), whole("ab"))


def test_a_whole_answer_has_no_fault():
    assert entry(*GOOD).faults() == []
    assert entry(*GOOD, expected="ab", inbox=[json.dumps(GOOD[-1]).encode()]).faults() == []
    assert entry(error("cancelled"), may_end=frozenset({"cancelled"})).faults() == []


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ((), "lost"),
        (GOOD[:-1], "lost"),
        ((*GOOD, whole("ab", attempts=2)), "doubled"),
        ((*GOOD, chunk(2, "c")), "a message after the last one"),
        ((status(), chunk(0, "a"), chunk(2, "b"), whole("ab")), "gap in seq"),
        ((status(), chunk(0, "a"), chunk(0, "a"), chunk(1, "b"), whole("ab")), "gap in seq"),
        ((status(), chunk(0, "a"), whole("ab")), "chunks differ from the last message"),
        ((error("engine_failed"),), "ended with engine_failed"),
    ],
)
def test_the_fault_of_a_record_is_found(messages, fault):
    assert fault in entry(*messages).faults()


def test_a_seeded_answer_is_compared_with_the_undisturbed_text_on_mlx_alone():
    assert entry(*GOOD, expected="ac").faults() == ["differs from the undisturbed answer"]
    elsewhere = (*GOOD[:-1], whole("ab", engine="ollama"))
    assert entry(*elsewhere, expected="ac").faults() == []
    begun_elsewhere = ({**status(), "engine": "ollama"}, *GOOD[1:])
    assert entry(*begun_elsewhere, expected="ac").faults() == []


def test_vectors_are_compared_with_those_of_the_texts_on_any_engine():
    asked = {"kind": "embedding", "streams": False, "expected": [[1.0], [2.0]]}
    good = entry(vectors([1.0], [2.0]), **asked)
    assert good.faults() == []
    assert Ledger({"r1": good}).summary().known_compared == 1
    assert entry(vectors([2.0], [1.0]), **asked).faults() == ["differs from the undisturbed answer"]
    assert entry(error("model_not_found"), **asked).faults() == ["ended with model_not_found"]
    assert "doubled" in entry(*[vectors([1.0], [2.0])] * 2, **asked).faults()


def test_what_readers_saw_is_compared_with_the_record():
    stray, last = json.dumps(chunk(1, "x")).encode(), json.dumps(GOOD[-1]).encode()
    assert entry(*GOOD, live=[stray]).faults() == ["a reader saw a message that is not in the record"]
    assert entry(*GOOD, live=[last, last]).faults() == ["doubled at a live reader"]
    assert entry(*GOOD, inbox=[stray, last]).faults() == ["an inbox has a message that is not in the record"]
    repeated = entry(*GOOD, inbox=[last, last])
    assert repeated.faults() == []
    assert repeated.repeated_at_inbox
    assert entry(*GOOD, inbox=[]).missed_at_inbox


def test_the_summary_counts():
    ledger = Ledger({"a": entry(*GOOD), "b": entry(), "c": entry(status("restarted", 2), whole("", attempts=2))})
    summary = ledger.summary()
    assert (summary.accepted, summary.lost, summary.reexecuted) == (3, 1, 1)
    assert summary.ended == {"answered": 2}
    assert summary.examples["lost"] == ["r1"]
    assert len(ledger.open()) == 1


def test_an_answer_goes_on_after_a_fault_in_its_middle_only():
    streamed = entry(*GOOD)
    assert goes_on_after(streamed, 2.5) == 0.5
    assert goes_on_after(streamed, 0.5) is None
    assert goes_on_after(streamed, 4.5) is None
