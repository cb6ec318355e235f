"""Who calls and what they may: keys, priorities, ids, names."""

from __future__ import annotations

import msgspec
import pytest

from pipeline.config import ConfigError, HttpKey, load
from pipeline.gateway.identity import (
    Caller,
    choice_id,
    hashed,
    identify,
    is_local_name,
    make_key,
    meant_name,
    own_id,
    own_name,
    priority_of,
    request_id,
    sender_of,
)
from pipeline.gateway.statuses import HttpError
from pipeline.wire.subjects import Priority, is_generated_id, is_request_id

SECRET, ENTRY = make_key("alice")
OTHER_SECRET, OTHER = make_key("bob")
KEYS = [ENTRY, OTHER]


def test_a_key_is_kept_as_its_hash_alone():
    assert SECRET not in ENTRY.hash
    assert ENTRY.hash == hashed(SECRET, ENTRY.hash.split(":")[1])
    assert make_key("alice")[0] != SECRET


def test_a_key_is_found_by_its_hash():
    for headers in ({"authorization": f"Bearer {OTHER_SECRET}"}, {"x-api-key": OTHER_SECRET}):
        caller = identify(KEYS, headers, "10.0.0.1")
        assert (caller.name, caller.tenant, caller.key) == ("bob", "bob", OTHER)


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {SECRET}"}, {"x-api-key": ""}],
    ids=["none", "wrong", "basic", "empty"],
)
def test_without_a_known_key_nobody_passes(headers: dict[str, str]):
    with pytest.raises(HttpError) as caught:
        identify(KEYS, headers, "127.0.0.1")
    assert caught.value.status == 401


def test_where_there_are_no_keys_everybody_passes_by_address():
    assert identify([], {"authorization": "Bearer anything"}, "127.0.0.1") == Caller("127.0.0.1")


def test_the_priority_is_the_calls_then_the_keys_then_the_default():
    low = msgspec.structs.replace(ENTRY, priority=Priority.LOW)
    assert priority_of(Caller("a", key=low), "High", Priority.MEDIUM) is Priority.HIGH
    assert priority_of(Caller("a", key=low), None, Priority.MEDIUM) is Priority.LOW
    assert priority_of(Caller("a"), None, Priority.MEDIUM) is Priority.MEDIUM


def test_an_unknown_priority_is_shown_with_what_is_accepted():
    with pytest.raises(HttpError) as caught:
        priority_of(Caller("a"), "urgent", Priority.MEDIUM)
    assert (caught.value.status, caught.value.message) == (
        400,
        'X-Priority must be high, medium or low, not "urgent".',
    )


def test_a_key_may_ask_for_no_more_than_its_highest_priority():
    caller = Caller("a", key=msgspec.structs.replace(ENTRY, highest=Priority.MEDIUM))
    assert priority_of(caller, "medium", Priority.LOW) is Priority.MEDIUM
    with pytest.raises(HttpError) as caught:
        priority_of(caller, "high", Priority.LOW)
    assert caught.value.status == 403


def test_a_key_that_may_ask_for_low_alone_has_its_unmarked_calls_there_too():
    caller = Caller("a", key=msgspec.structs.replace(ENTRY, highest=Priority.LOW))
    assert priority_of(caller, None, Priority.MEDIUM) is Priority.LOW


def test_no_caller_reaches_another_ones_requests():
    alice, bob = Caller("alice", key=ENTRY), Caller("bob", key=OTHER)
    assert own_id(alice, "job-1") == own_id(alice, own_id(alice, "job-1")) == "alice-job-1"
    assert own_id(bob, own_id(alice, "job-1")) == "bob-alice-job-1"
    assert own_id(Caller("127.0.0.1"), "job-1") == "job-1"


def test_a_key_with_a_tenant_means_the_requests_of_its_tenant_by_id_and_by_name():
    alice = Caller("alice", key=msgspec.structs.replace(ENTRY, tenant="team"))
    assert own_name(alice, "job-1") == "t.team.alice-job-1"
    for given in ("job-1", "alice-job-1", "t.team.alice-job-1", "t.team.job-1"):
        assert meant_name(alice, given) == "t.team.alice-job-1"
    assert meant_name(alice, "t.others.bob-job") == ""
    assert meant_name(Caller("bob", key=OTHER), "t.team.alice-job-1") == ""
    assert meant_name(Caller("bob", key=OTHER), "alice-job-1") == "bob-alice-job-1"


