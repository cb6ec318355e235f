"""What others said counts from the moment at which it was heard here."""

from __future__ import annotations

import pytest

from pipeline.core.roster import REMEMBERED_S, Roster
from pipeline.core.saturation import STALE_S
from pipeline.wire.messages import Load, PerPriority, PerPriorityCount, Slots, StoreReport, WorkerStatus


def status(worker="w1", *, engine="mlx", state="ready", models=("m",), at=0.0):
    none = PerPriorityCount()
    return WorkerStatus(worker, engine, state, list(models), Slots(0, 1), none, 0, 0, 0, 0, 0, at)


def load(engine="mlx", *, at=0.0):
    return Load(engine, "busy", 0.8, PerPriority(), PerPriorityCount(), Slots(1, 1), 1.0, "", at)


def names(statuses):
    return [one.worker for one in statuses]


@pytest.fixture
def roster():
    return Roster()


def test_workers_are_known_by_engine_until_they_leave(roster):
    for one in (status("w1"), status("w2"), status("w3", engine="ollama")):
        roster.heard(one, 1.0)
    assert names(roster.workers("mlx", 1.0)) == ["w1", "w2"]
    assert names(roster.workers("ollama", 1.0)) == ["w3"]
    roster.heard(status("w1", state="gone"), 1.1)
    assert names(roster.workers("mlx", 1.1)) == ["w2"]


@pytest.mark.parametrize("at", [0.0, 1e9, 4e9])
def test_a_status_is_fresh_for_three_seconds_after_it_was_heard_whatever_its_own_time(roster, at):
    roster.heard(status(at=at), 10.0)
    assert roster.workers("mlx", 10.0 + STALE_S)
    assert not roster.workers("mlx", 10.01 + STALE_S)


def test_a_worker_is_remembered_for_as_long_as_a_restart_takes(roster):
    roster.heard(status("crashed"), 0.0)
    roster.heard(status("stopped", state="gone"), 5.0)
    assert names(roster.remembered("mlx", REMEMBERED_S)) == ["crashed", "stopped"]
    assert names(roster.remembered("mlx", REMEMBERED_S + 1)) == ["stopped"]
    assert roster.remembered("ollama", 1.0) == []


def test_what_is_no_longer_remembered_takes_no_room(roster):
    for number in range(100):
        roster.heard(status(f"w{number}"), number * REMEMBERED_S)
    assert len(roster._statuses) <= 2


@pytest.mark.parametrize("at", [0.0, 1e9, 4e9])
def test_a_load_is_fresh_for_three_seconds_after_it_was_heard_whatever_its_own_time(roster, at):
    roster.heard_load(load(at=at), 10.0)
    assert roster.load("mlx", 10.0 + STALE_S) == load(at=at)
    assert roster.load("mlx", 10.01 + STALE_S) is None
    assert roster.load("ollama", 10.0) is None


def test_a_report_on_the_store_is_fresh_for_three_seconds(roster):
    assert roster.store(0.0) is None
    roster.heard_store(StoreReport("full", "no room"), 1.0)
    assert roster.store(1.0 + STALE_S).state == "full"
    assert roster.store(1.1 + STALE_S) is None


def test_failed_writes_count_where_no_process_reports_on_the_store_and_until_it_was_restarted(roster):
    for at in (1.0, 3.0):
        roster.heard_failure("llm.out.x", at)
    assert roster.store(3.0).state == "failed"
    roster.heard_store(StoreReport("failed", "cannot write"), 3.1)
    roster.heard_store(StoreReport("ok", ""), 3.2)
    assert roster.store(3.2).state == "ok"
