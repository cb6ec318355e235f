"""The dead letters on the broker: found, put back on their lanes, thrown away."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from pipeline.broker.jetstream import Bus, LaneFull, Stored, to_stored
from pipeline.core.letters import DeadLetter, read_letter
from pipeline.wire.subjects import DEAD, STREAM_DEAD, Priority


class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """Which dead letters are meant: those of an id, of a priority, older than so many seconds, or all."""

    id: str | None = None
    priority: Priority | None = None
    older_than_s: float = 0.0

    @property
    def subject(self) -> str:
        """Where they stand."""
        return f"{DEAD}.{self.priority or '*'}"

    def includes(self, letter: DeadLetter, wall_now: float) -> bool:
        """Whether letter is chosen at wall_now (the broker's UTC seconds)."""
        return self.id in (None, letter.id) and wall_now - letter.died_at >= self.older_than_s


class Row(msgspec.Struct):
    """One dead letter in a list. `died_at` is UTC, unix seconds."""

    id: str
    priority: Priority
    code: str
    message: str
    attempts: int
    age_s: float
    died_at: float
    trace_id: str
    subject: str


class Replayed(msgspec.Struct, frozen=True):
    """What became of a replay: the lane that the request stands on again, or is too full for it to stand on."""

    id: str
    subject: str
    full: bool


def as_row(letter: DeadLetter, wall_now: float) -> Row:
    """A letter as it is listed at wall_now (UTC seconds)."""
    return Row(
        id=letter.id,
        priority=letter.priority,
        code=letter.error.code,
        message=letter.error.message,
        attempts=letter.attempts,
        age_s=round(max(0.0, wall_now - letter.died_at), 1),
        died_at=letter.died_at,
        trace_id=letter.trace_id,
        subject=letter.subject,
    )


async def letters(bus: Bus, chosen: Chosen) -> AsyncIterator[DeadLetter]:
    """Oldest first, one after another: bodies may be long and many.

    Raises:
        Unreachable: the broker does not answer.
    """
    async for message in bus.scan(STREAM_DEAD, chosen.subject):
        found = _letter(to_stored(message))
        if chosen.includes(found, bus.clock.wall()):
            yield found


async def letter(bus: Bus, sequence: int) -> DeadLetter | None:
    """One letter, or None where it is not there any more.

    Raises:
        Unreachable: the broker does not answer.
    """
    stored = await bus.stored(STREAM_DEAD, sequence)
    return None if stored is None else _letter(stored)


async def replay(bus: Bus, sequence: int) -> Replayed | None:
    """Put one request back on its lane. Its letter stays where the lane is full.

    Returns:
        What became of it; None where somebody else has replayed or purged it meanwhile.

    Raises:
        Unreachable: the broker does not answer; replaying again stores the request once.
    """
    found = await letter(bus, sequence)
    if found is None:
        return None
    subject, headers = found.replay(bus.clock.wall())
    try:
        await bus.store(subject, found.body, headers=headers)
    except LaneFull:
        return Replayed(found.id, subject, full=True)
    await bus.delete(STREAM_DEAD, sequence)
    return Replayed(found.id, subject, full=False)


async def purge(bus: Bus, sequence: int) -> bool:
    """Throw one letter away. Returns whether it was there."""
    return await bus.delete(STREAM_DEAD, sequence)


def _letter(stored: Stored) -> DeadLetter:
    return read_letter(stored.subject, stored.sequence, stored.stored_at, stored.headers, stored.data)
