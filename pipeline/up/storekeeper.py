"""Watches the store of the embedded broker: its disk, its own limit, failed writes, and whether JetStream answers.

It publishes a report twice a second, lowers the limit of the requests' stream as room goes, and restarts a server
that cannot write although there is room. The decisions are in `pipeline.core.room`.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.broker import topology
from pipeline.broker.connection import BusError, Message, Unreachable
from pipeline.broker.jetstream import Bus, read_failure
from pipeline.config import Config
from pipeline.core.room import Disk, StoreHealth, limit_bytes, moved_enough
from pipeline.up.server import disk_of
from pipeline.wire.messages import StoreReport, encode
from pipeline.wire.subjects import STORE, STORE_FAILED, STREAM_REQUESTS

_EVERY_S = 0.5
# What nats-server logs when it gives up on a stream, or on JetStream as a whole.
_GIVES_UP = re.compile(rb"[Cc]ritical write error: (?:.*: )?(.+)|(JetStream out of .*DISABLED)")
_MOST_READ = 1 << 20

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Storekeeper:
    """The one writer of the report on the store, and of the byte limit of the requests' stream.

    Args:
        config: the settings, with the broker's URL.
        folder: the server's store.
        log: the server's log.
        most: the server's `max_file_store`, bytes.
        restart: stops the server, which its owner starts again; called with the reason.
        on_report: called with each report whose state differs from the one before.
    """

    config: Config
    folder: Path
    log: Path
    most: int
    restart: Callable[[str], None]
    on_report: Callable[[StoreReport], None]
    _health: StoreHealth = field(init=False, default_factory=StoreHealth)
    _read_to: int = field(init=False, default=0)
    _limit: int | None = field(init=False, default=None)
    _state: str = field(init=False, default="ok")
    _stored: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._read_to = self._log_size()

    async def run(self) -> None:
        """Watch until cancelled. The broker may go and come back meanwhile."""
        while True:
            try:
                async with Bus.connect(self.config.nats_url, name="headrace up") as bus:
                    await bus.subscribe(STORE_FAILED, self._on_failure)
                    while True:
                        await self._look(bus)
                        await asyncio.sleep(_EVERY_S)
            except BusError as error:
                _log.debug("The store cannot be watched: %s", error)
            await asyncio.sleep(_EVERY_S)

    async def _on_failure(self, message: Message) -> None:
        if (subject := read_failure(message)) is not None:
            self._health.failures.heard(subject, asyncio.get_running_loop().time())

    async def _look(self, bus: Bus) -> None:
        if error := self._logged_error():
            self._health.write_failed(error)
        elif bus.is_connected:
            if (stored := await topology.stored_bytes(bus)) is not None:
                self._stored = stored
            elif bus.is_connected:
                self._health.write_failed("JetStream is off")
        disk = self._disk().within(self._stored, self.most)
        now = asyncio.get_running_loop().time()
        report = self._health.observe(disk, now)
        if report.state != self._state:
            self._state = report.state
            self.on_report(report)
        await self._publish(bus, report)
        if self._health.may_restart(now):
            self._health.restarted(now)
            self._read_to = self._log_size()
            self.restart(report.reason)
        elif report.state != "failed":
            await self._limit_requests(bus, disk)

    async def _publish(self, bus: Bus, report: StoreReport) -> None:
        try:
            await bus.publish(STORE, encode(report))
        except Unreachable as error:
            _log.debug("The report on the store was not published: %s", error)

    async def _limit_requests(self, bus: Bus, disk: Disk) -> None:
        if not bus.is_connected:
            return
        try:
            used = 0 if limit_bytes(disk, 0) == -1 else (await bus.stream_state(STREAM_REQUESTS)).bytes
            limit = limit_bytes(disk, used)
            if self._limit is None or moved_enough(self._limit, limit):
                await topology.limit_requests(bus.js, self.config, limit)
                self._limit = limit
        except (BusError, topology.TopologyError) as error:
            _log.warning("The limit of the stream %s was not changed: %s", STREAM_REQUESTS, error)

    def _disk(self) -> Disk:
        try:
            return disk_of(self.folder)
        except OSError as error:
            self._health.write_failed(error.strerror or str(error))
            return Disk(0, 0)

    def _log_size(self) -> int:
        try:
            return self.log.stat().st_size
        except OSError:
            return 0

    def _logged_error(self) -> str:
        """What the server has logged about writes that it gave up since the last look; empty if nothing."""
        if self._log_size() < self._read_to:
            self._read_to = 0
        try:
            with self.log.open("rb") as file:
                file.seek(self._read_to)
                lines = file.read(_MOST_READ)
        except OSError:
            return ""
        self._read_to += len(lines)
        found = _GIVES_UP.search(lines)
        return "" if found is None else (found[1] or found[2]).decode(errors="replace").strip()
