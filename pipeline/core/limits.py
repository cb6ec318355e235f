"""Rate limits: a token bucket for each client and each kind of call, so that no client or kind drains another's.

A bucket holds at most its burst, gains its rate per second, and each call takes one token. Time is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

# Above this many buckets the full ones are dropped: a full bucket is the same as a new one.
MAX_BUCKETS = 10_000


class Rate(NamedTuple):
    """Calls per second, and calls at once after a rest. A rate of 0 is no limit."""

    per_s: float
    burst: float

    @classmethod
    def of(cls, per_s: float, *, burst_s: float) -> Rate:
        """A rate with a burst of burst_s seconds' worth of calls, and at least one."""
        return cls(per_s, max(1.0, per_s * burst_s))


class Allowance(NamedTuple):
    """Whether a call is allowed, and what is left.

    Attributes:
        allowed: whether it is.
        limit: the calls that fit at once; 0 if there is no limit.
        remaining: the calls that are left now.
        reset_s: seconds until all of them are left again.
        retry_after_s: seconds until one is left again; 0 if this call is allowed.
    """

    allowed: bool
    limit: int = 0
    remaining: int = 0
    reset_s: float = 0.0
    retry_after_s: float = 0.0


_UNLIMITED = Allowance(allowed=True)


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at: float
    full_at: float


@dataclass(slots=True)
class Limits:
    """The buckets of all clients. One writer: the edge of the gateway."""

    max_buckets: int = MAX_BUCKETS
    _buckets: dict[tuple[Hashable, Hashable], _Bucket] = field(init=False, default_factory=dict)

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, client: Hashable, kind: Hashable, rate: Rate, now: float) -> Allowance:
        """Take one token of a client's bucket, if one is left.

        Args:
            client: the caller.
            kind: the kind of the call; each kind has its own bucket.
            rate: the rate of this client and kind.
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
        return Allowance(
            allowed,
            limit=math.floor(rate.burst),
            remaining=math.floor(bucket.tokens),
            reset_s=reset_s,
            retry_after_s=0.0 if allowed else (1.0 - bucket.tokens) / rate.per_s,
        )

    def _make_room(self, now: float) -> None:
        """Drop the buckets that are full again; if none is, drop the oldest."""
        if len(self._buckets) < self.max_buckets:
            return
        self._buckets = {key: bucket for key, bucket in self._buckets.items() if bucket.full_at > now}
        while len(self._buckets) >= self.max_buckets:
            del self._buckets[next(iter(self._buckets))]
