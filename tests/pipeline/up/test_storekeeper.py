"""The embedded broker's store is watched: here by the server's own limit, as if it were a small one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from pipeline.broker import topology
from pipeline.broker.jetstream import Bus, LaneFull
from pipeline.config import Config
from pipeline.up.server import most_stored
from pipeline.up.storekeeper import Storekeeper
from pipeline.wire.messages import StoreReport
from pipeline.wire.subjects import MSG_ID, STORE, STREAM_REQUESTS
from tests.waiting import eventually

MIB = 1 << 20
MOST = 16 * MIB
SUBJECT = "llm.request.low"


@pytest.fixture
async def reports(bus: Bus, config: Config, tmp_path: Path) -> AsyncIterator[list[StoreReport]]:
    """What a storekeeper reports whose server stores sixteen MiB."""
    heard: list[StoreReport] = []

    async def on_report(message) -> None:
        heard.append(msgspec.json.decode(message.data, type=StoreReport))

    await bus.subscribe(STORE, on_report)
    keeper = Storekeeper(config, tmp_path, tmp_path / "log", MOST, lambda why: None, lambda report: None)
    running = asyncio.create_task(keeper.run())
    yield heard
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


async def filled(bus: Bus, reports: list[StoreReport]) -> None:
    """Store requests until the stream refuses one. Its limit follows the reports."""
    for number in range(4 * MOST // MIB):
        await bus.store(SUBJECT, b"x" * (MIB // 2), headers={MSG_ID: f"r{number}"})
        if number % 4 == 3:
            seen = len(reports)
            await eventually(lambda seen=seen: len(reports) > seen + 1)


async def test_requests_are_refused_before_the_servers_own_limit_and_taken_once_there_is_room(bus, config, reports):
    await eventually(lambda: reports and reports[-1].state == "ok")
    with pytest.raises(LaneFull):
        await filled(bus, reports)
    await eventually(lambda: reports[-1].state != "ok")
    assert "max_file_store" in reports[-1].reason
    assert reports[-1].total_bytes == MOST
    assert (await topology.stored_bytes(bus)) < MOST
    # The requests are answered: a purge of the stream is denied.
    await bus.js.delete_stream(STREAM_REQUESTS)
    await topology.apply(bus.js, config)
    await eventually(lambda: reports[-1].state == "ok")

    async def taken() -> bool:
        with suppress(LaneFull):
            return bool(await bus.store(SUBJECT, b"x", headers={MSG_ID: "after"}))
        return False

    await eventually(taken)


def test_the_limit_is_that_of_the_configuration():
    assert most_stored() == 20 << 30
