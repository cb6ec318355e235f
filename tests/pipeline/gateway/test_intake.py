"""From a call to the message that is published."""

from __future__ import annotations

import pytest

from pipeline.gateway.dialects import openai
from pipeline.gateway.identity import Caller, make_key
from pipeline.gateway.intake import Intake, Repeats, refused_by_tenants, take_in, with_exact
from pipeline.gateway.statuses import HttpError
from pipeline.wire.decoding import decode_chat
from pipeline.wire.errors import HeadraceError
from pipeline.wire.messages import Load, PerPriority, PerPriorityCount, Slots
from pipeline.wire.requests import ChatRequest, EmbeddingRequest
from pipeline.wire.subjects import DUPLICATE_WINDOW_S, Priority

SIMPLE = b'{"messages": [{"role": "user", "content": "What is the capital of France?"}]}'
COMPLEX = b'{"messages": [{"role": "user", "content": "Explain step by step, and write a function that proves it."}]}'
UNSURE = b'{"messages": [{"role": "user", "content": "Purple monday?"}]}'
TRACE = f"00-{'ab' * 16}-{'cd' * 8}-01"


def taken_in(
    headers: dict[str, str], body: bytes = SIMPLE, caller: Caller | None = None, *, saturated: bool = False
) -> Intake:
    asked = openai.read_chat(body, 1 << 20)
    return take_in(caller or Caller("127.0.0.1"), headers, asked, default=Priority.MEDIUM, saturated=saturated)


def test_under_saturation_what_is_beyond_doubt_is_said_in_the_subject():
    assert taken_in({}, saturated=True).outgoing.subject == "llm.request.medium.simple"
    assert taken_in({"x-priority": "high"}, COMPLEX, saturated=True).outgoing.subject == "llm.request.high.complex"
    assert taken_in({"x-priority": "low"}, UNSURE, saturated=True).outgoing.subject == "llm.request.low"


def test_the_class_and_its_reason_go_along_for_the_trace():
    verdict = taken_in({}, saturated=True).outgoing.verdict
    assert (verdict.task, verdict.reason) == ("simple", "short factual question")
    assert taken_in({}, UNSURE, saturated=True).outgoing.verdict is None
    assert taken_in({}).outgoing.verdict is None


def test_otherwise_nobody_asks_what_class_a_request_is():
    for body in (SIMPLE, COMPLEX, UNSURE):
        assert taken_in({}, body).outgoing.subject == "llm.request.medium"


def test_a_call_that_says_nothing_is_published_with_its_id_alone():
    intake = taken_in({})
    assert intake.outgoing.headers == {}
    assert intake.outgoing.body == SIMPLE
    assert not intake.outgoing.given_id
    assert (intake.timeout_s, intake.respond_async) == (None, False)


def test_the_trace_and_the_tenant_go_along():
    _, key = make_key("alice")
    sent = {"traceparent": TRACE, "tracestate": "a=b"}
    headers = taken_in(sent, caller=Caller("alice", "team", key)).outgoing.headers
    assert headers == {"traceparent": TRACE, "tracestate": "a=b", "Llm-Tenant": "team"}


@pytest.mark.parametrize("trace", ["", "nonsense", TRACE + "x", TRACE.upper()])
def test_a_trace_that_is_none_is_not_passed_on(trace: str):
    assert taken_in({"traceparent": trace, "tracestate": "a=b"}).outgoing.headers == {}


@pytest.mark.parametrize("name", ["x-request-timeout", "timeout"])
def test_a_timeout_becomes_the_requests(name: str):
    intake = taken_in({name: "2.5"})
    assert intake.timeout_s == 2.5
    assert intake.outgoing.headers == {"Llm-Timeout": "2.5"}


@pytest.mark.parametrize("given", ["", "0", "-1", "soon", "inf", "nan", "1e3", "9999999"])
def test_a_timeout_that_is_no_number_of_seconds_is_refused(given: str):
    with pytest.raises(HttpError) as caught:
        taken_in({"x-request-timeout": given})
    assert caught.value.status == 400
    accepted = "a number of seconds above 0 and at most 2592000"
    assert caught.value.message == f'X-Request-Timeout must be {accepted}, not "{given}".'


