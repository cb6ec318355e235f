"""The broker's time is learned from its answers; a machine whose clock is off hears of it once."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

from pipeline.broker import topology
from pipeline.broker.clock import Clock, described
from pipeline.broker.jetstream import Bus
from tests.waiting import eventually


def off_by(seconds: float) -> Clock:
    """The clock of a machine whose wall clock is off by so many seconds."""
    return Clock(machine_wall=lambda: time.time() + seconds)


def test_without_the_broker_the_machines_clock_is_taken():
    clock = Clock(lambda: 100.0, lambda: 5000.0)
    assert (clock.now(), clock.wall(), clock.offset_s) == (100.0, 5000.0, 0.0)


def test_after_a_timestamp_the_machines_clock_no_longer_matters():
    wall = [5000.0]
    clock = Clock(lambda: 100.0, lambda: wall[0])
    clock.stamped(100.0, 4940.0)
    assert (clock.wall(), clock.offset_s) == (4940.0, 60.0)
    wall[0] = 9000.0
    assert clock.wall() == 4940.0


def test_a_large_offset_is_logged_once_and_so_is_its_end(caplog):
    caplog.set_level(logging.INFO)
    wall = [5060.0]
    clock = Clock(lambda: 100.0, lambda: wall[0])
    for _ in range(3):
        clock.stamped(100.0, 5000.0)
        clock.report()
    assert [record.getMessage() for record in caplog.records] == [
        "This machine's clock is 60.0 s ahead of the broker's. headrace uses the broker's clock."
    ]
    wall[0] = 5000.0
    for _ in range(3):
        clock.stamped(100.0, 5000.0)
        clock.report()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_times_for_comparison_are_the_machines_unless_they_contradict_the_brokers():
    """A round trip of 20 ms: the broker's time is known to 10 ms."""
    wall, now = [5000.0], [100.0]
    clock = Clock(lambda: now[0], lambda: wall[0])
    assert clock.aligned() == 5000.0
    now[0] += 0.02
    clock.stamped(100.0, 5000.0)
    for offset_s in (0.0, 0.009, -0.009):
        wall[0] = clock.wall() + offset_s
        assert clock.aligned() == wall[0]
    for offset_s in (0.011, -0.011, 3600.0):
        wall[0] = clock.wall() + offset_s
        assert clock.aligned() == clock.wall()


def test_an_offset_in_words():
    assert described(60.04) == "60.0 s ahead of the broker's"
    assert described(-1.25) == "1.2 s behind the broker's"


@pytest.mark.parametrize("offset_s", [-60.0, 0.0, 60.0])
async def test_the_broker_tells_its_time(bus, offset_s):
    bus.clock = off_by(offset_s)
    assert await bus.sample_clock()
    assert bus.clock.offset_s == pytest.approx(offset_s, abs=0.9)


async def test_a_broker_without_the_streams_does_not_tell_its_time(config, nats_server):
    async with Bus.connect(config.nats_url, name="test") as bus:
        assert not await bus.sample_clock()
        assert bus.clock.offset_s == pytest.approx(0, abs=0.9)


async def test_the_time_is_asked_for_again_after_a_reconnect(bus, config, monkeypatch):
    samples = []
    sample = Bus.sample_clock

    async def counting(self) -> bool:
        told = await sample(self)
        samples.append(told)
        return told

    monkeypatch.setattr(Bus, "sample_clock", counting)
    keeping = asyncio.create_task(bus.keep_clock())
    await eventually(lambda: samples == [True])
    bus.nc._transport._io_writer.transport.abort()
    await eventually(lambda: samples == [True, True])
    await topology.apply(bus.js, config)
    keeping.cancel()
