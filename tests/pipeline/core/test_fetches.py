"""Who asks for which fetch, what each caller is told, and when a fetch is given up."""

from __future__ import annotations

from pipeline.core.fetches import KEPT_S, LEASE_S, Fetches
from pipeline.wire.answers import ErrorBody
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.fetches import FetchCall, FetchStep

MANIFEST = FetchStep("pulling manifest")


def half(completed: int) -> FetchStep:
    return FetchStep("pulling abc", "sha256:abc", 10, completed)


def test_calls_for_one_model_share_a_fetch_and_others_have_their_own():
    fetches = Fetches()
    first, begins = fetches.ask(FetchCall("x:latest", "a"), "x", 0.0)
    assert begins
    assert fetches.ask(FetchCall("x", "b"), "x", 0.0) == (first, False)
    other, begins = fetches.ask(FetchCall("y", "c"), "y", 0.0)
    assert begins
    assert other is not first


def test_a_report_has_the_steps_that_have_changed_since_the_last_one():
    fetch, _ = Fetches().ask(FetchCall("x", "a"), "x", 0.0)
    for step in (MANIFEST, half(3), half(7)):
        fetch.note(step)
    first = fetch.report(0)
    assert first.steps == [MANIFEST, half(7)]
    assert fetch.report(first.revision).steps == []
    fetch.note(half(7))
    assert fetch.report(first.revision).revision == first.revision
    fetch.note(half(10))
    fetch.note(FetchStep("converting x"))
    assert fetch.report(first.revision).steps == [half(10), FetchStep("converting x")]
    assert not fetch.report(0).ended
    fetch.end(1.0, served="x")
    last = fetch.report(first.revision)
    assert (last.ended, last.served, last.error) == (True, "x", None)


def test_a_fetch_lasts_as_long_as_one_of_its_callers_asks():
    fetches = Fetches()
    fetch, _ = fetches.ask(FetchCall("x", "a"), "x", 0.0)
    fetches.ask(FetchCall("x", "b"), "x", 0.0)
    fetches.leave(FetchCall("x", "a", leaves=True))
    assert not fetch.is_abandoned(LEASE_S)
    assert fetch.is_abandoned(LEASE_S + 0.1)
    fetches.ask(FetchCall("x", "b"), "x", LEASE_S)
    assert not fetch.is_abandoned(LEASE_S + 0.1)
    fetches.leave(FetchCall("x", "b", leaves=True))
    assert fetch.is_abandoned(LEASE_S)
    fetch.end(LEASE_S)
    assert not fetch.is_abandoned(9 * LEASE_S)


def test_the_end_is_for_its_own_callers_and_a_new_one_begins_anew():
    fetches = Fetches()
    fetch, _ = fetches.ask(FetchCall("x", "a"), "x", 0.0)
    trouble = ErrorBody.of(HeadraceError(ErrorCode.ENGINE_FAILED, "The disk is full."))
    fetch.end(1.0, error=trouble)
    fetch.end(1.0, served="x")
    found, begins = fetches.ask(FetchCall("x", "a"), "x", 2.0)
    assert (found, begins, found.report(0).error) == (fetch, False, trouble)
    anew, begins = fetches.ask(FetchCall("x", "b"), "x", 2.0)
    assert begins
    assert fetches.ask(FetchCall("x", "b"), "x", 2.0) == (anew, False)


def test_ends_are_forgotten():
    fetches = Fetches()
    for number in range(9):
        fetch, _ = fetches.ask(FetchCall("x", f"{number}"), "x", 0.0)
        fetch.end(0.0)
    fetches.ask(FetchCall("x", "last"), "x", KEPT_S)
    assert len(fetches._fetches) == 1
