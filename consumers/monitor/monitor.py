"""The backpressure monitor: its parts, and the messages that each of them receives."""

from __future__ import annotations

import asyncio
import logging

import msgspec

from consumers.monitor.accounting import UsageKeeper
from consumers.monitor.answers import QueueAnswers
from consumers.monitor.arrivals import Arrival, Arrivals
from consumers.monitor.cancelling import Cancelling
from consumers.monitor.endings import Ending, Endings
from consumers.monitor.lanes import LaneKeeper
from consumers.monitor.load import ENGINE_OF, ENGINES, LoadReporter
from consumers.monitor.moving import Moving
from consumers.monitor.operating import Operating
from consumers.monitor.streams import StreamKeeper
from consumers.monitor.view import Announcement, QueueView
from pipeline.broker.candidate import Candidate
from pipeline.broker.connection import Message
from pipeline.config import Config
from pipeline.core.admission import Admission
from pipeline.core.attempts import GRACE_S, Attempts, LostAttempt
from pipeline.core.envelope import Envelope
from pipeline.core.index import Place
from pipeline.core.scheduler import shares
from pipeline.process.lifecycle import Lifecycle
from pipeline.process.role import Role
from pipeline.wire.errors import HeadraceError
from pipeline.wire.messages import RequestEvent
from pipeline.wire.subjects import (
    CANCEL,
    EVENT,
    LEADER_MONITOR,
    QUEUE_POSITION,
    QUEUED_PREFIX,
    RELAYED,
    STORED_SUBJECT,
    lane_of_subject,
)

log = logging.getLogger(__name__)

_event_decoder = msgspec.json.Decoder(RequestEvent)


