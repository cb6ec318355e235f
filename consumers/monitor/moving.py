"""Changes the priority of queued requests: each is stored at the end of its new lane, then deleted from its old one.

A worker can pull a request in the moment in which it is moved. To prevent that, the consumer of the lane is halted for
the time of the move (`CONSUMER.PAUSE`, nats-server 2.11), which lasts two seconds at most even if this process dies.
What the consumer has not delivered by then, no worker gets. A request that was delivered earlier and returned may be
in hand again: it is moved only if no worker reports that it has begun. Should one begin all the same, the record of
the answer accepts the messages of one attempt only.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple, TypeVar

from consumers.monitor.view import STREAMS, LaneOfStream, QueueView, lane_of_stored
from pipeline.broker.bulk import read_heads, to_head
from pipeline.broker.connection import Unreachable
from pipeline.broker.jetstream import Bus, Stored
from pipeline.core.ending import Moved, Returned
from pipeline.core.envelope import Envelope, read_envelope
from pipeline.core.index import Place
from pipeline.delivery.held import Held
from pipeline.telemetry import Tracing
from pipeline.wire.errors import ErrorCode, HeadraceError, quoted
from pipeline.wire.pauses import DEFAULT_TENANT, MoveCall, MoveReport
from pipeline.wire.subjects import (
    BATCH,
    Move,
    Task,
    is_request_name,
    lane_of_subject,
    ollama_subject,
    request_name,
)

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_HALT_S = 2.0
# So many requests are moved during one halt, and so many of them at once.
_CHUNK, _AT_ONCE = 64, 16
_TRIES = 3
# A worker that holds a request reports within this time that it has begun it, and the broker announces one that it has
# stored.
_REPORTED_S = 0.3
_LOOK_EVERY_S = 0.05
_MOST_REASON_CHARS = 200


class Standing(NamedTuple):
    """A queued request: where it is stored, and its lane."""

    place: Place
    lane: LaneOfStream


@dataclass(slots=True)
class Moving:
    """Moves queued requests to other lanes while this monitor leads, one call at a time.

    Args:
        bus: the connection.
        view: the unfinished requests.
        leads: whether this monitor acts.
        tracing: for the spans of storing them again.
    """

    bus: Bus
    view: QueueView
    leads: Callable[[], bool]
    tracing: Tracing
    _lock: asyncio.Lock = field(init=False, default_factory=asyncio.Lock)

    async def move(self, call: MoveCall) -> MoveReport:
        """Carry out a call.

        Raises:
            HeadraceError: it names no request, or one that is not queued.
            BusError: the broker does not answer. The call can be repeated: a request is moved once.
        """
        async with self._lock:
            chosen = [await self._one_named(call)] if call.id else await self._all_chosen(call)
            counts = Counter[str]("there" for each in chosen if each.lane.priority is call.priority)
            rest = sorted((each for each in chosen if each.lane.priority is not call.priority), key=_order)
            for _, standing in groupby(rest, key=lambda each: (each.lane.stream, each.lane.consumer)):
                for chunk in _pieces(list(standing), _CHUNK):
                    counts += await self._moved(chunk, call)
        moved = counts.pop("moved", 0)
        who = call.by or "an unnamed operator"
        log.warning("%r moved %d requests to %s: %s", who, moved, call.priority, _scope(call))
        return MoveReport(call.priority, moved, dict(counts))

    # ---- which

    async def _one_named(self, call: MoveCall) -> Standing:
        tenant = "" if call.tenant in (None, DEFAULT_TENANT) else call.tenant or ""
        name = request_name(tenant, call.id)
        give_up_at = self.bus.clock.now() + _REPORTED_S
        while is_request_name(name):
            standing = await self._standing(name)
            if standing is not None:
                return standing
            if self.bus.clock.now() >= give_up_at:
                break
            # It may have been stored or moved just now: the announcement follows.
            await asyncio.sleep(_LOOK_EVERY_S)
        message = f"No queued request has the id {quoted(call.id, 128)}."
        raise HeadraceError(ErrorCode.INVALID_REQUEST, message, param="id")

    async def _standing(self, name: str) -> Standing | None:
        """Where the request of that name stands; None if it is not known, or not there any more."""
        place = self.view.find(name)
        stored = None if place is None else await self.bus.stored(place.stream, place.sequence)
        lane = None if stored is None else lane_of_stored(stored.subject)
        if place is None or stored is None or lane is None or self._read(stored, lane).name != name:
            return None
        return Standing(place, lane)

    async def _all_chosen(self, call: MoveCall) -> list[Standing]:
        """The requests of a tenant or a batch, whether they are queued or run."""
        if not call.batch and call.tenant is None:
            raise HeadraceError(ErrorCode.INVALID_REQUEST, "Name a request, a batch or a tenant.", param="id")
        found: list[Standing] = []
        for stream in STREAMS:
            start = 1
            while heads := await read_heads(self.bus, stream, start):
                for stored in map(to_head, heads):
                    start = stored.sequence + 1
                    lane = lane_of_stored(stored.subject)
                    if lane is not None and _is_chosen(call, stored, self._read(stored, lane)):
                        found.append(Standing(Place(stream, lane.priority, stored.sequence), lane))
                await asyncio.sleep(0)
        return found

    def _read(self, stored: Stored, lane: LaneOfStream) -> Envelope:
        return read_envelope(stored, lane.priority, moves=self.bus.moves)

    # ---- moving them

    async def _moved(self, standing: Sequence[Standing], call: MoveCall) -> Counter[str]:
        """Move requests of one consumer. Returns how many ended in which way."""
        counts = Counter[str]()
        lane = standing[0].lane
        async with self._halted(lane) as delivered:
            waiting = [each.place for each in standing if each.place.sequence > delivered]
            counts += await self._each(waiting, call)
        handed_out = [each.place for each in standing if each.place.sequence <= delivered]
        if handed_out:
            counts["running"] += await self._running(handed_out)
            queued = [place for place in handed_out if self.view.state(place) == "queued"]
            counts += await self._each(queued, call)
            counts["gone"] += sum(self.view.state(place) is None for place in handed_out if place not in queued)
        return +counts

    @asynccontextmanager
    async def _halted(self, lane: LaneOfStream) -> AsyncIterator[int]:
        """Halt a lane's consumer. Gives the sequence of the last request that it has delivered."""
        if not await self.bus.halt(lane.stream, lane.consumer, _HALT_S):
            log.info("The server cannot halt %s; its requests are moved without that.", lane.consumer)
        try:
            states = {state.name: state for state in await self.bus.consumers(lane.stream)}
            yield states[lane.consumer].delivered.stream_seq if lane.consumer in states else 0
        finally:
            await self.bus.halt(lane.stream, lane.consumer, 0.0)

    async def _running(self, places: list[Place]) -> int:
        """How many of the requests that were delivered have begun."""
        give_up_at = self.bus.clock.now() + _REPORTED_S
        while self._is_queued(places) and self.bus.clock.now() < give_up_at:  # noqa: ASYNC110 - several workers' events
            await asyncio.sleep(_LOOK_EVERY_S)
        return sum(self.view.state(place) == "running" for place in places)

    def _is_queued(self, places: Sequence[Place]) -> bool:
        return any(self.view.state(place) == "queued" for place in places)

    async def _each(self, places: Sequence[Place], call: MoveCall) -> Counter[str]:
        counts = Counter[str]()
        for group in _pieces(places, _AT_ONCE):
            counts.update(await asyncio.gather(*(self._one(place, call) for place in group)))
        return counts

    async def _one(self, place: Place, call: MoveCall) -> str:
        """Move one request. Returns `moved`, or why not: `gone`, `full`, `too_large` or `invalid`."""
        for _ in range(_TRIES):
            if not self.leads():
                break
            stored = await self.bus.stored(place.stream, place.sequence)
            if stored is None:
                return "gone"
            lane = lane_of_stored(stored.subject)
            envelope = read_envelope(stored, place.priority, moves=self.bus.moves)
            if lane is None or envelope.fault is not None:
                return "invalid"  # a worker refuses it, and says why
            held = Held.standing(self.bus, place.stream, stored, envelope, self.tracing)
            outcome = await held.end(_move_of(stored, envelope, call))
            if isinstance(outcome, Moved):
                return "moved"
            if isinstance(outcome, Returned):
                too_large = outcome.error is not None and outcome.error.code is ErrorCode.REQUEST_TOO_LARGE
                return "too_large" if too_large else "full"
        raise Unreachable(f"The request at sequence {place.sequence} of {place.stream} was not moved. Try again.")


