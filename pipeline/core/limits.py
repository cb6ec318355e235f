"""How often one client may call: a token bucket for each client and each kind of call, so that none drains another.

A bucket holds at most its burst, gains its rate a second, and each call takes one. Time is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

# Above this many buckets the full ones are forgotten: they are as good as new ones.
MAX_BUCKETS = 10_000


class Rate(NamedTuple):
    """So many calls a second, and so many at once after a rest. A rate of 0 is no limit."""

    per_s: float
    burst: float

    @classmethod
    def of(cls, per_s: float, *, burst_s: float) -> Rate:
        """A rate that may be used up burst_s ahead; at least one call fits."""
        return cls(per_s, max(1.0, per_s * burst_s))


class Verdict(NamedTuple):
    """Whether a call may go on.

    Attributes:
        allowed: whether it may.
        limit: how many calls fit at once; 0 where there is no limit.
        remaining: how many are left now.
        reset_s: until all of them are there again.
        retry_after_s: until one is there again, 0 where the call is allowed.
    """

    allowed: bool
    limit: int = 0
    remaining: int = 0
    reset_s: float = 0.0
    retry_after_s: float = 0.0


_UNLIMITED = Verdict(allowed=True)


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float
    full_at: float


@dataclass(slots=True)
class Limits:
    """The buckets of all clients. One writer: the process that takes the calls."""

    max_buckets: int = MAX_BUCKETS
    _buckets: dict[tuple[Hashable, Hashable], _Bucket] = field(init=False, default_factory=dict)

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, client: Hashable, kind: Hashable, rate: Rate, now: float) -> Verdict:
        """Take one call of a kind for a client, if it has one left.

        Args:
            client: who calls.
            kind: what for; each kind has a bucket of its own.
            rate: that applies to this client and kind.
            now: monotonic seconds.
        """
        if rate.per_s <= 0:
            return _UNLIMITED
        key = (client, kind)
        bucket = self._buckets.get(key)
        if bucket is None:
            self._make_room(now)
            bucket = self._buckets[key] = _Bucket(rate.burst, now, now)
        bucket.tokens = min(rate.burst, bucket.tokens + max(0.0, now - bucket.at) * rate.per_s)
        bucket.at = max(now, bucket.at)
        allowed = bucket.tokens >= 1.0
        if allowed:
            bucket.tokens -= 1.0
        reset_s = (rate.burst - bucket.tokens) / rate.per_s
        bucket.full_at = bucket.at + reset_s
        return Verdict(
            allowed,
            limit=math.floor(rate.burst),
            remaining=math.floor(bucket.tokens),
            reset_s=reset_s,
            retry_after_s=0.0 if allowed else (1.0 - bucket.tokens) / rate.per_s,
        )

    def _make_room(self, now: float) -> None:
        """Forget whose bucket is full again; where none is, the one that called first."""
        if len(self._buckets) < self.max_buckets:
            return
        self._buckets = {key: bucket for key, bucket in self._buckets.items() if bucket.full_at > now}
        while len(self._buckets) >= self.max_buckets:
            del self._buckets[next(iter(self._buckets))]
