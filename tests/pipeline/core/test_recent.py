from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.envelope import Envelope
from pipeline.core.recent import WINDOW_S, Recent, Seen
from pipeline.wire.errors import ErrorCode
from pipeline.wire.messages import Load, PerPriority, PerPriorityCount, RequestEvent, Slots
from pipeline.wire.subjects import Move, Priority, Task

NOW = 1_000_000.0


def everybody(_: str) -> bool:
    return True


def envelope(request_id: str = "r1", *, at: float = NOW, move: Move | None = None, tenant: str = "", why: str = ""):
    return Envelope(request_id, Priority.HIGH, Task.UNTRIAGED, at, 1, move, why, tenant=tenant)


def event(kind: str, request_id: str = "r1", **more: object) -> RequestEvent:
    return RequestEvent(id=request_id, kind=kind, priority=Priority.HIGH, **more)


def load(at: float, *, level: str = "normal", saturation: float = 0.5, engine: str = "mlx") -> Load:
    return Load(
        engine, level, saturation, PerPriority(), PerPriorityCount(high=1, low=3), Slots(1, 2), 10.0, "because", at
    )


def only(recent: Recent) -> Seen:
    (request,) = recent.requests(0, everybody)
    return request


# ---- one request


def test_a_request_that_runs_on_its_own_lane_has_the_times_of_its_account():
    recent = Recent()
    recent.stored(envelope(tenant="alice"), NOW)
    assert (only(recent).state, only(recent).at, only(recent).tenant) == ("queued", NOW, "alice")
    recent.event(event("started", engine="mlx", wait_ms=5.0), NOW + 0.1)
    assert (only(recent).state, only(recent).engine, only(recent).started_ms) == ("running", "mlx", 5.0)
    done = event("done", engine="mlx", wait_ms=5.0, ttft_ms=20.0, total_ms=90.0, reason="mlx has room")
    recent.event(done, NOW + 0.2)
    request = only(recent)
    assert (request.state, request.started_ms, request.first_ms, request.ended_ms) == ("done", 5.0, 20.0, 90.0)
    assert (request.moved_ms, request.triage_ms, request.reason) == (None, None, "mlx has room")


def test_a_spilled_request_shows_when_it_was_triaged_moved_and_begun():
    recent = Recent()
    recent.stored(envelope(), NOW)
    recent.stored(envelope(move=Move.SPILLED, why="mlx is saturated"), NOW + 0.4)
    recent.event(event("spilled", wait_ms=390.0, reason="mlx is saturated"), NOW + 0.41)
    request = only(recent)
    assert (request.state, request.triage_ms, request.moved_ms) == ("spilled", 390.0, 400.0)
    assert request.reason == "mlx is saturated"
    recent.event(event("started", engine="ollama", wait_ms=700.0), NOW + 0.7)
    assert (only(recent).state, only(recent).moved_ms, only(recent).started_ms) == ("running", 400.0, 700.0)
    (move,) = recent.moves(0, everybody)
    assert (move.id, move.to, move.reason, move.at) == ("r1", "ollama", "mlx is saturated", NOW + 0.4)


def test_what_comes_back_from_ollama_waits_again():
    recent = Recent()
    recent.stored(envelope(move=Move.SPILLED), NOW + 0.1)
    recent.event(event("started", engine="ollama", wait_ms=200.0), NOW + 0.2)
    recent.stored(envelope(move=Move.RETURNED, why="back from ollama: it broke off"), NOW + 0.5)
    request = only(recent)
    assert (request.state, request.engine, request.started_ms, request.moved_ms) == ("triaged", None, None, 500.0)
    assert [move.to for move in recent.moves(0, everybody)] == ["mlx", "ollama"]


def test_what_is_handed_back_is_queued_again():
    recent = Recent()
    recent.stored(envelope(), NOW)
    recent.event(event("started", engine="mlx", wait_ms=5.0), NOW + 0.1)
    recent.event(event("returned", engine="mlx"), NOW + 0.2)
    assert (only(recent).state, only(recent).engine, only(recent).started_ms) == ("queued", None, None)


def test_news_that_overtake_each_other_end_in_the_same_state():
    recent = Recent()
    recent.event(event("started", engine="ollama", wait_ms=400.0), NOW + 0.4)
    recent.event(event("spilled", wait_ms=100.0, reason="short"), NOW + 0.41)
    recent.stored(envelope(tenant="alice"), NOW)
    recent.stored(envelope(move=Move.SPILLED, tenant="alice", why="short"), NOW + 0.2)
    request = only(recent)
    assert (request.state, request.engine, request.tenant) == ("running", "ollama", "alice")
    assert (request.at, request.triage_ms, request.started_ms) == (NOW, 100.0, 400.0)


def test_an_error_ends_a_request_with_its_code():
    recent = Recent()
    recent.stored(envelope(), NOW)
    recent.event(event("cancelled", code=ErrorCode.CANCELLED), NOW + 3)
    assert (only(recent).state, only(recent).code, only(recent).ended_ms) == ("cancelled", "cancelled", 3000.0)
    recent.event(event("returned"), NOW + 4)
    assert only(recent).state == "cancelled"


def test_a_request_that_was_never_announced_is_known_from_its_end():
    recent = Recent()
    done = event("done", engine="mlx", wait_ms=100.0, ttft_ms=200.0, total_ms=500.0, tenant="alice")
    recent.event(done, NOW)
    assert (only(recent).state, only(recent).at, only(recent).ended_ms) == ("done", NOW - 0.5, 500.0)
    assert only(recent).tenant == "alice"


