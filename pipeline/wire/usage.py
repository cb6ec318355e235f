"""The accounts of use: the note on each request that ended, the stored sums, and the report.

A note is stored for each request after the last message of its answer; requests that end together share a message.
Sums are kept by hour, day and month (UTC).
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Literal

from msgspec import Struct, field

from pipeline.wire.subjects import USAGE, Priority

# The tenant of requests whose subject names none.
DEFAULT_TENANT = "default"
# What stands for the accounts of a period beyond the most that are kept apart.
OTHER = "other"

UsageOutcome = Literal["done", "failed", "cancelled", "expired"]


class Period(StrEnum):
    """A calendar period in UTC."""

    HOUR = "hour"
    DAY = "day"
    MONTH = "month"

    def start_of(self, at: float) -> int:
        """When the period began that contains a time. Both are unix seconds."""
        return int(self._begin(at).timestamp())

    def end_of(self, at: float) -> int:
        """When the next period begins."""
        longest = {Period.HOUR: timedelta(hours=1), Period.DAY: timedelta(days=1), Period.MONTH: timedelta(days=32)}
        return self.start_of((self._begin(at) + longest[self]).timestamp())

    def _begin(self, at: float) -> datetime:
        hour = datetime.fromtimestamp(at, UTC).replace(minute=0, second=0, microsecond=0)
        if self is Period.HOUR:
            return hour
        return hour.replace(hour=0, day=1 if self is Period.MONTH else hour.day)


class UsageNote(Struct, tag_field="object", tag="headrace.used", omit_defaults=True):
    """The account of one request that ended.

    Attributes:
        id: the request's name.
        outcome: how it ended.
        priority: of its lane.
        tenant: of its subject or its key; `default` without one.
        key: the API key that it came with; empty without one.
        prompt, completion: its tokens. Of a request that did not end with an answer, only those written are known.
        cached: the part of the prompt that an earlier request had left.
        reasoning: the part of the completion that is reasoning.
        spilled: whether it was moved to the second engine.
        batch: whether it is a line of a batch.
    """

    id: str
    outcome: UsageOutcome
    priority: Priority
    tenant: str = DEFAULT_TENANT
    key: str = ""
    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0
    spilled: bool = False
    batch: bool = False

    @property
    def tokens(self) -> int:
        """What counts against a limit of tokens."""
        return self.prompt + self.completion


class UsageNotes(Struct, tag_field="object", tag="headrace.used.several"):
    """The accounts of several requests that ended at about the same time, by what names each of them.

    A request that is delivered again is named in another message as well. It counts once.
    """

    notes: dict[str, UsageNote]


class RequestSums(Struct, omit_defaults=True):
    """Requests by outcome, and those of them that were spilled or were lines of batches."""

    done: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0
    spilled: int = 0
    batch: int = 0

    @property
    def total(self) -> int:
        """All requests."""
        return self.done + self.failed + self.cancelled + self.expired


class TokenSums(Struct, omit_defaults=True):
    """Tokens: `cached` is a part of `prompt`, `reasoning` of `completion`, `spilled` of both together."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0
    spilled: int = 0

    @property
    def total(self) -> int:
        """All tokens."""
        return self.prompt + self.completion


class UsageSums(Struct):
    """What one tenant and key used in one period. `key` is empty for requests without a key."""

    tenant: str
    key: str = ""
    requests: RequestSums = field(default_factory=RequestSums)
    tokens: TokenSums = field(default_factory=TokenSums)

    def add(self, note: UsageNote) -> None:
        """Count one request."""
        requests, tokens = self.requests, self.tokens
        setattr(requests, note.outcome, getattr(requests, note.outcome) + 1)
        requests.spilled += note.spilled
        requests.batch += note.batch
        tokens.prompt += note.prompt
        tokens.completion += note.completion
        tokens.cached += note.cached
        tokens.reasoning += note.reasoning
        tokens.spilled += note.tokens if note.spilled else 0

    def merge(self, other: UsageSums) -> None:
        """Add the sums of another account."""
        for mine, theirs in ((self.requests, other.requests), (self.tokens, other.tokens)):
            for name in mine.__struct_fields__:
                setattr(mine, name, getattr(mine, name) + getattr(theirs, name))


class UsageBucket(Struct):
    """The stored sums of one period.

    Attributes:
        start: when the period began, unix seconds.
        through: the sequence of the last note that is counted.
        sums: of each tenant and key.
    """

    start: int
    through: int
    sums: list[UsageSums] = field(default_factory=list)


class UsagePeriod(Struct):
    """The sums of one period in a report: by tenant, by key, and of all together. Times are unix seconds."""

    start: int
    end: int
    total: UsageSums
    tenants: list[UsageSums]
    keys: list[UsageSums]


class UsageReport(Struct, tag_field="object", tag="headrace.usage"):
    """The accounts of use at one time (unix seconds)."""

    at: float
    hour: UsagePeriod
    day: UsagePeriod
    month: UsagePeriod


class ReservationNotice(Struct, tag_field="object", tag="headrace.reserved", omit_defaults=True):
    """What one gateway tells the others of a request that it lets in for a key with limits.

    Attributes:
        key: the key's name.
        id: the request's name.
        gateway: who tells it.
        prompt, completion: the tokens that are reserved.
        counts: whether it counts as a request.
        ended: the request has ended, and used so many tokens.
        released: the request was not stored, and the reservation is void.
    """

    key: str
    id: str
    gateway: str
    prompt: int = 0
    completion: int = 0
    counts: bool = True
    ended: bool = False
    released: bool = False


def bucket_subject(period: Period, start: int) -> str:
    """Where the sums of a period are stored, by the time at which it began."""
    return f"{USAGE}.{period}.{start}"
