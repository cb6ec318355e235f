"""Load, state and events have the shapes of the protocol, and come back as they were sent."""

from __future__ import annotations

import json

import msgspec

from pipeline.wire.errors import ErrorCode
from pipeline.wire.messages import Load, PerPriority, PerPriorityCount, RequestEvent, Slots, WorkerStatus, encode
from pipeline.wire.subjects import Priority


def test_a_load_event_has_the_shape_of_the_protocol():
    load = Load("mlx", "busy", 0.8, PerPriority(1, 2, 3), PerPriorityCount(4, 5, 6), Slots(1, 2), 9.5, "why", 1e9)
    assert json.loads(encode(load)) == {
        "object": "headrace.load",
        "engine": "mlx",
        "level": "busy",
        "saturation": 0.8,
        "predicted_wait_ms": {"high": 1, "medium": 2, "low": 3},
        "queued": {"high": 4, "medium": 5, "low": 6},
        "slots": {"used": 1, "total": 2},
        "tokens_per_s": 9.5,
        "reason": "why",
        "at": 1e9,
        "available": True,
        "keeps": "",
        "takes_back": False,
        "queued_tenants": {"high": 0, "medium": 0, "low": 0},
    }
    assert msgspec.json.decode(encode(load), type=Load) == load
    assert [load.predicted_wait_ms.of(priority) for priority in Priority] == [1.0, 2.0, 3.0]


def test_what_a_worker_says_and_what_happens_to_a_request_come_back_as_they_were_sent():
    status = WorkerStatus("w", "mlx", "ready", ["m"], Slots(1, 2), PerPriorityCount(), 1.5, 2.5, 3.5, 4, 5, 1e9, "x")
    event = RequestEvent("i", "failed", Priority.LOW, "mlx", 1.0, None, 2.0, ErrorCode.CANCELLED, "x")
    for message in (status, event, RequestEvent("i", "done", Priority.HIGH)):
        assert msgspec.json.decode(encode(message), type=type(message)) == message
