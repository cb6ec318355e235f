"""Dead letters on the broker: listing, replaying, purging."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from pipeline.broker.jetstream import Bus, LaneFull, Stored, to_stored
from pipeline.broker.secret import learn_moves
from pipeline.core.letters import DeadLetter, read_letter
from pipeline.wire.subjects import DEAD, STREAM_DEAD, Priority


class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """Selects dead letters: by id, by priority, by minimum age in seconds, or all."""

    id: str | None = None
    priority: Priority | None = None
    older_than_s: float = 0.0

    @property
    def subject(self) -> str:
        """The subject of the selected letters, with a wildcard for any priority."""
        return f"{DEAD}.{self.priority or '*'}"

    def includes(self, letter: DeadLetter, wall_now: float) -> bool:
        """Whether letter is selected at wall_now (the broker's UTC, seconds)."""
        return self.id in (None, letter.id) and wall_now - letter.died_at >= self.older_than_s


class Row(msgspec.Struct):
    """One dead letter in a list. `died_at`: when it was stored, UTC, unix seconds."""

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
    """The result of a replay: the request's lane, and whether that was full and the letter stays."""

    id: str
    subject: str
    full: bool


def as_row(letter: DeadLetter, wall_now: float) -> Row:
    """A letter's row in a list made at wall_now (the broker's UTC, seconds)."""
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
    """The selected letters, oldest first. They are read one by one: bodies can be long and many.

    Raises:
        Unreachable: the broker does not answer.
    """
    async for message in bus.scan(STREAM_DEAD, chosen.subject):
        found = _letter(to_stored(message))
        if chosen.includes(found, bus.clock.wall()):
            yield found


async def letter(bus: Bus, sequence: int) -> DeadLetter | None:
    """One letter, or None if it was removed.

    Raises:
        Unreachable: the broker does not answer.
    """
    stored = await bus.stored(STREAM_DEAD, sequence)
    return None if stored is None else _letter(stored)


async def replay(bus: Bus, sequence: int) -> Replayed | None:
    """Store one request on its lane again, and remove its letter. If the lane is full, the letter stays.

    Returns:
        The result; None if the letter was replayed or purged meanwhile.

    Raises:
        Unreachable: the broker does not answer. Replaying again stores the request only once.
    """
    found = await letter(bus, sequence)
    if found is None:
        return None
    if not bus.moves.key:
        await learn_moves(bus)
    subject, headers = found.replay(bus.clock.wall(), bus.moves)
    try:
        await bus.store(subject, found.body, headers=headers)
    except LaneFull:
        return Replayed(found.id, subject, full=True)
    await bus.delete(STREAM_DEAD, sequence)
    return Replayed(found.id, subject, full=False)


async def purge(bus: Bus, sequence: int) -> bool:
    """Remove one letter. Returns whether it existed."""
    return await bus.delete(STREAM_DEAD, sequence)


def _letter(stored: Stored) -> DeadLetter:
    return read_letter(stored.subject, stored.sequence, stored.stored_at, stored.headers, stored.data)
