"""Attempts that ended without a word are noticed by the next event of their request."""

from __future__ import annotations

import pytest

from pipeline.core.attempts import _MOST, Attempts, LostAttempt
from pipeline.wire.messages import EventKind, RequestEvent
from pipeline.wire.subjects import Priority

BEGUN = LostAttempt("r", "00-a-b-01", "mlx-1", 1, 100.0)


def event(kind: EventKind, worker: str = "", request_id: str = "r", deliveries: int = 1) -> RequestEvent:
    return RequestEvent(request_id, kind, Priority.HIGH, worker=worker, deliveries=deliveries)


def started(worker: str, attempt: int, request_id: str = "r", deliveries: int | None = None) -> RequestEvent:
    return RequestEvent(
        request_id,
        "started",
        Priority.HIGH,
        worker=worker,
        attempt=attempt,
        deliveries=deliveries or attempt,
        trace=BEGUN.trace,
    )


@pytest.fixture
def attempts() -> Attempts:
    followed = Attempts()
    assert followed.heard(started("mlx-1", 1), 100.0) is None
    return followed


def test_a_second_start_shows_that_the_first_attempt_was_lost(attempts: Attempts):
    suspect = attempts.heard(started("mlx-2", 2), 120.0)
    assert suspect == BEGUN._replace(noticed_at=120.0, reason="another attempt began")
    assert attempts.is_lost(suspect)
    assert not attempts.is_lost(suspect)
    suspect = attempts.heard(event("failed", "mlx-3"), 150.0)
    assert (suspect.worker, suspect.attempt, suspect.began_at) == ("mlx-2", 2, 120.0)
    assert attempts.is_lost(suspect)
    assert attempts.heard(started("mlx-4", 3), 160.0) is None


@pytest.mark.parametrize("kind", ["done", "failed", "cancelled", "expired", "returned", "spilled", "triaged"])
def test_an_attempt_that_its_worker_ends_is_not_lost(attempts: Attempts, kind: EventKind):
    assert attempts.heard(event(kind, "mlx-1"), 110.0) is None
    assert attempts.heard(started("mlx-2", 2), 120.0) is None


@pytest.mark.parametrize("kind", ["returned", "spilled", "triaged"])
def test_an_attempt_whose_end_is_heard_after_the_next_start_is_not_lost(attempts: Attempts, kind: EventKind):
    suspect = attempts.heard(started("mlx-2", 2), 120.0)
    assert attempts.heard(event(kind, "mlx-1"), 120.1) is None
    assert not attempts.is_lost(suspect)
    assert attempts.heard(event("done", "mlx-2"), 121.0) is None


def test_a_request_that_came_back_from_the_other_engine_was_not_lost(attempts: Attempts):
    """That move has no event."""
    assert attempts.heard(started("mlx-2", 2, deliveries=1), 120.0) is None
    assert attempts.heard(event("returned", "mlx-2", deliveries=2), 120.1) is None
    assert attempts.heard(started("mlx-3", 2), 121.0) is None


def test_a_request_that_moved_was_not_lost(attempts: Attempts):
    assert attempts.heard(started("ollama-1", 2, deliveries=1), 120.0) is None
    assert attempts.heard(event("spilled", "router-1"), 120.1) is None
    assert attempts.heard(event("done", "ollama-1"), 121.0) is None


@pytest.mark.parametrize("kind", ["spilled", "triaged"])
@pytest.mark.parametrize("late", [False, True])
def test_an_attempt_is_lost_whose_request_the_router_moves_when_it_comes_again(
    attempts: Attempts, kind: EventKind, late: bool
):
    moved, begun = event(kind, "router-1", deliveries=2), started("ollama-1", 1, deliveries=1)
    first, second = (begun, moved) if late else (moved, begun)
    suspects = [attempts.heard(first, 120.0), attempts.heard(second, 120.0)]
    assert suspects[late] == BEGUN._replace(noticed_at=120.0, reason="another process took the request")
    assert suspects[not late] is None
    assert attempts.is_lost(suspects[late])
    assert attempts.heard(event("done", "ollama-1"), 121.0) is None


@pytest.mark.parametrize("kind", ["cancelled", "expired", "failed"])
def test_an_attempt_of_a_request_that_the_monitor_ends_is_lost(attempts: Attempts, kind: EventKind):
    suspect = attempts.heard(event(kind), 110.0)
    assert suspect == BEGUN._replace(noticed_at=110.0, reason="another process ended the request")
    assert attempts.is_lost(suspect)


def test_attempts_of_workers_that_do_not_trace_are_not_followed():
    attempts = Attempts()
    attempts.heard(RequestEvent("r", "started", Priority.HIGH, worker="mlx-1", attempt=1, deliveries=1), 100.0)
    assert attempts.heard(event("cancelled"), 110.0) is None


def test_the_oldest_attempts_are_forgotten_first(attempts: Attempts):
    for number in range(_MOST):
        attempts.heard(started("mlx-1", 1, f"r{number}"), 101.0)
    assert len(attempts._running) == _MOST
    assert attempts.heard(event("cancelled"), 110.0) is None
    assert attempts.heard(event("cancelled", request_id="r0"), 110.0) is not None