def _pieces(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _order(standing: Standing) -> tuple[str, str, int]:
    return standing.lane.stream, standing.lane.consumer, standing.place.sequence


def _is_chosen(call: MoveCall, stored: Stored, envelope: Envelope) -> bool:
    if call.batch and stored.headers.get(BATCH) != call.batch:
        return False
    return call.tenant is None or (envelope.owner or DEFAULT_TENANT) == call.tenant


def _scope(call: MoveCall) -> str:
    said = [f"request {call.id!r}"] * bool(call.id) + [f"batch {call.batch!r}"] * bool(call.batch)
    said += [f"tenant {call.tenant!r}"] * (call.tenant is not None)
    return ", ".join(said) + (f" ({call.reason[:_MOST_REASON_CHARS]!r})" if call.reason else "")


def _move_of(stored: Stored, envelope: Envelope, call: MoveCall) -> Moved:
    """The move of a request to the same kind of lane of another priority. It keeps the kind of its latest move."""
    lane = lane_of_subject(stored.subject)
    to = ollama_subject(call.priority) if lane is None else lane._replace(priority=call.priority).subject
    task = envelope.task if lane is None or lane.task is Task.UNTRIAGED else lane.task
    how = envelope.move if envelope.move in (Move.SPILLED, Move.COMPLEX, Move.RETURNED) else Move.PRIORITY
    who = _as_header(call.by) or "an unnamed operator"
    why = f"moved from {envelope.priority} to {call.priority} by {who}"
    before = f"{envelope.move_reason}; " if how is not Move.PRIORITY and envelope.move_reason else ""
    return Moved(to, how or Move.PRIORITY, task, before + why, by=who)


def _as_header(text: str) -> str:
    """Text as it can stand in a header."""
    return "".join(c for c in text if c.isprintable())[:_MOST_REASON_CHARS].encode("ascii", "replace").decode()
