"""Counting returns: deliveries that were given back, or dropped unread, and use up none of a request's attempts.

The broker counts deliveries. What is kept in `LLM_STATE` is how many of them to take off. A note belongs to the message
and not to the request: where the request is moved or replayed, its deliveries are counted from 1 again.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Protocol

from pipeline.aio import Background
from pipeline.broker.connection import BusError
from pipeline.broker.jetstream import Bus, Fenced
from pipeline.wire.subjects import RETURNED, STREAM_STATE

# Longer than a request waits between two deliveries. A note that has been dropped counts as an attempt again.
_KEPT_S = 24 * 3600
# How many processes may write the note of one message at the same moment.
_TRIES = 5
# A return that could not be noted is tried again for this long.
_OWED_FOR_S, _OWED_PAUSE_S = 3600.0, 0.5


class FromConsumer(Protocol):
    """A message that a durable consumer delivered."""

    @property
    def consumer(self) -> str:
        """The consumer's name."""
        ...

    @property
    def sequence(self) -> int:
        """The message's in its stream."""
        ...


class OwedReturns:
    """Deliveries whose return could not be noted, because the broker stored nothing. It is noted once it does.

    Until then this process counts them itself.
    """

    def __init__(self) -> None:
        self._owed: Counter[str] = Counter()
        self._noting = Background()

    def owe(self, bus: Bus, delivery: FromConsumer) -> None:
        """Note the return of one delivery as soon as the broker stores it."""
        self._owed[_subject(delivery)] += 1
        self._noting.start(self._note(bus, delivery), what=f"noting the return of {_subject(delivery)}")

    def count(self, delivery: FromConsumer) -> int:
        """How many returns of a message are not noted yet."""
        return self._owed[_subject(delivery)]

    async def _note(self, bus: Bus, delivery: FromConsumer) -> None:
        give_up_at = bus.clock.now() + _OWED_FOR_S
        try:
            while bus.clock.now() < give_up_at:
                try:
                    await note_return(bus, delivery)
                except BusError:
                    await asyncio.sleep(_OWED_PAUSE_S)
                else:
                    return
        finally:
            self._owed -= Counter([_subject(delivery)])


async def note_return(bus: Bus, delivery: FromConsumer) -> None:
    """Count one delivery as returned, whichever process has the request by now.

    Raises:
        BusError: the note was not stored; the delivery counts as an attempt.
    """
    headers = {"Nats-TTL": f"{_KEPT_S}s"}
    for tries_left in reversed(range(_TRIES)):
        sequence, times = await _read(bus, delivery)
        try:
            await bus.store(_subject(delivery), str(times + 1).encode(), headers=headers, expected_last=sequence)
        except Fenced:
            if not tries_left:
                raise
            continue
        return


async def times_returned(bus: Bus, delivery: FromConsumer) -> int:
    """How many deliveries of a message were returned.

    Raises:
        Unreachable: the broker does not answer.
    """
    return (await _read(bus, delivery))[1]


async def _read(bus: Bus, delivery: FromConsumer) -> tuple[int, int]:
    """The note's sequence, 0 where there is none, and how many deliveries it counts."""
    found = await bus.last_message(STREAM_STATE, _subject(delivery))
    return (0, 0) if found is None else (found[0], int(found[1]) if found[1].isdigit() else 0)


def _subject(delivery: FromConsumer) -> str:
    return f"{RETURNED}.{delivery.consumer}-{delivery.sequence}"
