"""The accounts of use on the broker: notes on requests that ended, and the sums that are made of them.

`LLM_USED` has a note for each request. Notes that come while the broker stores others are stored as one message. A
reader counts each request once, however many messages name it: see `KnownNotes`. `LLM_USAGE` has the sums. The monitor
that leads writes them; each write names the sequence of the message that it replaces, so of two monitors that take
themselves for the leader one is refused.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from datetime import UTC, datetime

import msgspec

from pipeline.aio import wait_set
from pipeline.broker.connection import BusError, Message, Unreachable
from pipeline.broker.jetstream import STORE_PATIENCE_S, Bus, Stored, to_stored
from pipeline.core.usage import Book, StoredNotes
from pipeline.wire.messages import encode
from pipeline.wire.subjects import MSG_ID, STORED_SEQUENCE, STREAM_USAGE, STREAM_USED, USAGE, USED, USED_STORED
from pipeline.wire.usage import Period, UsageBucket, UsageNote, UsageNotes, bucket_subject
from pipeline.wire.validation import UNREADABLE

log = logging.getLogger(__name__)

# A broker that restarts stores again within this time.
_PATIENCE_S = STORE_PATIENCE_S
# After a note that was not stored, notes are sent without waiting for so long.
_UNHEARD_S = 60.0
# Notes are looked for without news as well: the news may be lost.
_LOOK_EVERY_S = 5.0
_KEPT_S = {Period.HOUR: 3 * 86400, Period.DAY: 100 * 86400, Period.MONTH: 800 * 86400}
# A message has up to so many notes, of a few hundred bytes each; a reader gets up to so many bytes at once.
_NOTES_MOST = 500
_READ_BYTES = 4 << 20
_notes_decoder = msgspec.json.Decoder(UsageNote | UsageNotes)
_bucket_decoder = msgspec.json.Decoder(UsageBucket)


async def store_note(bus: Bus, note: UsageNote, created: int) -> None:
    """Store the note on a request, alone or with those of others that end now, and wait until it is stored.

    A request outweighs its account: if the broker is there and does not take the note, as with an older configuration
    of its permissions, that is logged, and the following notes are sent without waiting.

    Args:
        bus: the connection.
        note: the account.
        created: `Envelope.created`, which tells requests with the same name apart.

    Raises:
        Unreachable: the broker is away.
    """

    async def store(notes: list[tuple[str, UsageNote]]) -> None:
        await _store_notes(bus, dict(notes))

    await bus.accounts.carry_out((f"{note.id}@{created}", note), store, most=_NOTES_MOST)


async def _store_notes(bus: Bus, notes: dict[str, UsageNote]) -> None:
    """Store the notes on some requests, by what names each of them, as one message."""
    (name, note), *others = notes.items()
    # The id makes repeated tries one message. That of a single note also makes repeated notes one message.
    message_id, data = (secrets.token_hex(12), encode(UsageNotes(notes))) if others else (name, encode(note))
    headers = {MSG_ID: message_id}
    if bus.clock.now() < bus.unaccounted_until:
        await bus.publish(USED, data, headers=headers)
        return
    try:
        await bus.store(USED, data, headers=headers, patience_s=_PATIENCE_S)
    except BusError as error:
        more = f" and {len(others)} more" if others else ""
        if not bus.is_connected:
            raise Unreachable(f"The account of request {note.id}{more} was not stored: {error}") from error
        bus.unaccounted_until = bus.clock.now() + _UNHEARD_S
        log.warning(
            "The account of request %s%s was not stored: %s. Check the stream %s and the permission to publish %s.",
            note.id,
            more,
            error,
            STREAM_USED,
            USED,
        )


@dataclass(slots=True)
class NoteFeed:
    """Hears of notes and reads them in the order of their sequences.

    Args:
        bus: the connection.
    """

    bus: Bus
    _news: asyncio.Event = field(init=False, default_factory=asyncio.Event)

    async def start(self) -> None:
        """Subscribe. Call once."""
        self.bus.on_reconnect(self.wake)
        await self.bus.subscribe(USED_STORED, self._on_stored)

    def wake(self) -> None:
        """Have `news` return at once."""
        self._news.set()

    async def _on_stored(self, _: Message) -> None:
        self._news.set()

    async def news(self) -> None:
        """Wait until there may be a new note."""
        await wait_set(self._news, _LOOK_EVERY_S)
        self._news.clear()

    async def first_since(self, at: float) -> int | None:
        """The sequence of the first note that was stored at a time (UTC seconds) or later; None if there is none.

        Raises:
            Unreachable: the broker does not answer.
        """
        start = datetime.fromtimestamp(at, UTC).isoformat().replace("+00:00", "Z")
        query = msgspec.json.encode({"start_time": start, "next_by_subj": USED})
        found = await self.bus.request(f"$JS.API.DIRECT.GET.{STREAM_USED}", query)
        return int(found.headers[STORED_SEQUENCE]) if STORED_SEQUENCE in found.headers else None

    async def after(self, sequence: int) -> AsyncGenerator[StoredNotes, None]:
        """The messages with notes after a sequence.

        Raises:
            Unreachable: the broker does not answer.
        """
        while found := await self.bus.batch(STREAM_USED, USED, sequence + 1, max_bytes=_READ_BYTES):
            for message in found:
                stored = to_stored(message)
                sequence = stored.sequence
                yield StoredNotes(sequence, stored.stored_at, _notes_in(stored))


def _notes_in(stored: Stored) -> dict[str, UsageNote]:
    try:
        found = _notes_decoder.decode(stored.data)
    except UNREADABLE:
        log.warning("Skipping message %d of %s: it is no account.", stored.sequence, STREAM_USED)
        return {}
    if isinstance(found, UsageNotes):
        return found.notes
    return {stored.headers.get(MSG_ID, f"{found.id}@{stored.sequence}"): found}


@dataclass(slots=True)
class BookStore:
    """Reads and writes the sums.

    Args:
        bus: the connection.
    """

    bus: Bus
    _last: dict[str, int] = field(init=False, default_factory=dict)

    async def newest(self) -> list[Book]:
        """The newest book of each period that has one.

        Raises:
            Unreachable: the broker does not answer.
        """
        self._last.clear()
        books = []
        for period in Period:
            query = msgspec.json.encode({"last_by_subj": f"{USAGE}.{period}.*"})
            found = await self.bus.request(f"$JS.API.DIRECT.GET.{STREAM_USAGE}", query)
            if STORED_SEQUENCE in found.headers:
                book = Book.of(period, _bucket_decoder.decode(found.data))
                self._last[bucket_subject(period, book.start)] = int(found.headers[STORED_SEQUENCE])
                books.append(book)
        return books

    async def write(self, book: Book) -> None:
        """Store a book in the place of what was there.

        Raises:
            Fenced: another process has written it.
            BusError: it was not stored.
        """
        subject = bucket_subject(book.period, book.start)
        headers = {"Nats-TTL": f"{_KEPT_S[book.period]}s"}
        before = self._last.get(subject, 0)
        self._last[subject] = await self.bus.store(
            subject, encode(book.bucket), headers=headers, expected_last=before, patience_s=0.0
        )
