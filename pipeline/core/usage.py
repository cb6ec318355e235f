"""The accounts of use: from the notes on requests to sums by hour, day and month, for each tenant and key.

The messages with notes have sequences, and each bucket of sums remembers the last one that it counts. So a message that
is read again counts once, whatever was stored when a process died. A request that is delivered again has a note in
another message: `KnownNotes` finds it. Time is the broker's time of storing a message. It does not go back, so only the
newest bucket of each period changes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.core.ending import Answered, Buried, Failed, Outcome, Settled
from pipeline.core.envelope import Envelope
from pipeline.wire.answers import Completion, EmbeddingList, ErrorAnswer, Success
from pipeline.wire.errors import ErrorCode
from pipeline.wire.subjects import STREAM_OLLAMA, Move
from pipeline.wire.usage import (
    OTHER,
    Period,
    UsageBucket,
    UsageNote,
    UsageOutcome,
    UsagePeriod,
    UsageReport,
    UsageSums,
)

# Accounts of one period that are kept apart. Further ones are counted together: names are the publishers' choice.
MOST_ACCOUNTS = 2000
# What is known of notes is forgotten in steps of this time.
_STEP_S = 60.0
_ENDED: dict[ErrorCode, UsageOutcome] = {ErrorCode.CANCELLED: "cancelled", ErrorCode.DEADLINE_EXCEEDED: "expired"}


def note_of(outcome: Outcome, envelope: Envelope, *, stream: str, written: int) -> UsageNote | None:
    """The account of a request that ends; None for an outcome that ends no request.

    Args:
        outcome: how it ends.
        envelope: the request's.
        stream: that held it.
        written: the tokens of its answer that are known, if it has not ended with an answer.
    """
    match outcome:
        case Answered(answer):
            return _answered(answer, envelope)
        case Settled(Completion() | EmbeddingList() as answer):
            return _answered(answer, envelope)
        case Failed(error) | Buried(error):
            code = error.code
        case Settled(ErrorAnswer(error=body)):
            code = body.code
        case _:
            return None
    note = _note(envelope, _ENDED.get(code, "failed"))
    note.completion = written
    note.spilled = stream == STREAM_OLLAMA or envelope.move in (Move.SPILLED, Move.RETURNED)
    return note


def _answered(answer: Success, envelope: Envelope) -> UsageNote:
    note = _note(envelope, "done")
    note.prompt, note.spilled = answer.usage.prompt_tokens, answer.headrace.spilled
    if isinstance(answer, Completion):
        usage = answer.usage
        note.completion, note.cached = usage.completion_tokens, usage.prompt_tokens_details.cached_tokens
        note.reasoning = usage.completion_tokens_details.reasoning_tokens if usage.completion_tokens_details else 0
    return note


def _note(envelope: Envelope, outcome: UsageOutcome) -> UsageNote:
    return UsageNote(
        envelope.name, outcome, envelope.priority, tenant=envelope.charged_to, key=envelope.key, batch=envelope.batch
    )


class StoredNotes(NamedTuple):
    """One message: its sequence, when the broker stored it (UTC seconds), and its notes by what names their requests.

    A message that is no account has no notes.
    """

    sequence: int
    at: float
    notes: Mapping[str, UsageNote]

    def of(self, counts: Callable[[UsageNote], bool]) -> StoredNotes:
        """The same message with some of its notes."""
        return self._replace(notes={name: note for name, note in self.notes.items() if counts(note)})


class KnownNotes:
    """Which requests have had a note within a time. One writer: its owner.

    Args:
        window_s: how long a request is known: as long as a delivery can repeat its note.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._steps: deque[tuple[float, set[int]]] = deque()

    def new(self, stored: StoredNotes) -> StoredNotes:
        """The message without the notes that are known. From now on, its notes are. Messages come in order."""
        while self._steps and self._steps[0][0] < stored.at - self._window_s - _STEP_S:
            self._steps.popleft()
        if not self._steps or self._steps[-1][0] < stored.at - _STEP_S:
            self._steps.append((stored.at, set()))
        new = {}
        for name, note in stored.notes.items():
            # Names are the publishers' choice; their hashes differ from process to process.
            known = hash(name)
            if not any(known in step for _, step in self._steps):
                self._steps[-1][1].add(known)
                new[name] = note
        return stored._replace(notes=new)


