"""What the leading monitor does for the lanes of tenants, for tests that run without one."""

from __future__ import annotations

from pipeline.broker import topology
from pipeline.broker.jetstream import Bus
from pipeline.broker.lanes import read_lanes, write_lanes
from pipeline.config import Config
from pipeline.wire.subjects import Lane, lane_of_subject


async def listed(bus: Bus, config: Config, *lanes: Lane | str) -> None:
    """These lanes have a consumer, and no others of tenants are listed. A text is the end of a subject."""
    found = [lane if isinstance(lane, Lane) else lane_of_subject(f"llm.request.{lane}") for lane in lanes]
    sequence, _ = await read_lanes(bus)
    for lane in found:
        assert lane is not None
        await topology.keep_consumer(bus.js, topology.lane_consumer(lane, config))
    await write_lanes(bus, [lane for lane in found if lane is not None], expected_last=sequence)