def test_an_id_that_is_used_again_is_another_request():
    recent = Recent()
    recent.stored(envelope(), NOW)
    recent.event(event("failed", code=ErrorCode.ENGINE_FAILED), NOW + 1)
    recent.stored(envelope(at=NOW + 60, move=Move.REPLAYED), NOW + 60)
    assert (only(recent).state, only(recent).at, only(recent).code) == ("queued", NOW + 60, None)


def test_a_clock_that_is_behind_makes_no_negative_times():
    recent = Recent()
    recent.stored(envelope(), NOW)
    recent.event(event("expired"), NOW - 5)
    assert only(recent).ended_ms == 0.0


# ---- many


def test_a_reader_gets_what_is_newer_than_what_it_has():
    recent = Recent()
    for number in range(3):
        recent.stored(envelope(f"r{number}"), NOW)
    seen = recent.change
    assert recent.requests(seen, everybody) == []
    recent.event(event("started", "r0", engine="mlx", wait_ms=1.0), NOW)
    assert [(r.id, r.state) for r in recent.requests(seen, everybody)] == [("r0", "running")]
    assert [r.id for r in recent.requests(0, everybody)] == ["r0", "r2", "r1"]


def test_after_something_was_missed_only_what_has_ended_is_sure():
    recent = Recent()
    for name in ("waits", "runs", "over"):
        recent.stored(envelope(name), NOW)
    recent.event(event("started", "runs", engine="mlx", wait_ms=1.0), NOW)
    recent.event(event("done", "over", engine="mlx", total_ms=2.0), NOW)
    recent.forget_unfinished()
    assert [r.id for r in recent.requests(0, everybody)] == ["over"]
    recent.event(event("done", "runs", engine="mlx", total_ms=2.0), NOW + 9)
    assert [r.id for r in recent.requests(0, everybody)] == ["runs", "over"]


def test_a_tenant_sees_its_own():
    recent = Recent()
    for tenant in ("alice", "bob", ""):
        recent.stored(envelope(f"of-{tenant}", tenant=tenant, move=Move.SPILLED), NOW)
    assert [r.id for r in recent.requests(0, "bob".__eq__)] == ["of-bob"]
    assert [m.id for m in recent.moves(0, "bob".__eq__)] == ["of-bob"]


def test_a_tenants_few_requests_are_found_among_many_of_others():
    recent = Recent(shown=5)
    recent.stored(envelope("mine", tenant="bob"), NOW)
    for number in range(50):
        recent.stored(envelope(f"r{number}", tenant="alice"), NOW)
    assert [r.id for r in recent.requests(0, "bob".__eq__)] == ["mine"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["stored", "spill", "return", "started", "returned", "done", "failed", "spilled"]),
            st.integers(0, 12),
            st.floats(0, 100),
        ),
        max_size=80,
    )
)
def test_whatever_is_heard_it_stays_bounded_and_in_order(heard):
    recent = Recent(kept=6, shown=4)
    moves = {"stored": None, "spill": Move.SPILLED, "return": Move.RETURNED}
    for kind, number, after in heard:
        before = recent.change
        if kind in moves:
            recent.stored(envelope(f"r{number}", move=moves[kind]), NOW + after)
        else:
            recent.event(event(kind, f"r{number}", wait_ms=after, total_ms=after), NOW + after)
        assert len(recent) <= 6
        news = recent.requests(before, everybody)
        assert len(news) <= 1
        assert all(request.id == f"r{number}" for request in news)
    shown = recent.requests(0, everybody)
    assert len(shown) <= 4
    assert len(recent.moves(0, everybody)) <= 4
    assert [r.change for r in shown] == sorted({r.change for r in shown}, reverse=True)
    assert len({r.id for r in shown}) == len(shown)
    for request in shown:
        assert (request.state == "running") <= (request.started_ms is not None)
        assert request.ended == (request.ended_ms is not None)


# ---- loads


def test_loads_are_a_line_of_points_and_changes_of_level_are_never_left_out():
    recent = Recent()
    recent.load(load(NOW))
    recent.load(load(NOW + 0.1))
    recent.load(load(NOW + 0.2, level="busy", saturation=0.8))
    recent.load(load(NOW + 0.9, level="busy", saturation=0.9))
    points = recent.points(0)["mlx"]
    assert [(p.at - NOW > 0.15, p.level, p.saturation) for p in points] == [
        (False, "normal", 0.5),
        (True, "busy", 0.8),
        (True, "busy", 0.9),
    ]
    assert (points[0].high, points[0].medium, points[0].low) == (1, 0, 3)


def test_the_same_load_heard_again_is_no_news():
    recent = Recent()
    recent.load(load(NOW))
    before = recent.change
    recent.load(load(NOW))
    assert (recent.change, recent.points(before)) == (before, {})


def test_what_is_older_than_the_window_is_forgotten():
    recent = Recent()
    for second in range(0, 700, 10):
        recent.load(load(NOW + second))
    points = recent.points(0)["mlx"]
    assert points[0].at == NOW + 690 - WINDOW_S
    assert recent.points(recent.change - 1) == {"mlx": points[-1:]}
    assert recent.points(recent.change) == {}


def test_a_storm_of_changes_is_bounded():
    recent = Recent()
    for number in range(5000):
        recent.load(load(NOW + number / 1000, level="busy" if number % 2 else "saturated"))
    assert len(recent.points(0)["mlx"]) == 1200


def test_after_the_clock_is_set_back_the_line_goes_on_from_there():
    recent = Recent()
    for at in (NOW, NOW + 1000, NOW + 1):
        recent.load(load(at))
    assert [p.at for p in recent.points(0)["mlx"]] == [NOW + 1]
