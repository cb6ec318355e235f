"""Whatever stands in a request's headers is read, and what is wrong with it is told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.answer import error_answer
from pipeline.core.envelope import MAX_TIMEOUT_S, Envelope, read_envelope
from pipeline.core.moves import MoveIds
from pipeline.wire.errors import ErrorCode
from pipeline.wire.messages import encode
from pipeline.wire.subjects import Move, Priority, Task, is_reply_to, is_request_id, is_request_name

STORED_AT = 1_700_000_000.25
MOVES = MoveIds()


@dataclass
class Held:
    headers: dict[str, str] = field(default_factory=dict)
    sequence: int = 7
    subject: str = "llm.ollama.high"
    stored_at: float = STORED_AT
    delivered: int = 1


def read(
    headers=None, *, task=Task.UNTRIAGED, default_timeout_s=None, sequence=7, subject="llm.ollama.high", moves=MOVES
):
    held = Held(headers or {}, sequence, subject)
    return read_envelope(held, Priority.HIGH, task, moves=moves, default_timeout_s=default_timeout_s)


def envelope(**fields):
    return Envelope(
        **{
            "id": "req",
            "priority": Priority.HIGH,
            "task": Task.SIMPLE,
            "stored_at": STORED_AT,
            "delivered": 1,
            **fields,
        }
    )


def test_an_id_that_only_the_broker_hands_out_is_refused_from_a_publisher():
    found = read({"Nats-Msg-Id": "LLM-7"}, sequence=9)
    assert found.id == "LLM-9"
    assert found.fault.code is ErrorCode.INVALID_REQUEST


def test_a_request_without_headers_has_the_id_of_its_puback_and_nothing_wrong():
    found = read()
    assert (found.id, found.move, found.reply_to, found.deadline, found.fault) == ("LLM-7", None, None, None, None)
    assert (found.task, found.stored_at, found.tenant) == (Task.UNTRIAGED, STORED_AT, "")


@pytest.mark.parametrize("bad", ["a b", "*", "a.b", "x" * 129, "a:b", "a:b:spilled:1", ":spilled:1", "٣", "a\n", "é"])
def test_a_bad_id_is_a_fault_and_the_answer_goes_to_the_generated_one(bad):
    found = read({"Nats-Msg-Id": bad})
    assert (found.id, found.move) == ("LLM-7", None)
    assert (found.fault.code, found.fault.param) == (ErrorCode.INVALID_REQUEST, "Nats-Msg-Id")


def test_a_fault_of_a_header_shows_what_was_given_and_what_is_accepted():
    assert read({"Nats-Msg-Id": "a b"}).fault.message == (
        'Nats-Msg-Id "a b" is not a valid request id. Use 1 to 128 letters, digits, "-" or "_". The broker assigns the '
        "ids LLM-<number>."
    )
    assert read({"Llm-Timeout": "soon"}).fault.message == (
        'Llm-Timeout must be a number of seconds above 0 and at most 2592000, not "soon".'
    )
    assert read({"Llm-Task": "easy"}).fault.message == 'Llm-Task must be simple or complex, not "easy".'
    assert read({"Reply-To": "foo"}).fault.message.startswith('Reply-To "foo" is not allowed. Use a subject under ')


def test_an_empty_id_is_none():
    assert (read({"Nats-Msg-Id": ""}).id, read({"Nats-Msg-Id": ""}).fault) == ("LLM-7", None)


def test_a_reply_subject_that_is_denied_is_not_used():
    found = read({"Reply-To": "llm.request.high", "Nats-Msg-Id": "mine"})
    assert (found.fault.code, found.fault.param) == (ErrorCode.REPLY_SUBJECT_DENIED, "Reply-To")
    assert found.reply_to is None
    assert "llm.reply.mine" in found.fault.message


def test_a_reply_subject_is_judged_by_the_id_that_the_request_has_in_the_end():
    assert read({"Reply-To": "llm.reply.LLM-7"}).fault is None
    assert read({"Reply-To": "llm.reply.LLM-8"}).fault.code is ErrorCode.REPLY_SUBJECT_DENIED
    assert read({"Reply-To": "llm.reply.LLM-7", "Nats-Msg-Id": "mine"}).fault is not None


def test_ones_own_record_needs_no_forwarding():
    assert read({"Reply-To": "llm.reply.mine", "Nats-Msg-Id": "mine"}).reply_to is None
    assert read({"Reply-To": "_INBOX.x"}).reply_to == "_INBOX.x"


@pytest.mark.parametrize(("text", "seconds"), [("5", 5), ("0.5", 0.5), (" 5 ", 5), ("1e2", 100), ("2592000", 2592000)])
def test_a_timeout_counts_from_when_the_broker_stored_the_request(text, seconds):
    found = read({"Llm-Timeout": text}, default_timeout_s=1.0)
    assert (found.deadline, found.fault) == (STORED_AT + seconds, None)


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "0", "0.0", "-0", "-1", "+5", "1e309", "1e99", "2592001", "nan", "inf", "-inf", "Infinity"),
        *("5_0", "٣", "５", "0x10", "5s", "5,0", "five", "1e", ".", "5\x00", "9" * 5000, "1" + "0" * 400),
    ],
    ids=lambda text: ascii(text[:12]),
)
def test_a_timeout_that_is_no_sensible_number_of_seconds_is_a_fault(text):
    found = read({"Llm-Timeout": text}, default_timeout_s=9.0)
    assert (found.fault.code, found.fault.param) == (ErrorCode.INVALID_REQUEST, "Llm-Timeout")
    assert found.deadline is None


def test_without_a_timeout_the_default_holds():
    assert read(default_timeout_s=9.0).deadline == STORED_AT + 9.0


@pytest.mark.parametrize(("text", "task"), [("simple", Task.SIMPLE), (" COMPLEX ", Task.COMPLEX), ("", Task.UNTRIAGED)])
def test_the_publishers_word_counts_where_the_subject_has_none(text, task):
    assert (read({"Llm-Task": text}).task, read({"Llm-Task": text}).fault) == (task, None)


def test_the_subjects_word_counts_before_the_publishers():
    assert read({"Llm-Task": "simple"}, task=Task.COMPLEX).task is Task.COMPLEX
    assert read({"Llm-Task": "hard"}, task=Task.COMPLEX).fault is None


def test_an_unknown_task_is_a_fault():
    found = read({"Llm-Task": "hard"})
    assert (found.fault.code, found.fault.param, found.task) == (ErrorCode.INVALID_REQUEST, "Llm-Task", Task.UNTRIAGED)


def test_a_moved_request_keeps_its_id_its_time_and_its_task():
    headers = {
        "Nats-Msg-Id": "mine:spilled:3",
        "Llm-Stored-At": repr(STORED_AT - 100),
        "Llm-Reason": "greeting",
        "Llm-Task": "simple",
        "Llm-Timeout": "300",
    }
    found = read(headers, sequence=99)
    assert (found.id, found.move, found.move_reason, found.task) == ("mine", Move.SPILLED, "greeting", Task.SIMPLE)
    assert (found.stored_at, found.deadline, found.fault) == (STORED_AT - 100, STORED_AT + 200, None)


def test_a_generated_id_stays_with_the_request_when_it_moves():
    assert read({"Nats-Msg-Id": "LLM-7:returned:3"}, sequence=1234).id == "LLM-7"


def test_headers_of_a_move_mean_nothing_on_a_request_that_did_not_move():
    found = read({"Llm-Stored-At": "1.0", "Llm-Reason": "because I say so"})
    assert (found.stored_at, found.move_reason) == (STORED_AT, "")


@pytest.mark.parametrize("text", [repr(STORED_AT + 1e6), "1e308", "nan", "-5", "", "0", "yesterday", "9" * 400])
def test_a_move_cannot_make_a_request_younger_than_it_is(text):
    assert read({"Nats-Msg-Id": "mine:spilled:3", "Llm-Stored-At": text}).stored_at == STORED_AT


def test_clocks_of_two_brokers_that_differ_a_little_do_not_make_two_requests_of_one():
    headers = {"Nats-Msg-Id": "mine:spilled:3", "Llm-Stored-At": repr(STORED_AT + 0.8)}
    assert read(headers).created == envelope(stored_at=STORED_AT + 0.8).created


def test_the_first_fault_is_told_but_a_denied_reply_subject_before_all_others():
    assert read({"Nats-Msg-Id": "a b", "Llm-Timeout": "x", "Llm-Task": "x"}).fault.param == "Nats-Msg-Id"
    assert read({"Llm-Timeout": "x", "Llm-Task": "x"}).fault.param == "Llm-Timeout"
    assert read({"Nats-Msg-Id": "a b", "Reply-To": ">"}).fault.param == "Reply-To"


def test_the_seed_is_the_same_in_every_attempt_and_differs_between_requests():
    assert envelope().seed == envelope(delivered=3, stored_at=STORED_AT + 0.5).seed
    others = {envelope(id=f"req{n}").seed for n in range(100)} | {envelope(stored_at=STORED_AT + 1).seed}
    assert len(others) == 101
    assert all(0 <= seed < 2**64 for seed in others)


names = st.sampled_from(
    ["Nats-Msg-Id", "Reply-To", "Llm-Timeout", "Llm-Task", "Llm-Tenant", "Llm-Stored-At", "Llm-Reason", "X"]
)
hostile = st.one_of(
    st.text(st.characters(), max_size=300),
    st.from_regex(r"[a-z]{0,3}:(spilled|complex|returned):[0-9]{1,3}"),
    st.from_regex(r"(_INBOX|llm\.reply)\..*"),
    st.from_regex(r"t\.[a-z]{0,3}\.[a-z]{0,3}(:spilled:[0-9])?"),
    st.from_regex(r"[-+]?[0-9_]*\.?[0-9]*(e[0-9]{1,3})?"),
    st.sampled_from(["simple", "complex", "untriaged", "nan", "inf", "LLM-7", "llm.reply.LLM-7"]),
)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(names, hostile),
    st.sampled_from(Task),
    st.none() | st.floats(0.1, 1e6),
    st.sampled_from(["llm.ollama.high", "llm.request.high", "llm.request.high.t.acme", "llm.request.high.t.\u00e9"]),
)
def test_reading_headers_never_fails_and_what_is_read_is_sane(headers, task, default, subject):
    found = read(headers, task=task, default_timeout_s=default, subject=subject)
    assert is_request_id(found.id)
    assert is_request_name(found.name)
    assert found.reply_to is None or is_reply_to(found.reply_to, found.name)
    assert 0 < found.stored_at < STORED_AT + 100
    assert found.deadline is None or 0 < found.deadline - found.stored_at <= MAX_TIMEOUT_S + 1
    assert len(found.tenant) <= 128
    assert len(found.move_reason) <= 300
    assert found.fault is None or found.fault.code in (ErrorCode.INVALID_REQUEST, ErrorCode.REPLY_SUBJECT_DENIED)
    if found.fault is not None:
        assert len(encode(error_answer(found, found.fault))) < 2000
    assert math.isfinite(found.created)
    assert found.seed >= 0


# ---- tenants

ACME = "llm.request.high.t.acme"
SECRET = MoveIds(b"a secret of the pipeline")


def test_the_subject_says_whose_a_request_is_and_no_header_does():
    found = read({"Nats-Msg-Id": "job", "Llm-Tenant": "bolt"}, subject=ACME)
    assert (found.owner, found.id, found.name, found.tenant) == ("acme", "job", "t.acme.job", "acme")
    plain = read({"Nats-Msg-Id": "job", "Llm-Tenant": "bolt"}, subject="llm.request.high")
    assert (plain.owner, plain.id, plain.name, plain.tenant) == ("", "job", "job", "bolt")


def test_a_tenant_may_write_its_own_name_in_front_of_an_id():
    found = read({"Nats-Msg-Id": "t.acme.job"}, subject=ACME)
    assert (found.name, found.fault) == ("t.acme.job", None)


@pytest.mark.parametrize(
    ("named", "subject"),
    [("t.bolt.job", ACME), ("t.acme.job", "llm.request.high"), ("t.acme.LLM-3", ACME), ("t.acme.a.b", ACME)],
)
def test_a_name_of_another_tenant_is_no_id(named, subject):
    found = read({"Nats-Msg-Id": named}, subject=subject, sequence=9)
    assert found.fault.code is ErrorCode.INVALID_REQUEST
    assert found.id == "LLM-9"
    assert found.owner == ("acme" if subject is ACME else "")


def test_a_request_without_an_id_gets_one_of_its_tenants():
    assert read(subject=ACME).name == "t.acme.LLM-7"


def test_a_subject_with_an_invalid_tenant_is_refused_under_an_id_of_the_default_tenant():
    found = read({"Nats-Msg-Id": "job"}, subject="llm.request.high.t." + "x" * 65)
    assert (found.name, found.fault.code) == ("LLM-7", ErrorCode.INVALID_REQUEST)


def test_a_tenants_request_stays_its_own_when_it_moves():
    spilled = {"Nats-Msg-Id": SECRET.make("t.acme.job", Move.SPILLED, 3, STORED_AT)}
    at_ollama = read(spilled, moves=SECRET)
    assert (at_ollama.name, at_ollama.owner, at_ollama.tenant, at_ollama.move) == (
        "t.acme.job",
        "acme",
        "acme",
        Move.SPILLED,
    )
    back = {"Nats-Msg-Id": SECRET.make("t.acme.job", Move.RETURNED, 4, STORED_AT)}
    assert read(back, moves=SECRET, subject=f"{ACME}.complex").name == "t.acme.job"


def test_a_move_that_a_tenant_made_up_is_refused():
    made_up = {"Nats-Msg-Id": MoveIds(b"a guess").make("t.acme.job", Move.SPILLED, 3, STORED_AT)}
    assert read(made_up, moves=SECRET, subject=ACME).fault.code is ErrorCode.INVALID_REQUEST


def test_a_tenants_answer_goes_to_no_other():
    denied = read({"Nats-Msg-Id": "job", "Reply-To": "llm.reply.t.bolt.job"}, subject=ACME)
    assert denied.fault.code is ErrorCode.REPLY_SUBJECT_DENIED
    assert "llm.reply.t.acme.job" in denied.fault.message
    assert read({"Nats-Msg-Id": "job", "Reply-To": "llm.reply.t.acme.job"}, subject=ACME).reply_to is None
