"""Follows the list of the lanes of named tenants that have a consumer. The leading monitor writes it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec

from pipeline.broker.jetstream import Bus
from pipeline.broker.notes import NoteFollower
from pipeline.wire.messages import LanesNote, encode
from pipeline.wire.subjects import STREAM_STATE, TENANTS_LANES, Lane, lane_of_subject
from pipeline.wire.validation import UNREADABLE

log = logging.getLogger(__name__)

_decoder = msgspec.json.Decoder(LanesNote)


async def write_lanes(bus: Bus, lanes: Iterable[Lane], *, expected_last: int) -> int:
    """Store the list. Returns its sequence.

    Raises:
        Fenced: another process has stored a list after the one at expected_last.
        BusError: the broker does not answer, or refuses.
    """
    note = LanesNote([lane.subject for lane in lanes])
    return await bus.store(TENANTS_LANES, encode(note), expected_last=expected_last)


async def read_lanes(bus: Bus) -> tuple[int, frozenset[Lane] | None]:
    """The sequence of the stored list, 0 without one, and its lanes; None if it cannot be read.

    Raises:
        Unreachable: the broker does not answer.
    """
    sequence, data = await bus.last_message(STREAM_STATE, TENANTS_LANES) or (0, b"")
    return sequence, _lanes_in(data)


def _lanes_in(data: bytes) -> frozenset[Lane] | None:
    try:
        subjects = _decoder.decode(data).lanes if data else []
    except UNREADABLE as error:
        log.warning("Ignoring a malformed list of lanes: %s", error)
        return None
    return frozenset(lane for lane in map(lane_of_subject, subjects) if lane is not None and lane.tenant)


@dataclass(slots=True)
class LaneBoard:
    """The lanes of tenants as one process knows them. One writer: its note.

    Attributes:
        now: those that have a consumer.
    """

    bus: Bus
    now: frozenset[Lane] = field(init=False, default=frozenset())
    _note: NoteFollower = field(init=False)
    _told: list[Callable[[], None]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._note = NoteFollower(self.bus, TENANTS_LANES, self._take)

    async def start(self) -> None:
        """Read the list, and follow it from now on; as `NoteFollower.start`."""
        await self._note.start()

    async def read(self) -> None:
        """Read the list again, of whose change this process may not have heard.

        Raises:
            Unreachable: the broker does not answer.
        """
        await self._note.read()

    def listen(self, callback: Callable[[], None]) -> None:
        """Call callback after each change."""
        self._told.append(callback)

    def _take(self, data: bytes) -> None:
        lanes = _lanes_in(data)
        if lanes is not None and lanes != self.now:
            self.now = lanes
            for callback in self._told:
                callback()
