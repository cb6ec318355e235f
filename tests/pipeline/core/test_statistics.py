"""What happened to requests, counted, and how long they waited."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.statistics import WINDOW, Quantiles, QueueStatistics, ServerState, Statistics, quantiles, servers_of
from pipeline.wire.errors import ErrorCode
from pipeline.wire.messages import PerPriorityCount, RequestEvent, Slots, WorkerStatus
from pipeline.wire.subjects import Priority

HIGH, MEDIUM, LOW = Priority


def report(statistics, **facts):
    return statistics.report(**{"queued": {}, "running": {}, "loads": {}, "dead": 0, "now": 100.0, **facts})


def counted(*events):
    statistics = Statistics(started_at=0.0)
    for event in events:
        statistics.record(event, 0.0)
    return statistics


def nearest_rank(values, percent):
    """By the definition: the smallest value with at least so many percent of all values at or below it."""
    return next(v for v in sorted(values) if 100 * sum(other <= v for other in values) >= percent * len(values))


def test_no_values_have_quantiles_of_zero():
    assert quantiles([]) == Quantiles(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([7.0], (7.0, 7.0, 7.0)),
        ([1.0, 2.0], (1.0, 2.0, 2.0)),
        ([float(n) for n in range(1, 101)], (50.0, 95.0, 99.0)),
        ([float(n) for n in range(1, 1001)], (500.0, 950.0, 990.0)),
    ],
)
def test_quantiles_are_of_the_nearest_rank(values, wanted):
    assert quantiles(values[::-1]) == Quantiles(*wanted)


@given(st.lists(st.integers(0, 1000).map(float), min_size=1, max_size=250))
def test_quantiles_are_what_the_definition_says(values):
    found = quantiles(values)
    assert (found.p50, found.p95, found.p99) == tuple(nearest_rank(values, percent) for percent in (50, 95, 99))


def test_events_are_counted_per_priority_and_kind():
    statistics = counted(
        *[RequestEvent(f"a{number}", "done", HIGH) for number in range(3)],
        RequestEvent("b", "failed", LOW, code=ErrorCode.ENGINE_FAILED),
        RequestEvent("c", "cancelled", LOW, code=ErrorCode.CANCELLED),
        RequestEvent("d", "expired", MEDIUM, code=ErrorCode.DEADLINE_EXCEEDED),
        RequestEvent("e", "spilled", MEDIUM),
    )
    found = report(statistics)
    assert (found.high.done, found.medium.expired, found.medium.spilled) == (3, 1, 1)
    assert (found.low.failed, found.low.cancelled, found.low.done) == (1, 1, 0)
    assert found.errors == {"engine_failed": 1, "cancelled": 1, "deadline_exceeded": 1}


@pytest.mark.parametrize("kind", ["started", "triaged", "returned"])
def test_what_is_no_outcome_counts_as_none(kind):
    lane = report(counted(RequestEvent("a", kind, HIGH))).high
    assert (lane.done, lane.failed, lane.spilled, lane.cancelled, lane.expired) == (0, 0, 0, 0, 0)


def test_a_wait_is_counted_once_when_the_request_starts_and_the_first_token_when_it_is_done():
    statistics = counted(
        RequestEvent("a", "started", HIGH, wait_ms=7.0),
        RequestEvent("a", "done", HIGH, wait_ms=7.0, ttft_ms=9.0),
        RequestEvent("b", "started", HIGH, wait_ms=5.0, ttft_ms=1.0),
    )
    lane = report(statistics).high
    assert (lane.wait_ms.p50, lane.wait_ms.p99) == (5.0, 7.0)
    assert lane.ttft_ms == Quantiles(9.0, 9.0, 9.0)
    assert report(statistics).low.wait_ms == Quantiles()


def test_a_wait_of_zero_is_a_wait():
    statistics = counted(*[RequestEvent("a", "started", HIGH, wait_ms=w) for w in (0.0, 0.0, 9.0)])
    assert report(statistics).high.wait_ms.p50 == 0.0


def test_only_the_latest_waits_count():
    statistics = counted(*[RequestEvent("a", "started", HIGH, wait_ms=1e6)] * 10)
    for _ in range(WINDOW):
        statistics.record(RequestEvent("a", "started", HIGH, wait_ms=1.0), 0.0)
    assert report(statistics).high.wait_ms == Quantiles(1.0, 1.0, 1.0)


def test_the_report_has_the_depths_it_was_told_and_zero_for_what_it_was_not():
    found = report(Statistics(started_at=90.0), queued={HIGH: 3}, running={LOW: 2}, dead=4)
    assert (found.high.queued, found.low.queued, found.low.running, found.high.running) == (3, 0, 2, 0)
    assert (found.dead, found.uptime_s) == (4, 10.0)


def test_the_report_tells_what_is_not_known_and_rounds_what_is_filled_down():
    found = report(Statistics(started_at=0.0), unknown=["positions"], filled=0.99999)
    assert (found.unknown, found.filled) == (["positions"], 0.999)
    found = report(Statistics(started_at=0.0))
    assert (found.unknown, found.filled) == ([], 1.0)


def test_statistics_of_the_version_before_are_complete():
    fields = msgspec.to_builtins(report(Statistics(started_at=0.0)))
    for name in ("unknown", "filled", "servers", "paused", "paused_tenants", "cannot_load"):
        del fields[name]
    read = msgspec.convert(fields, QueueStatistics)
    assert (read.unknown, read.filled, read.servers, read.paused) == ([], 1.0, [], [])


def test_servers_are_those_behind_workers_by_url():
    def status(worker: str, **fields: object) -> WorkerStatus:
        none = PerPriorityCount()
        return WorkerStatus(worker, "ollama", "ready", ["m"], Slots(1, 2), none, 0, 12.34, 0, 0, 0, 0, **fields)

    servers = servers_of(
        [
            status("b", server="http://y", dialect="openai"),
            status("mlx"),
            status("a", server="http://x", dialect="ollama", reason="why"),
        ]
    )
    assert servers == [
        ServerState("a", "ollama", "http://x", "ready", ["m"], Slots(1, 2), 12.3, "why"),
        ServerState("b", "openai", "http://y", "ready", ["m"], Slots(1, 2), 12.3, ""),
    ]


def test_the_report_has_the_shape_of_the_protocol():
    body = msgspec.to_builtins(report(counted(RequestEvent("a", "failed", HIGH, code=ErrorCode.UNAVAILABLE))))
    counts = {"high", "medium", "low", "engines", "errors", "dead", "uptime_s"}
    assert set(body) == counts | {"unknown", "filled", "store", "servers", "paused", "paused_tenants", "cannot_load"}
    for priority in Priority:
        lane = body[priority.value]
        assert set(lane) == {
            *("queued", "running", "done", "failed", "spilled", "cancelled", "expired"),
            *("wait_ms", "ttft_ms"),
        }
        assert set(lane["wait_ms"]) == set(lane["ttft_ms"]) == {"p50", "p95", "p99"}


def test_a_report_is_not_changed_by_what_happens_later():
    statistics = counted(RequestEvent("a", "failed", HIGH, code=ErrorCode.UNAVAILABLE))
    before = report(statistics)
    statistics.record(RequestEvent("b", "failed", HIGH, code=ErrorCode.UNAVAILABLE), 0.0)
    assert before.errors == {"unavailable": 1}
    assert math.isclose(before.high.failed, 1)


def test_a_request_that_two_processes_end_is_counted_once():
    end = RequestEvent("a", "expired", LOW, code=ErrorCode.DEADLINE_EXCEEDED)
    statistics = counted(end, end, RequestEvent("b", "expired", LOW))
    assert (report(statistics).low.expired, report(statistics).errors) == (2, {"deadline_exceeded": 1})
    statistics.record(RequestEvent("a", "started", LOW), 1.0)  # replayed
    statistics.record(end, 2.0)
    assert report(statistics).low.expired == 3
    statistics.record(end, 130.0)  # another request under the same id
    assert report(statistics).low.expired == 4
