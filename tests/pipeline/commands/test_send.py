from __future__ import annotations

import pytest

from pipeline.broker.connection import Unreachable
from pipeline.broker.jetstream import Bus
from pipeline.cli import main
from pipeline.commands import send
from pipeline.core.statistics import LaneStatistics, QueueStatistics
from pipeline.wire.messages import StoreReport, encode
from pipeline.wire.subjects import QUEUE_STATS, STREAM_REQUESTS

ASKED = send.Sending(text="What is the capital of France?")


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command would wait for longer than the test: only a report ends the wait."""
    monkeypatch.setattr(send, "_STORE_PATIENCE_S", 600.0)


def statistics(store: StoreReport | None) -> bytes:
    lanes = [LaneStatistics() for _ in range(3)]
    return encode(QueueStatistics(*lanes, {}, {}, 0, 1.0, store=store))


async def test_a_report_that_the_broker_stores_nothing_ends_the_wait(bus: Bus, patient):
    """The reason is the report's, and not that nothing was confirmed in time."""
    reports = iter([None, StoreReport("low", "Not yet."), StoreReport("failed", "The disk has 0 MiB. Make room.")])

    async def answer(_: str, _body: bytes) -> bytes:
        return statistics(next(reports))

    await bus.js.delete_stream(STREAM_REQUESTS)
    await bus.serve("queue", "statistics", {QUEUE_STATS: answer})
    with pytest.raises(Unreachable, match="Make room"):
        await send._send(ASKED, bus)


async def test_a_store_without_room_is_a_full_queue(bus: Bus, patient, capsys: pytest.CaptureFixture[str]):
    async def answer(_: str, _body: bytes) -> bytes:
        return statistics(StoreReport("full", "The disk has 9 MiB. Make room."))

    await bus.js.delete_stream(STREAM_REQUESTS)
    await bus.serve("queue", "statistics", {QUEUE_STATS: answer})
    assert await send._send(ASKED, bus) == 1
    assert capsys.readouterr().err == "headrace: queue_full: The disk has 9 MiB. Make room.\n"


async def test_without_a_monitor_the_wait_ends_by_itself(bus: Bus, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(send, "_STORE_PATIENCE_S", 0.1)
    await bus.js.delete_stream(STREAM_REQUESTS)
    with pytest.raises(Unreachable, match="did not confirm"):
        await send._send(ASKED, bus)


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "2592001"])
def test_a_timeout_that_no_request_can_have_is_told_as_an_option(given: str, capsys: pytest.CaptureFixture[str]):
    assert main(["send", "hi", f"--timeout={given}", "--nats-url", "nats://127.0.0.1:9"]) == 2
    assert capsys.readouterr().err == (
        f"headrace: --timeout must be a number of seconds above 0 and at most 2592000, not {float(given):.15g}.\n"
    )
