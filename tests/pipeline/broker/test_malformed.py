"""What others have stored in place of headrace's own notes is passed over, whatever it is."""

from __future__ import annotations

import pytest

from pipeline.broker.jetstream import Bus
from pipeline.broker.lanes import read_lanes
from pipeline.broker.pauses import PauseBoard
from pipeline.wire.pauses import PausedState
from pipeline.wire.subjects import PAUSED, TENANTS_LANES

FOREIGN = [b"{", '{"lanes": ["é"], "object": "é"}'.encode("latin-1"), b'{"more": ' + b"[" * 100_000]


@pytest.mark.parametrize("foreign", FOREIGN, ids=["cut", "not UTF-8", "deep"])
async def test_a_list_of_lanes_that_is_none_cannot_be_read(bus: Bus, foreign: bytes):
    await bus.store(TENANTS_LANES, foreign)
    _, lanes = await read_lanes(bus)
    assert lanes is None


@pytest.mark.parametrize("foreign", FOREIGN, ids=["cut", "not UTF-8", "deep"])
async def test_a_list_of_pauses_that_is_none_pauses_nothing(bus: Bus, foreign: bytes):
    await bus.store(PAUSED, foreign)
    board = PauseBoard(bus)
    await board.start()
    assert board.state == PausedState()
