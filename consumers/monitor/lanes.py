"""Makes and removes the consumers of named tenants' lanes, and tells the workers which there are."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from pipeline.aio import wait_set
from pipeline.broker import topology
from pipeline.broker.connection import BusError
from pipeline.broker.jetstream import Bus, Fenced, to_stored
from pipeline.broker.lanes import read_lanes, write_lanes
from pipeline.config import Config
from pipeline.core.envelope import read_envelope
from pipeline.core.index import Place
from pipeline.core.tenantlanes import TenantLanes
from pipeline.wire.errors import HeadraceError
from pipeline.wire.subjects import (
    GUARD_LANE,
    STORED_SUBJECT,
    STREAM_REQUESTS,
    TENANT_SUBJECTS,
    Lane,
    is_tenant,
    lane_of_consumer,
    lane_of_subject,
)

log = logging.getLogger(__name__)

# How often the stream's subjects and the consumers are compared: an announcement can be lost.
_LOOK_EVERY_S = 5.0
_LOOK_CROWDED_S = 0.5
_PAUSE_S = 1.0
_RETRY_AFTER_S = 0.2
# Consumers that are made or removed at once.
_AT_ONCE = 16


async def _each(act: Callable[[Lane], Awaitable[None]], lanes: Sequence[Lane]) -> None:
    """Act on each lane, several at once, and raise the first error when none is under way any more."""
    for first in range(0, len(lanes), _AT_ONCE):
        for outcome in await asyncio.gather(*map(act, lanes[first : first + _AT_ONCE]), return_exceptions=True):
            if outcome is not None:
                raise outcome


@dataclass(slots=True)
class LaneKeeper:
    """The lanes of named tenants while this monitor leads. The one writer of their consumers and of `llm.lanes`.

    Args:
        bus: the connection.
        config: the settings.
        leads: whether this monitor acts.
        refuse: ends a request that no consumer can deliver, because the tenant in its subject has no valid name.

    Attributes:
        unserved: how many requests wait in lanes without a consumer, as last counted.
    """

    bus: Bus
    config: Config
    leads: Callable[[], bool]
    refuse: Callable[[Place, HeadraceError], None]
    unserved: dict[Lane, int] = field(init=False, default_factory=dict)
    _lanes: TenantLanes = field(init=False)
    _published: frozenset[Lane] | None = field(init=False, default=None)
    _last: int = field(init=False, default=0)
    _look_at: float = field(init=False, default=0.0)
    _crowded: bool = field(init=False, default=False)
    _sooner: asyncio.Event = field(init=False, default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._lanes = TenantLanes(self.config.tenants_max_lanes)

    def begin(self) -> None:
        """Forget everything: this monitor leads from now on, or the connection was lost."""
        self._lanes = TenantLanes(self.config.tenants_max_lanes)
        self._look_at = 0.0
        self._sooner.set()

    def heard(self, lane: Lane) -> None:
        """A request was stored in a lane."""
        if lane.tenant and self.leads() and self._lanes.heard(lane, self.bus.clock.now()):
            self._sooner.set()

    async def run(self) -> None:
        """Work until cancelled."""
        self.bus.on_reconnect(self.begin)
        while True:
            self._sooner.clear()
            pause_s = _PAUSE_S
            if self.leads():
                try:
                    await self._step()
                except BusError as error:
                    log.warning("The lanes of tenants were not brought in line; trying again: %s", error)
                    self._look_at = 0.0
                    pause_s = _RETRY_AFTER_S
            await wait_set(self._sooner, pause_s)

    async def _step(self) -> None:
        lanes = self._lanes
        if self.bus.clock.now() >= self._look_at:
            # Before the look: it is due again if the connection is lost meanwhile.
            self._look_at = self.bus.clock.now() + (_LOOK_CROWDED_S if self._crowded else _LOOK_EVERY_S)
            await self._look()
        await self._make()
        if lanes is not self._lanes:
            return  # begun anew: only the next look tells which lanes there are
        await self._publish()
        await _each(self._remove, self._lanes.to_remove(self.bus.clock.now()))

    # ---- the broker's state

    async def _look(self) -> None:
        """Compare what the stream holds, which consumers there are, and what the list says."""
        held = await self.bus.subjects(STREAM_REQUESTS, TENANT_SUBJECTS)
        states = {state.name: state for state in await self.bus.consumers(STREAM_REQUESTS)}
        lanes = {name: lane for name in states if (lane := lane_of_consumer(name)) is not None and lane.tenant}
        lanes.pop(GUARD_LANE.consumer, None)
        now = self.bus.clock.now()
        new = self._lanes.found(lanes.values(), now)
        counts = {lane: count for subject, count in held.items() if (lane := lane_of_subject(subject)) is not None}
        for lane in counts:
            self._lanes.heard(lane, now)
        for name, lane in lanes.items():
            if states[name].num_pending or states[name].num_ack_pending:
                self._lanes.heard(lane, now)
        self._lanes.rest(now)
        self.unserved = {lane: counts[lane] for lane in self._lanes.waiting if lane in counts}
        # They may be of another configuration.
        await self._kept(new)
        self._last, self._published = await read_lanes(self.bus)

    async def _make(self) -> None:
        for lane in self._lanes.waiting:
            if not is_tenant(lane.tenant):
                self._lanes.refused(lane)
                await self._refuse(lane)
        lanes = self._lanes.to_make()
        await self._kept(lanes)
        # Others may have come meanwhile.
        crowded = len(self._lanes.waiting) > len(self._lanes.to_make())
        if crowded and not self._crowded:
            self._look_at = min(self._look_at, self.bus.clock.now() + _LOOK_CROWDED_S)
            log.warning(
                "%d lanes of tenants wait: %d others hold requests, which is the most (tenants_max_lanes).",
                len(self._lanes.waiting),
                self.config.tenants_max_lanes,
            )
        self._crowded = crowded

    async def _kept(self, lanes: list[Lane]) -> None:
        """Make the consumers of lanes, or bring them to the configured state."""
        await _each(self._keep, lanes)

    async def _keep(self, lane: Lane) -> None:
        try:
            await topology.keep_consumer(self.bus.js, topology.lane_consumer(lane, self.config))
        except topology.TopologyError as error:
            log.error("The requests on %s wait: %s", lane.subject, error)  # noqa: TRY400 - the message says all
            self._lanes.refused(lane)
            return
        self._lanes.made(lane, self.bus.clock.now())
        self.unserved.pop(lane, None)

    async def _publish(self) -> None:
        lanes, listed = self._lanes, self._lanes.listed
        if not self.leads():
            return
        if listed != self._published:
            try:
                self._last = await write_lanes(self.bus, listed, expected_last=self._last)
            except Fenced:
                # Another monitor wrote; if this one still leads, it reads that and writes after it.
                self._look_at = 0.0
                self._sooner.set()
                return
            self._published = listed
        # Those that leave now were not in it. They do not, if the list has begun anew.
        lanes.told(self.bus.clock.now())

    async def _remove(self, lane: Lane) -> None:
        """Remove the consumer of a lane, which no process pulls from any more, unless a request is there after all.

        Of a request that is stored just now, an announcement tells, or the next look at the stream.
        """
        lanes = self._lanes
        state = await self.bus.consumer(STREAM_REQUESTS, lane.consumer)
        if state is not None and (state.num_pending or state.num_ack_pending):
            lanes.heard(lane, self.bus.clock.now())
            self._sooner.set()
        # A request may have come meanwhile; and this process may have stood still, while another one led.
        if lanes is not self._lanes or lane not in lanes.to_remove(self.bus.clock.now()) or not self.leads():
            return
        await topology.remove_consumer(self.bus.js, lane.consumer)
        self._lanes.removed(lane)
        if lane in self._lanes.waiting:
            self._sooner.set()

    # ---- requests that none can deliver

    async def _refuse(self, lane: Lane) -> None:
        async for message in self.bus.scan(STREAM_REQUESTS, lane.subject):
            # The name may be a wildcard.
            stored = to_stored(message)
            found = lane_of_subject(message.headers[STORED_SUBJECT])
            if found is None or is_tenant(found.tenant):
                continue
            envelope = read_envelope(stored, found.priority, moves=self.bus.moves)
            if envelope.fault is not None:
                self.refuse(Place(STREAM_REQUESTS, found.priority, stored.sequence), envelope.fault)