class Monitor:
    """Publishes each engine's load, answers for the queue, ends what waits too long.

    It receives each announcement, worker status and event, and counts the lanes when one of them indicates a change.
    Several monitors can run: all of them follow the queue, and one acts.

    Attributes:
        candidate: whether this monitor acts.
        view: the unfinished requests and their places.
        streams: the streams that must exist.
        lanes: the consumers of named tenants' lanes.
        load: the lanes' depths and the engines' loads.
        arrivals: the requests that admission has not decided on yet.
        endings: the requests that are about to be ended.
        cancelling: the open cancels.
        answers: the services.
        operating: the services of an operator.
        usage: the accounts of use.
    """

    def __init__(self, me: Role, config: Config) -> None:
        self._me = me
        self.candidate = Candidate(me.bus, config, me.name, self._on_change, LEADER_MONITOR, QUEUE_POSITION)
        leads = self.candidate.leads
        self.view = QueueView(me.bus, config.default_timeout_s, self._on_announced, self._on_read, self._on_filled)
        self.arrivals = Arrivals(Admission(shares(config.weights, config.floor_share)))
        self.streams = StreamKeeper(me.bus, config, leads, self.view.on_reconnect)
        self.lanes = LaneKeeper(me.bus, config, leads, self._on_refused)
        self.load = LoadReporter(
            me,
            config,
            leads,
            self.arrivals.observe,
            self.arrivals.counting,
            self._on_look,
            lambda: self.lanes.unserved,
        )
        self.answers = QueueAnswers(me, config, self.view, self.load)
        self.usage = UsageKeeper(me.bus, leads)
        self.endings = Endings(me.bus, self.view, leads, me.tracing)
        self.cancelling = Cancelling(
            me.bus, self.view, leads, self.answers.newest_on_record, self.endings.soon, me.tracing
        )
        self.operating = Operating(me.bus, config, Moving(me.bus, self.view, leads, me.tracing))
        self._attempts = Attempts()
        self._ready = asyncio.Event()
        self._ready_detail = ""

    async def run(self, lifecycle: Lifecycle) -> None:
        """Run all parts until lifecycle asks to stop."""
        bus = self._me.bus
        self._me.peers.on_change = self.load.wake
        self._me.peers.pauses.listen(self._on_pauses)
        bus.on_reconnect(self.view.on_reconnect)
        await bus.subscribe(f"{QUEUED_PREFIX}.>", self._on_stored)
        await bus.subscribe(f"{EVENT}.>", self._on_event)
        await bus.subscribe(f"{CANCEL}.>", self._on_cancel)
        parts = (self.candidate.run(), self.lanes.run(), self.load.run(), self.view.run(), self.endings.run())
        beside = (self.cancelling.run(), self.usage.run(), self.streams.run(), self._report(lifecycle))
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(part) for part in (*parts, *beside)]
                await lifecycle.stopping.wait()
                for task in tasks:
                    task.cancel()
        finally:
            await self.answers.stop()
            await self.operating.stop()
            await self.usage.stop()

    async def _report(self, lifecycle: Lifecycle) -> None:
        """Report once that this monitor is ready: it has published a load, or it stands by."""
        await self._ready.wait()
        lifecycle.report("ready", self._ready_detail)

    # ---- who acts

    async def _on_change(self, holds: bool) -> None:  # noqa: FBT001 - the one fact
        if not holds:
            await self.answers.stop()
            await self.operating.stop()
            await self.usage.stop()
            self.arrivals.keep(lambda _: False)
            self._ready_detail = self._ready_detail or "standing by: another monitor leads"
            self._ready.set()
            return
        self.lanes.begin()
        await self.answers.start()
        await self.operating.start()
        await self.usage.start()
        self.load.wake()
        self.endings.wake()

    def _on_pauses(self) -> None:
        """What counts as load has changed."""
        for engine in ENGINES:
            self.load.recount(engine)
        self.load.wake()

    # ---- what is heard

    async def _on_stored(self, message: Message) -> None:
        lane = lane_of_subject(message.headers.get(STORED_SUBJECT, ""))
        if lane is not None:
            self.lanes.heard(lane)
        stream = self.view.announced(message)
        if stream is not None:
            self.load.recount(ENGINE_OF[stream])
            self.load.wake()

    async def _on_event(self, message: Message) -> None:
        event = _event_decoder.decode(message.data)
        self.answers.record(event)
        self.view.record(event)
        suspect = self._attempts.heard(event, self._me.bus.clock.aligned())
        if suspect is not None:
            asyncio.get_running_loop().call_later(GRACE_S, self._note_lost, suspect)
        if event.kind != "done":
            for engine in ENGINES if event.engine is None else (event.engine,):
                self.load.recount(engine)

    def _note_lost(self, suspect: LostAttempt) -> None:
        if self._attempts.is_lost(suspect) and self.candidate.leads():
            self._me.tracing.lost(suspect)

    async def _on_cancel(self, message: Message) -> None:
        if RELAYED not in message.headers:
            self.cancelling.cancel(message.subject.removeprefix(f"{CANCEL}."), message.reply)

    # ---- what one part tells another

    def _on_announced(self, announcement: Announcement) -> None:
        envelope, place, may_spill = announcement
        self.cancelling.stored(envelope, place)
        paused = self._me.peers.pauses.now.holds(place.priority, envelope.owner)
        if not paused:
            self.load.arrived(ENGINE_OF[place.stream], place.priority)
        if envelope.deadline is None or envelope.fault is not None:
            return
        self.endings.expect(envelope.deadline)
        if self.candidate.leads() and not paused:
            self.arrivals.add(Arrival(place, envelope.deadline, may_spill, envelope.owner))

    def _on_read(self, envelope: Envelope, place: Place) -> None:
        self.cancelling.read(envelope, place)
        if envelope.deadline is not None:
            self.endings.expect(envelope.deadline)

    def _on_refused(self, place: Place, error: HeadraceError) -> None:
        self.endings.end(Ending(place, error))

    def _on_filled(self) -> None:
        self.cancelling.filled()

    def _on_look(self) -> None:
        """Refuse the arrivals that would wait in vain."""
        clock = self._me.bus.clock
        self.arrivals.keep(lambda place: self.view.state(place) == "queued")
        for arrival, error in self.arrivals.decide(
            self.load.waiting, self.view.queued_before, self.load.tenants, now=clock.now(), wall_now=clock.wall()
        ):
            self.endings.end(Ending(arrival.place, error, untouched=True, deadline=arrival.deadline))
        self._ready.set()
