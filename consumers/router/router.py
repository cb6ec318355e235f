"""The router's pull loop: while MLX is saturated, each request is triaged once.

The router pulls only while its gate is open: a fresh load event reports that MLX is saturated, and Ollama is ready, has
room, and would answer sooner than MLX begins. Simple requests are spilled to Ollama; the others move to the lane that
only MLX serves, from which the router does not pull.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from consumers.router.opinions import Opinions
from consumers.router.triage import Triage
from pipeline.aio import wait_set
from pipeline.broker.connection import Message
from pipeline.config import Config
from pipeline.core.ending import Abandoned, Moved, Outcome, Returned, Settled
from pipeline.core.handback import HandBacks
from pipeline.core.rests import LaneRests
from pipeline.core.spilling import room
from pipeline.core.triage import Room, saturated
from pipeline.core.waits import Capacity
from pipeline.delivery.held import Fresh, Held, Resumed
from pipeline.delivery.lanes import source_of
from pipeline.delivery.taking import Taken, Taking
from pipeline.process.lifecycle import Lifecycle
from pipeline.process.role import Role
from pipeline.wire.messages import RequestEvent
from pipeline.wire.subjects import (
    EVENT,
    Lane,
    Move,
    Priority,
    Task,
)

if TYPE_CHECKING:
    from consumers.engines.ollama import OllamaClient

_event_decoder = msgspec.json.Decoder(RequestEvent)

# A spilled request counts as underway to Ollama until it has started there, or for this long.
UNDERWAY_S = 10.0
# A worker reports within this time that it runs a request which has started.
_REPORTED_S = 0.25
# Only an event opens the gate, but facts also go stale without one.
_LOOK_AGAIN_S = 0.5
_PAUSE_S = 0.2
_SOURCE = source_of(frozenset({Task.UNTRIAGED, Task.SIMPLE}))


@dataclass(slots=True)
class Router:
    """Triages requests while MLX is saturated. One router for each broker is enough; several share the lanes."""

    me: Role
    config: Config
    client: OllamaClient | None
    _taking: Taking = field(init=False)
    _opinions: Opinions = field(init=False)
    _triage: Triage = field(init=False)
    # Until when each request counts as underway to Ollama.
    _underway: dict[str, float] = field(init=False, default_factory=dict)
    _rests: LaneRests = field(init=False, default_factory=LaneRests)
    _paused: HandBacks = field(init=False, default_factory=HandBacks)
    _handling: set[asyncio.Task[None]] = field(init=False, default_factory=set)
    _changed: asyncio.Event = field(init=False, default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._opinions = Opinions(self.client, self.config)
        self._triage = Triage(self.me, self.config, self._opinions)
        self._taking = Taking(self.me, self.config, _SOURCE)

    async def run(self, lifecycle: Lifecycle) -> None:
        """Route until lifecycle asks to stop."""
        self.me.peers.on_status = self._taking.heard
        self.me.peers.on_change = self._changed.set
        await self._taking.start()
        await self.me.bus.subscribe(f"{EVENT}.*.started", self._on_started)
        lifecycle.report("ready")
        async with asyncio.TaskGroup() as group:
            renewing, routing = group.create_task(self._taking.leases.run()), group.create_task(self._route(group))
            await lifecycle.stopping.wait()
            routing.cancel()
            # A request is not left between the two steps of a move, stored in two places.
            await asyncio.wait({routing, *self._handling})
            await self._taking.close()
            await self._opinions.close()
            renewing.cancel()

    # ---- the gate

    def _open_for(self) -> set[Priority]:
        """The priorities whose requests Ollama would finish before MLX begins them; empty while the gate is closed."""
        load = self.me.peers.load("mlx")
        if load is None or not saturated(load) or load.keeps:
            return set()
        room = self._room()
        if not room.healthy or room.free <= 0:
            return set()
        return {priority for priority in Priority if room.answer_ms < load.predicted_wait_ms.of(priority)}

    def _room(self) -> Room:
        load = self.me.peers.load("ollama")
        now = self.me.bus.clock.now()
        self._underway = {request: until for request, until in self._underway.items() if until > now}
        queued = load.queued.high + load.queued.medium + load.queued.low if load is not None else 0
        return room(
            Capacity.of(self.me.peers.workers("ollama")),
            max(queued, len(self._underway)),
            most_waiting=self.config.ollama_queue,
        )

    # ---- taking

    async def _route(self, group: asyncio.TaskGroup) -> None:
        clock = self.me.bus.clock
        while True:
            priorities = self._open_for()
            if not priorities:
                await self._taking.ignore()
                await self._until_changed()
                continue
            await self._taking.listen()
            began_at, taken = clock.now(), await self._next(priorities)
            if taken is not None:
                await self._begin(taken, group)
            elif clock.now() - began_at < _PAUSE_S:
                await asyncio.sleep(_PAUSE_S)

    async def _next(self, priorities: set[Priority]) -> Taken | None:
        lanes = self._lanes_of(priorities)
        if not lanes:
            await self._until_changed()
            return None
        return await self._taking.next(lambda: self._until_shut(priorities, lanes), lanes=lanes)

    async def _until_changed(self) -> None:
        await wait_set(self._changed, _LOOK_AGAIN_S)
        self._changed.clear()

    def _lanes_of(self, priorities: set[Priority]) -> list[Lane]:
        """The lanes that may be pulled from now."""
        now = self.me.bus.clock.now()
        lanes = self._taking.consumers
        return [lane for lane in lanes if lane.priority in priorities and not self._rests.has_left(lane, now)]

    async def _until_shut(self, priorities: set[Priority], lanes: list[Lane]) -> None:
        """Ends when the gate is no longer open for the priorities or lanes that are being pulled."""
        while self._open_for() == priorities and self._lanes_of(priorities) == lanes:
            await self._until_changed()

    # ---- one request

    async def _begin(self, taken: Taken, group: asyncio.TaskGroup) -> None:
        """Handle a request. Returns when it has ended, or when it waits for an internal model: then the next one can
        be taken meanwhile.
        """
        ended_or_asks = asyncio.Event()
        handling = group.create_task(self._handle(taken, ended_or_asks.set))
        self._handling.add(handling)
        handling.add_done_callback(self._handling.discard)
        handling.add_done_callback(lambda _: ended_or_asks.set())
        await ended_or_asks.wait()

    async def _handle(self, taken: Taken, asking: Callable[[], None]) -> None:
        try:
            await self._end(taken.held, taken.lane, asking)
        finally:
            taken.held.release()
            self._taking.finish(taken, 1.0)

    async def _end(self, held: Held, lane: Lane, asking: Callable[[], None]) -> None:
        match await held.open():
            case Settled() | Abandoned() as outcome:
                await held.end(outcome)
            case Resumed():
                # MLX alone can go on with the answer; in another lane the request would wait again.
                self._rests.leave(lane, self.me.bus.clock.now())
                await held.end(Returned())
            case Fresh() if self.me.peers.pauses.now.holds(held.envelope.priority, held.envelope.owner):
                delay_s = self._paused.delay_s(
                    self.me.bus.clock.now(), held.envelope.name, delivered=held.envelope.delivered, room=False
                )
                await held.end(Returned(delay_s))
            case Fresh():
                with held.process():
                    await self._carry_out(held, await self._triage.outcome(held, self._room, asking))

    async def _carry_out(self, held: Held, outcome: Outcome) -> None:
        spills = isinstance(outcome, Moved) and outcome.how is Move.SPILLED
        if spills:
            # Set before the request is stored: Ollama's worker may begin it before `end` returns.
            self._underway[held.envelope.name] = self.me.bus.clock.now() + UNDERWAY_S
        if await held.end(outcome) is not outcome and spills:
            self._underway.pop(held.envelope.name, None)

    # ---- listening

    async def _on_started(self, message: Message) -> None:
        name = _event_decoder.decode(message.data).id
        if name in self._underway:
            self._underway[name] = self.me.bus.clock.now() + _REPORTED_S
        self._changed.set()