@dataclass(slots=True)
class Book:
    """The sums of one period.

    Attributes:
        period, start: which period, and when it began (unix seconds).
        through: the sequence of the last message that is counted.
        changed: whether it differs from what is stored.
    """

    period: Period
    start: int
    through: int = 0
    changed: bool = False
    _sums: dict[tuple[str, str], UsageSums] = field(default_factory=dict)

    @classmethod
    def of(cls, period: Period, bucket: UsageBucket) -> Book:
        """The book of a stored bucket."""
        return cls(period, bucket.start, bucket.through, _sums={(each.tenant, each.key): each for each in bucket.sums})

    @property
    def sums(self) -> list[UsageSums]:
        """Those of each tenant and key."""
        return list(self._sums.values())

    @property
    def bucket(self) -> UsageBucket:
        """As it is stored."""
        return UsageBucket(self.start, self.through, self.sums)

    def add(self, stored: StoredNotes) -> None:
        """Count the notes of a message, unless it is counted already."""
        if stored.sequence <= self.through:
            return
        self.through, self.changed = stored.sequence, True
        for note in stored.notes.values():
            account = (note.tenant, note.key)
            if account not in self._sums and len(self._sums) >= MOST_ACCOUNTS:
                account = (OTHER, "")
            self._sums.setdefault(account, UsageSums(*account)).add(note)


class Accounts:
    """The newest book of each period, and those that are complete and not stored yet. One writer: its owner.

    Args:
        books: as they are stored. A period without one begins with the first note.
        window_s: how long after a request's first note another one can follow.

    Attributes:
        read: the sequence of the last message that was added, 0 before the first. The messages that the books count
            are added as well: their requests are known then.
    """

    def __init__(self, books: Iterable[Book] = (), *, window_s: float = 0.0) -> None:
        self.read = 0
        self._books = {book.period: book for book in books}
        self._complete: list[Book] = []
        self._known = KnownNotes(window_s)

    @property
    def through(self) -> int:
        """The sequence up to which every book counts."""
        return min((self._books[period].through if period in self._books else 0 for period in Period), default=0)

    def add(self, stored: StoredNotes) -> None:
        """Count a message in each period that does not count it. Messages come in the order of their sequences."""
        self.read, stored = stored.sequence, self._known.new(stored)
        for period in Period:
            start, book = period.start_of(stored.at), self._books.get(period)
            if book is None or (start > book.start and stored.sequence > book.through):
                if book is not None and book.changed:
                    self._complete.append(book)
                book = self._books[period] = Book(period, start)
            book.add(stored)

    def restart(self) -> None:
        """The stream of notes is a new one, whose sequences begin again. What is counted stays."""
        for book in self._books.values():
            book.through, book.changed = 0, True

    def unstored(self) -> list[Book]:
        """The books to store, in this order: a complete one before its successor."""
        return self._complete + [book for book in self._books.values() if book.changed]

    def stored(self, book: Book, through: int) -> None:
        """A book was stored as it was when it counted up to a sequence."""
        book.changed = book.through != through
        self._complete = [each for each in self._complete if each is not book]

    def report(self, at: float, sees: Callable[[UsageSums], bool] = lambda _: True) -> UsageReport:
        """The sums of the periods that contain a time.

        Args:
            at: UTC seconds.
            sees: whether an account belongs in the report.
        """
        hour, day, month = (self._period(period, at, sees) for period in Period)
        return UsageReport(at, hour, day, month)

    def _period(self, period: Period, at: float, sees: Callable[[UsageSums], bool]) -> UsagePeriod:
        start, book = period.start_of(at), self._books.get(period)
        # The broker's clock may be a moment ahead.
        current = book is not None and book.start >= start
        seen = [each for each in book.sums if sees(each)] if book is not None and current else []
        return UsagePeriod(
            start,
            period.end_of(at),
            total=_together(seen, lambda _: ("", "")).pop() if seen else UsageSums(""),
            tenants=_together(seen, lambda each: (each.tenant, "")),
            keys=_together([each for each in seen if each.key], lambda each: (each.tenant, each.key)),
        )


def part_of(report: UsageReport, tenant: str, key: str) -> UsageReport:
    """The part of a report that one key sees: its tenant as a whole, and itself."""

    def part(period: UsagePeriod) -> UsagePeriod:
        tenants = [each for each in period.tenants if each.tenant == tenant]
        keys = [each for each in period.keys if (each.tenant, each.key) == (tenant, key)]
        return UsagePeriod(period.start, period.end, tenants[0] if tenants else UsageSums(tenant), tenants, keys)

    return UsageReport(report.at, part(report.hour), part(report.day), part(report.month))


def bounded(sums: list[UsageSums], most: int) -> list[UsageSums]:
    """The first accounts, and the others as one: for metrics, whose labels must be few."""
    rest = UsageSums(OTHER)
    for each in sums[most:]:
        rest.merge(each)
    return [*sums[:most], rest] if len(sums) > most else sums


def _together(sums: Iterable[UsageSums], account: Callable[[UsageSums], tuple[str, str]]) -> list[UsageSums]:
    """The sums of accounts that are the same, most tokens first."""
    found: dict[tuple[str, str], UsageSums] = {}
    for each in sums:
        name = account(each)
        found.setdefault(name, UsageSums(*name)).merge(each)
    return sorted(found.values(), key=lambda each: (-each.tokens.total, each.tenant, each.key))