@pytest.mark.parametrize("prefer", ["respond-async", "wait=10, Respond-Async", "respond-async,handling=lenient"])
def test_a_caller_may_prefer_not_to_wait(prefer: str):
    assert taken_in({"prefer": prefer}).respond_async


def test_an_id_means_one_request_for_as_long_as_the_broker_remembers_it():
    repeats, job = Repeats(), taken_in({"idempotency-key": "job"})
    repeats.check(job, ChatRequest(prompt="x"), 10.0)
    repeats.check(job, ChatRequest(prompt="x", stream=True), 11.0)
    repeats.check(taken_in({"idempotency-key": "other"}), ChatRequest(prompt="y"), 12.0)
    for other in (ChatRequest(prompt="y"), ChatRequest(prompt="x", seed=1), EmbeddingRequest(input="x")):
        with pytest.raises(HeadraceError, match='key "job" was used for a different request'):
            repeats.check(job, other, 13.0)
    repeats.check(job, ChatRequest(prompt="y"), 10.0 + DUPLICATE_WINDOW_S)


def test_a_refusal_names_the_key_that_the_caller_sent():
    alice = Caller("alice", "alice", make_key("alice")[1])
    repeats, job = Repeats(), taken_in({"idempotency-key": "order:7"}, caller=alice)
    repeats.check(job, ChatRequest(prompt="x"), 10.0)
    with pytest.raises(HeadraceError, match=r'^Idempotency key "order:7" was used'):
        repeats.check(job, ChatRequest(prompt="y"), 11.0)


def test_of_ids_that_nobody_gave_nothing_is_remembered():
    repeats, generated = Repeats(), taken_in({})
    for prompt in ("x", "y"):
        repeats.check(generated, ChatRequest(prompt=prompt), 1.0)


# ---- exact


def exact_of(headers: dict[str, str], body: bytes) -> bool | None:
    """What a worker reads of a call whose body and headers these are."""
    asked = with_exact(openai.read_chat(body, 1 << 20), headers)
    published = decode_chat(asked.body, max_body_bytes=1 << 20)
    assert asked.request == published
    return published.exact


HALF = b' {"messages": [{"role": "user", "content": "half a pair: \\ud83d"}], "max_tokens": 256.0, "exact": null}'


@pytest.mark.parametrize("body", [SIMPLE, HALF])
def test_a_header_asks_for_an_exact_text(body):
    assert exact_of({}, body) is None
    assert exact_of({"x-exact": "false"}, body) is None
    assert exact_of({"x-exact": "true"}, body) is True


def test_the_field_in_the_body_takes_precedence():
    body = SIMPLE.replace(b"{", b'{"exact": false, ', 1)
    assert exact_of({"x-exact": "true"}, body) is False


def test_embeddings_have_no_text_that_could_be_exact():
    asked = openai.read_embeddings(b'{"input": "x"}', 1 << 20)
    assert with_exact(asked, {"x-exact": "true"}) is asked


def test_another_value_is_refused():
    with pytest.raises(HttpError, match="X-Exact must be true or false") as caught:
        exact_of({"x-exact": "perhaps"}, SIMPLE)
    assert caught.value.status == 400


@pytest.mark.parametrize(("tenant", "queued", "refused"), [("ann", 10, True), ("ann", 9, False), ("", 10, False)])
def test_a_tenant_is_refused_when_all_tenants_together_have_the_most(tenant, queued, refused):
    load = Load("mlx", "saturated", 1.0, PerPriority(low=90_000), PerPriorityCount(low=99), Slots(8, 8), 1.0, "", 0.0)
    load.queued_tenants = PerPriorityCount(low=queued)
    error = refused_by_tenants(load, Priority.LOW, tenant, 10)
    assert (error is not None) is refused
    assert error is None or (error.status, error.code) == (503, "queue_full")
    assert refused_by_tenants(load, Priority.HIGH, "ann", 10) is None
    assert refused_by_tenants(None, Priority.LOW, "ann", 10) is None
