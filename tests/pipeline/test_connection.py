"""A connection comes about within seconds or not at all."""

from __future__ import annotations

import asyncio

import pytest

from pipeline import connection
from pipeline.bus import Bus
from pipeline.connection import Unreachable


async def test_where_nobody_answers_connecting_fails_and_leaves_nothing_running(monkeypatch):
    monkeypatch.setattr(connection, "_CONNECT_PATIENCE_S", 0.3)
    before = asyncio.all_tasks()
    with pytest.raises(Unreachable, match=r"no NATS server answers at 127\.0\.0\.1:9"):
        async with asyncio.timeout(10), Bus.connect("nats://user:secret@127.0.0.1:9", name="test"):
            pass
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
