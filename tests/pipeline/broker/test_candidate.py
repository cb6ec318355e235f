"""Of several processes that may act, one does."""

from __future__ import annotations

import asyncio

from pipeline.broker.candidate import Candidate
from pipeline.wire.subjects import LEADER_MONITOR, QUEUE_POSITION
from tests.waiting import eventually


async def test_a_process_that_has_just_taken_the_lease_is_left_alone_before_it_replies(bus, config):
    """As where two start at the same moment: the one that was refused looks again at once."""
    replies = asyncio.Event()

    async def begin(_holds):
        await replies.wait()

    first, second = (Candidate(bus, config, name, begin, LEADER_MONITOR, QUEUE_POSITION) for name in ("a", "b"))
    running = asyncio.create_task(first.run())
    await eventually(lambda: first._leadership.holds)
    replies_later = asyncio.create_task(second._look())
    await eventually(lambda: second._told is not None)
    assert second._told is False
    assert not second._leadership.holds
    replies.set()
    await replies_later
    running.cancel()