def test_a_tenant_that_cannot_stand_in_a_subject_has_the_lanes_of_the_default_tenant():
    assert Caller("a", key=msgspec.structs.replace(ENTRY, tenant="a.b")).owner == ""
    assert Caller("a", key=ENTRY).owner == ""
    assert Caller("a", key=msgspec.structs.replace(ENTRY, tenant="a_b")).owner == "a_b"


def test_an_operator_means_any_keys_request_by_its_full_id():
    operator_secret, operator = make_key("root")
    keys = [
        msgspec.structs.replace(operator, operator=True, tenant="ops"),
        msgspec.structs.replace(ENTRY, tenant="team"),
        OTHER,
    ]
    root = identify(keys, {"x-api-key": operator_secret}, "10.0.0.1")
    meant = {given: meant_name(root, given) for given in ("root-1", "alice-1", "bob-1", "LLM-7", "t.x.y")}
    assert meant == {
        "root-1": "t.ops.root-1",
        "alice-1": "t.team.alice-1",
        "bob-1": "bob-1",
        "LLM-7": "LLM-7",
        "t.x.y": "t.x.y",
    }


def test_an_id_is_the_callers_where_a_request_may_have_it():
    anybody = Caller("127.0.0.1")
    assert request_id(anybody, {"idempotency-key": "a", "x-request-id": "b"}) == ("a", True)
    assert not request_id(anybody, {"x-request-id": "b"})[1]
    assert not request_id(anybody, {"idempotency-key": ""})[1]


def test_a_key_that_cannot_be_an_id_stands_for_one_all_the_same():
    anybody, alice = Caller("127.0.0.1"), Caller("alice", "alice", make_key("alice")[1])
    keys = ("a.b", "order:7", '"8e03978e-40d5-43dd-bc93-6894a57f9324"', "x" * 129, "x" * 130, "LLM-7", "\xfc")
    chosen = [request_id(caller, {"idempotency-key": key}) for caller in (anybody, alice) for key in keys]
    assert all(given and is_request_id(each) and not is_generated_id(each) for each, given in chosen)
    assert len({each for each, _ in chosen}) == len(chosen)
    assert all(each.startswith("alice-") for each, _ in chosen[len(keys) :])
    assert chosen == [request_id(caller, {"idempotency-key": key}) for caller in (anybody, alice) for key in keys]


@pytest.mark.parametrize("first", ["a", "x" * 126, "x" * 127, "x" * 128, "LLM", "alice-" + "x" * 122])
def test_the_ids_of_further_choices_are_valid_and_of_this_call_alone(first: str):
    ids = [choice_id(first, number) for number in range(1, 32)]
    assert all(is_request_id(each) and not is_generated_id(each) and each.startswith(first[:80]) for each in ids)
    assert len(set(ids)) == 31
    other = first[:-1] + "-"
    assert not {choice_id(other, number) for number in range(1, 32)} & set(ids)
    assert choice_id("job", 2) == "job-2"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff::2", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("::1", "::2", False),
        ("unknown", "unknown", True),
    ],
)
def test_the_addresses_of_one_sender_are_told_from_those_of_another(one: str, other: str, same: bool):
    assert (sender_of(one) == sender_of(other)) is same


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *[(name, True) for name in ("localhost:8080", "127.0.0.1", "[::1]:80", "app.localhost")],
        *[(name, False) for name in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "null")],
        *[(name, False) for name in ("mac.local:1", "host.docker.internal")],
    ],
)
def test_this_machines_own_names_are_told_from_others(name: str, expected: bool):
    assert is_local_name(name) is expected


def test_keys_come_from_the_environment_and_bad_ones_are_refused():
    entry = msgspec.json.encode([ENTRY]).decode()
    assert load(environ={"HEADRACE_HTTP_KEYS": entry}).http_keys == [ENTRY]
    broker = entry.replace("alice", "LLM")  # the ids that the broker gives begin with it
    for bad in ('[{"name": "a"}]', '[{"name": "a-b", "hash": "x"}]', f'[{{"name": "a", "hash": "{SECRET}"}}]', broker):
        with pytest.raises(ConfigError):
            load(environ={"HEADRACE_HTTP_KEYS": bad})


def test_an_entry_survives_being_passed_on():
    from pipeline.config import Config, to_environment

    config = Config(http_keys=[msgspec.structs.replace(ENTRY, highest=Priority.LOW, answers_per_s=2.5)])
    assert load(environ=to_environment(config)).http_keys == config.http_keys
    assert isinstance(config.http_keys[0], HttpKey)
