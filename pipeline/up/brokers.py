"""The broker of `up` with the pipeline's streams: its own, whose store is mended at each start, or another one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from pipeline.broker import topology
from pipeline.broker.connection import BusError
from pipeline.broker.jetstream import Bus
from pipeline.config import Config
from pipeline.up.children import LaunchError, Process
from pipeline.up.mending import Mending
from pipeline.up.reach import broker_trouble
from pipeline.up.server import Broker


async def start_broker(broker: Broker, config: Config, log: Path, said: Callable[[str], None]) -> Process:
    """Start the embedded server and create the streams; those in memory are lost when the server dies.

    Args:
        broker: the server.
        config: the settings of the streams.
        log: the server's, which says what it could not load.
        said: called with each sentence on what was set aside, or is lost.

    Raises:
        LaunchError: the server cannot be started, or its store cannot be used.
    """
    mending = Mending(broker.folder, log)
    try:
        await asyncio.to_thread(mending.look)
    except OSError as error:
        trouble = f"A damaged file of the broker's store cannot be set aside: {error.strerror or error}."
        raise LaunchError(f"{trouble} Make room on its disk.") from None
    server = await broker.start()
    try:
        await _mended(mending, broker.url, config, said)
    except BaseException:
        server.kill()
        raise
    return server


async def prepare_broker(url: str, config: Config) -> None:
    """Create the streams on a broker that runs.

    Raises:
        LaunchError: it does not answer, or refuses them.
    """
    if trouble := await broker_trouble(url):
        raise LaunchError(f"{trouble} Correct --nats-url, or leave it out: headrace then starts its own server.")
    try:
        async with Bus.connect(url, name="headrace up") as bus:
            await topology.apply(bus.js, config)
    except (BusError, topology.TopologyError) as error:
        raise LaunchError(str(error)) from None


async def _mended(mending: Mending, url: str, config: Config, said: Callable[[str], None]) -> None:
    """Set aside what the server could not load, create the streams, and say what was done."""
    try:
        async with Bus.connect(url, name="headrace up") as bus:
            for sentence in await mending.mend(bus):
                said(sentence)
        await prepare_broker(url, config)
        async with Bus.connect(url, name="headrace up") as bus:
            for sentence in await mending.losses(bus):
                said(sentence)
    except (BusError, OSError) as error:
        raise LaunchError(f"The broker's store cannot be used: {error}") from None
