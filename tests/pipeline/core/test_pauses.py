"""Pauses of lanes and tenants: what they cover, how they begin and end, and what is kept of them."""

from __future__ import annotations

import pytest

from pipeline.core.pauses import MOST_LOGGED, MOST_PAUSES, Pauses, described, paused, resumed, shown_pauses
from pipeline.wire.errors import HeadraceError
from pipeline.wire.pauses import Pause, PauseCall, PausedState
from pipeline.wire.subjects import ANY_TENANT, Lane, Priority, Task

LOW, HIGH = Priority.LOW, Priority.HIGH


def after(*calls):
    state = PausedState()
    for number, call in enumerate(calls):
        state = paused(state, call, float(number))
    return state


def holds(call, priority, tenant):
    return Pauses.of(after(call)).holds(priority, tenant)


def test_a_paused_lane_holds_every_tenant():
    assert holds(PauseCall(LOW), LOW, "")
    assert holds(PauseCall(LOW), LOW, "acme")
    assert not holds(PauseCall(LOW), HIGH, "acme")


def test_a_paused_tenant_is_held_in_every_lane():
    call = PauseCall(tenant="acme")
    assert holds(call, LOW, "acme")
    assert holds(call, HIGH, "acme")
    assert not holds(call, HIGH, "bolt")
    assert not holds(call, HIGH, "")


def test_one_lane_of_a_tenant_is_paused_alone():
    call = PauseCall(LOW, "acme")
    assert holds(call, LOW, "acme")
    assert not holds(call, HIGH, "acme")
    assert not holds(call, LOW, "")


def test_the_default_tenant_has_a_name():
    assert holds(PauseCall(tenant="default"), LOW, "")
    assert not holds(PauseCall(tenant="default"), LOW, "acme")


@pytest.mark.parametrize(
    ("call", "own", "shared"),
    [(PauseCall(LOW), True, True), (PauseCall(tenant="acme"), True, False), (PauseCall(LOW, "bolt"), False, False)],
)
def test_a_lane_of_several_tenants_is_held_only_if_all_are(call, own, shared):
    pauses = Pauses.of(after(call))
    assert pauses.holds_lane(Lane(LOW, Task.SIMPLE, "acme")) is own
    assert pauses.holds_lane(Lane(LOW, Task.SIMPLE, ANY_TENANT)) is shared


def test_a_pause_is_kept_with_who_when_and_why():
    state = paused(PausedState(), PauseCall(LOW, by="ada", reason="a demo"), 7.0)
    assert state.pauses == [Pause(LOW, None, "ada", 7.0, "a demo")]
    (entry,) = state.log
    assert (entry.action, entry.by, entry.at, entry.reason) == ("pause", "ada", 7.0, "a demo")


def test_pausing_twice_keeps_the_first_pause():
    state = after(PauseCall(LOW, by="ada"))
    assert paused(state, PauseCall(LOW, by="bob"), 9.0) is state


def test_a_resume_ends_that_pause_alone_and_is_logged():
    state = resumed(after(PauseCall(LOW), PauseCall(tenant="acme")), PauseCall(LOW, by="bob"), 9.0)
    assert [(pause.priority, pause.tenant) for pause in state.pauses] == [(None, "acme")]
    assert [(entry.action, entry.by) for entry in state.log] == [("pause", ""), ("pause", ""), ("resume", "bob")]


def test_what_is_not_paused_cannot_be_resumed():
    with pytest.raises(HeadraceError, match="Lane low of tenant acme is not paused"):
        resumed(after(PauseCall(tenant="acme")), PauseCall(LOW, "acme"), 9.0)


@pytest.mark.parametrize("call", [PauseCall(), PauseCall(tenant="a.b"), PauseCall(LOW, "*"), PauseCall(tenant="")])
def test_a_pause_names_a_lane_or_a_tenant(call):
    with pytest.raises(HeadraceError):
        paused(PausedState(), call, 0.0)


def test_the_state_is_bounded():
    state = after(*(PauseCall(tenant=f"t{number}", reason="x" * 5000) for number in range(MOST_PAUSES)))
    assert len(state.log) == MOST_LOGGED
    assert len(state.pauses[0].reason) == 200
    with pytest.raises(HeadraceError, match="Resume some"):
        paused(state, PauseCall(LOW), 0.0)


def test_scopes_are_described():
    assert described(LOW, None) == "lane low"
    assert described(None, "acme") == "tenant acme"
    assert described(LOW, "acme") == "lane low of tenant acme"


def test_what_every_tenant_may_see_has_no_names():
    state = after(PauseCall(LOW, by="ada", reason="demo"), PauseCall(tenant="acme", by="ada"), PauseCall(HIGH, "bolt"))
    lanes, tenants = shown_pauses(state)
    assert lanes == [Pause(LOW, None, "", 0.0, "demo")]
    assert tenants == 2
