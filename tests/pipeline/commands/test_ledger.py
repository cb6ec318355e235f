from __future__ import annotations

import pytest

from pipeline.commands.ledger import Ledger
from pipeline.wire.answers import (
    Account,
    AssistantMessage,
    Choice,
    Chunk,
    ChunkChoice,
    Completion,
    Delta,
    ErrorAnswer,
    ErrorBody,
    Usage,
)
from pipeline.wire.errors import ErrorCode
from pipeline.wire.subjects import Priority, Task


def chunk() -> Chunk:
    return Chunk("x", 0, "m", [ChunkChoice(Delta(content="a"))], 0, 1)


def completion(engine: str = "mlx", queue_ms: float = 0, *, spilled: bool = False) -> Completion:
    account = Account(engine, Priority.HIGH, Task.SIMPLE, 1, queue_ms, 0, 0, spilled=spilled, reason="")
    return Completion("x", 0, "m", [Choice(AssistantMessage("a"), "stop")], Usage(1, 1, 2), account)


def error() -> ErrorAnswer:
    return ErrorAnswer("x", 0, ErrorBody(ErrorCode.ENGINE_FAILED, "gone", "server_error", None, retryable=True))


@pytest.fixture
def ledger() -> Ledger:
    ledger = Ledger()
    for number in range(4):
        ledger.sent(f"h{number}", Priority.HIGH, float(number))
    ledger.sent("l", Priority.LOW, 0.0)
    return ledger


def test_what_has_no_last_message_is_outstanding(ledger):
    ledger.answered("h0", chunk(), 1.0)
    ledger.answered("h1", completion(), 1.0)
    ledger.answered("h2", error(), 1.0)
    ledger.refused("h3", "queue_full", 1.0)
    assert (ledger.outstanding(), ledger.outstanding(Priority.HIGH)) == (2, 1)


def test_totals_counts_by_engine_spill_and_error(ledger):
    ledger.answered("h0", completion(queue_ms=10), 1.0)
    ledger.answered("h1", completion("ollama", spilled=True, queue_ms=30), 1.0)
    ledger.answered("h2", error(), 1.0)
    ledger.refused("h3", "queue_full", 1.0)
    totals = ledger.totals(Priority.HIGH)
    assert (totals.sent, totals.answered, totals.spilled) == (4, {"mlx": 1, "ollama": 1}, 1)
    assert totals.errors == {"engine_failed": 1, "queue_full": 1}
    assert totals.wait_ms.p95 == 30


def test_the_first_token_counts_from_the_sending_to_the_first_chunk(ledger):
    ledger.answered("h1", chunk(), 1.5)
    ledger.answered("h1", chunk(), 1.7)
    ledger.answered("h1", completion(), 2.0)
    assert ledger.totals(Priority.HIGH).ttft_ms.p50 == 500


def test_totals_may_look_at_recent_ones_only(ledger):
    assert ledger.totals(Priority.HIGH, since=2.0).sent == 2


def test_it_is_whole_when_each_has_exactly_one_last_message(ledger):
    for request_id in ("h0", "h1", "h2", "l"):
        ledger.answered(request_id, completion(), 1.0)
    assert not ledger.is_whole()
    ledger.refused("h3", "queue_full", 1.0)
    assert ledger.is_whole()
    ledger.answered("h0", completion(), 2.0)
    assert not ledger.is_whole()


def test_answers_to_strangers_are_ignored(ledger):
    ledger.answered("stranger", completion(), 1.0)
    assert ledger.outstanding() == 5
