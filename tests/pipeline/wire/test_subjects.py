"""Names on the broker, and what may stand in them."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.wire.subjects import (
    GUARD_LANE,
    LANES,
    TENANT_LANES,
    Lane,
    Priority,
    Task,
    generated_id,
    is_inbox,
    is_reply_to,
    is_request_id,
    is_request_name,
    is_tenant,
    lane_of_consumer,
    lane_of_subject,
    ollama_consumer,
    ollama_subject,
    out_subject,
    position_subject,
    position_tenant,
    reply_subject,
    request_name,
    split_name,
    tenant_of,
    with_known_names,
)

ids = st.text("abcXYZ019_-", min_size=1, max_size=128)
anything = st.text(st.characters(), max_size=300)

NO_IDS = [
    "",
    "a b",
    "a.b",
    "*",
    ">",
    "a.>",
    "a\n",
    "\na",
    "a\x00",
    "a\r\nNats-Msg-Id: b",
    "٣",
    "é",
    "a/b",
    "a:b",
    "a:spilled",
    "$JS",
    "x" * 129,
    "\ud800",
]


def test_nine_lanes_have_nine_subjects_and_nine_consumers():
    assert len(LANES) == len({lane.subject for lane in LANES}) == len({lane.consumer for lane in LANES}) == 9
    assert {lane_of_subject(lane.subject) for lane in LANES} == set(LANES)


def test_lanes_are_named_as_the_contract_says():
    assert Lane(Priority.HIGH, Task.UNTRIAGED).subject == "llm.request.high"
    assert Lane(Priority.LOW, Task.COMPLEX).subject == "llm.request.low.complex"
    assert Lane(Priority.MEDIUM, Task.SIMPLE).consumer == "medium_simple"
    assert [ollama_subject(p) for p in Priority] == ["llm.ollama.high", "llm.ollama.medium", "llm.ollama.low"]
    assert (out_subject("x"), reply_subject("x"), generated_id(7)) == ("llm.out.x", "llm.reply.x", "LLM-7")


def test_consumers_are_names_that_the_broker_takes():
    names = [lane.consumer for lane in LANES] + [ollama_consumer(p) for p in Priority]
    assert len(set(names)) == 12
    assert all(is_request_id(name) for name in names)


@given(ids)
@example("x" * 128)
@example("-")
def test_letters_digits_underscore_and_hyphen_make_an_id(text):
    assert is_request_id(text)


@pytest.mark.parametrize("text", NO_IDS, ids=ascii)
def test_nothing_else_is_an_id(text):
    assert not is_request_id(text)


@given(anything)
def test_an_id_is_always_one_plain_token(text):
    if is_request_id(text):
        assert text.isascii()
        assert not set(text) & set(" .*>:\t\r\n\0")


# ---- Reply-To


@pytest.mark.parametrize(
    "subject",
    [
        "_INBOX.abc",
        "_INBOX.user.abc.1",
        "_INBOX.LLM-7",
        "_INBOX." + "x" * 249,
        "llm.reply.mine",
        "llm.reply.other",
        "llm.reply.LLM-7x",
        "llm.reply.x.LLM-7",
    ],
)
def test_a_literal_subject_under_an_inbox_or_the_replies_is_allowed(subject):
    assert is_reply_to(subject, "mine")


@pytest.mark.parametrize(
    "subject",
    [
        "",
        "_INBOX",
        "_INBOX.",
        "_INBOX.a.",
        "_INBOX..a",
        "_INBOX.*",
        "_INBOX.>",
        "_INBOX.a.*",
        "_INBOX.a.>",
        "_INBOX.a*b",
        "_INBOX.a b",
        " _INBOX.a",
        "_INBOX.a ",
        "_INBOX.a\n",
        "_INBOX.a\r\nPUB llm.request.high 0",
        "_INBOX.\x00",
        "_INBOX.\x1b[2J",
        "_INBOX.\x7f",
        "_INBOX.\x85",
        "_INBOX.\u00a0",
        "_INBOX.\u2028",
        "_INBOX.\u200b",
        "_INBOX.\u202e",
        "_INBOX.\ud800",
        "_inbox.a",
        "_INBOXES.a",
        "_INBOX." + "x" * 250,
        "llm.reply",
        "llm.reply.",
        "llm.reply.*",
        "llm.reply.>",
        "llm.reply.LLM-7",
        "llm.replying.a",
        "llm.request.high",
        "llm.out.mine",
        "llm.cancel.mine",
        "$JS.API.STREAM.DELETE.LLM",
        "$SYS.REQ.SERVER.PING",
        ">",
        "*",
    ],
    ids=ascii,
)
def test_no_other_subject_is_allowed(subject):
    assert not is_reply_to(subject, "mine")


def test_an_id_that_the_broker_handed_out_may_be_written_to_by_its_owner_alone():
    assert is_reply_to("llm.reply.LLM-7", "LLM-7")
    assert not is_reply_to("llm.reply.LLM-7", "LLM-8")


@given(st.sampled_from(["_INBOX.", "llm.reply.", ""]), anything)
def test_what_is_allowed_is_always_a_literal_subject_in_its_place(prefix, rest):
    subject = prefix + rest
    if is_reply_to(subject, "mine"):
        assert subject.startswith(("_INBOX.", "llm.reply."))
        assert all(subject.split("."))
        assert subject.isprintable()
        assert not set(subject) & set(" *>")
        subject.encode()


INBOXES = ["_INBOX.a", "_INBOX.client.x.1", "_R_.abc.d"]
NO_INBOXES = ["", "_INBOX", "_INBOX.", "_INBOX..a", "_INBOX.*", "_INBOX.>", "_INBOX.a b", "llm.reply.x", "llm.out.x"]
NO_INBOXES += ["$JS.API.STREAM.DELETE.LLM", "$JS.ACK.LLM.high.1.1.1.1.1", "llm.cancel.x", "_INBOX." + "x" * 256]


def test_only_inboxes_are_answered():
    assert [subject for subject in INBOXES + NO_INBOXES if is_inbox(subject)] == INBOXES


def test_header_names_are_read_in_any_case():
    given = {"nats-msg-id": "a", "REPLY-TO": "_INBOX.x", "llm-Timeout": "3", "Traceparent": "t", "X-Mine": "m"}
    named = {"Nats-Msg-Id": "a", "Reply-To": "_INBOX.x", "Llm-Timeout": "3", "traceparent": "t", "X-Mine": "m"}
    assert with_known_names(given) == named
    assert with_known_names(named) is named


def test_of_two_spellings_of_a_header_the_documented_one_counts():
    for headers in ({"llm-task": "simple", "Llm-Task": "complex"}, {"Llm-Task": "complex", "llm-task": "simple"}):
        assert with_known_names(headers) == {"Llm-Task": "complex"}


# ---- tenants

tenants = st.text("abcXYZ019_-", min_size=1, max_size=64)


def test_the_lanes_of_a_tenant_are_named_as_the_contract_says():
    assert Lane(Priority.LOW, Task.UNTRIAGED, "acme").subject == "llm.request.low.t.acme"
    assert Lane(Priority.HIGH, Task.SIMPLE, "acme").subject == "llm.request.high.t.acme.simple"
    assert Lane(Priority.HIGH, Task.SIMPLE, "acme").consumer == "high_simple_t_acme"
    assert [lane.subject for lane in TENANT_LANES][:2] == ["llm.request.high.t.*", "llm.request.high.t.*.simple"]


@given(tenants, st.sampled_from(LANES))
@example("simple", LANES[0])
@example("t", LANES[1])
def test_a_tenants_subject_leads_back_to_its_lane_and_is_no_other_lanes(tenant, plain):
    lane = plain._replace(tenant=tenant)
    assert lane_of_subject(lane.subject) == lane
    assert lane_of_consumer(lane.consumer) == lane
    assert lane_of_consumer(plain.consumer) == plain
    assert tenant_of(lane.subject) == tenant
    assert tenant_of(plain.subject) == ""
    assert sum(_matches(served.subject, lane.subject) for served in LANES + TENANT_LANES) == 1


@given(st.lists(st.tuples(tenants, st.sampled_from(LANES)), min_size=2, max_size=8, unique=True))
@example([("x_simple", LANES[0]), ("x", LANES[1])])
@example([("Ann", LANES[0]), ("ann", LANES[0])])
def test_no_two_lanes_share_a_consumer_whatever_the_file_system_makes_of_capitals(pairs):
    names = [plain._replace(tenant=tenant).consumer for tenant, plain in pairs]
    assert len({name.lower() for name in names}) == len(pairs)
    assert not {GUARD_LANE.consumer, *(lane.consumer for lane in LANES)}.intersection(names)
    assert all(len(name) < 200 and not set(" .*>/\\").intersection(name) for name in names)


def test_a_name_that_is_no_consumer_of_a_lane_has_none():
    assert all(lane_of_consumer(name) is None for name in ("", "high_t", "urgent", "urgent_t_ann", "ollama_high"))
    assert lane_of_consumer(GUARD_LANE.consumer) == GUARD_LANE


@pytest.mark.parametrize(
    "subject",
    [
        "llm.request",
        "llm.request.high.t",
        "llm.request.high.u.acme",
        "llm.request.high.t.acme.odd",
        "llm.request.high.t.acme.simple.x",
        "llm.request.evil.t.acme",
        "llm.ollama.high.t.acme",
    ],
)
def test_other_subjects_are_no_lanes(subject):
    assert lane_of_subject(subject) is None


def _matches(pattern: str, subject: str) -> bool:
    wanted, tokens = pattern.split("."), subject.split(".")
    return len(wanted) == len(tokens) and all(a in ("*", b) for a, b in zip(wanted, tokens, strict=True))


@given(st.one_of(st.just(""), tenants), ids)
def test_a_name_holds_tenant_and_id(tenant, request_id):
    name = request_name(tenant, request_id)
    assert split_name(name) == (tenant, request_id)
    assert is_request_name(name)
    assert position_tenant(position_subject(tenant)) == tenant


def test_the_default_tenants_names_are_ids():
    assert request_name("", "job-7") == "job-7"
    assert request_name("acme", "job-7") == "t.acme.job-7"
    assert (out_subject("t.acme.x"), reply_subject("t.acme.x")) == ("llm.out.t.acme.x", "llm.reply.t.acme.x")
    assert position_subject("acme") == "llm.queue.position.t.acme"


@given(anything)
@example("t..x")
@example("t.a.")
@example("t.a.b.c")
@example("t.*.x")
@example("u.a.b")
def test_a_name_is_one_token_or_three(text):
    tenant, request_id = split_name(text)
    valid = is_request_id(request_id) and (is_tenant(tenant) if text.startswith("t.") else text == request_id)
    assert is_request_name(text) == valid


OWN = ["llm.reply.t.acme.x", "llm.reply.t.acme.other", "_INBOX.t.acme.1", "_INBOX.abc"]
OF_OTHERS = ["llm.reply.x", "llm.reply.LLM-7", "llm.reply.t.bolt.x", "llm.reply.t.bolt", "llm.reply.t.acme.LLM-7"]
OF_OTHERS += ["llm.reply.t.acmes.x", "llm.reply.t.acme", "_INBOX.t.bolt.1", "_INBOX.client.1", "_INBOX.engine.1"]
OF_OTHERS += ["_INBOX.pipeline.1", "_INBOX.t.acme"]


def test_a_tenants_answer_goes_to_its_own_subjects_alone():
    assert [subject for subject in OWN + OF_OTHERS if is_reply_to(subject, "t.acme.x")] == OWN
    assert is_reply_to("llm.reply.t.acme.LLM-7", "t.acme.LLM-7")


@pytest.mark.parametrize("subject", ["llm.reply.t.acme.x", "llm.reply.t.x", "llm.reply.t.acme.x.y", "_INBOX.t.acme.1"])
def test_the_default_tenants_answer_goes_to_no_tenant(subject):
    assert not is_reply_to(subject, "mine")
