"""Quotas of API keys: requests and tokens in any minute, and tokens in a day (UTC).

The number of tokens of a request is known only when it has ended. So an estimate is reserved when it begins, and later
replaced by its actual use. A request is admitted if the tokens used, the tokens reserved and its own estimate fit into
the limit together. If estimates are too low, each running request exceeds the limit by at most its own use.

Times are the broker's, in UTC seconds, and arguments.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from pipeline.wire.usage import Period, UsageNote

MINUTE_S = 60.0
# Estimates of requests whose account does not come are dropped after this long: the longest lease of a record.
RESERVED_FOR_S = 900.0
# The same for a request whose answer has been sent.
ENDED_FOR_S = 30.0
# While open requests hold the rest of a limit, it is unknown when one ends.
_ASK_AGAIN_S = 1.0


class KeyLimits(NamedTuple):
    """The limits of one key; 0 is no limit."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    tokens_per_day: int = 0


class Estimate(NamedTuple):
    """The tokens that a request is expected to use."""

    prompt: int
    completion: int = 0

    @property
    def total(self) -> int:
        """Of prompt and completion."""
        return self.prompt + self.completion


class QuotaRefusal(NamedTuple):
    """Why a request does not fit.

    Attributes:
        limit: which one.
        most: its value.
        used: what counts against it now, reservations included.
        asked: what the request would add.
        retry_after_s: when it may fit.
        exhausted: whether the limit is used up, and not only reserved.
    """

    limit: Literal["requests_per_minute", "tokens_per_minute", "tokens_per_day"]
    most: int
    used: int
    asked: int
    retry_after_s: float
    exhausted: bool


class LimitState(NamedTuple):
    """What is left of a limit: its value, the rest, and seconds until all of it is left again."""

    limit: int
    remaining: int
    reset_s: float


@dataclass(slots=True)
class _Reserved:
    estimate: Estimate
    until: float
    known: bool = False  # the estimate is what was used


@dataclass(slots=True)
class _KeyUse:
    requests: deque[float] = field(default_factory=deque)
    tokens: deque[tuple[int, int]] = field(default_factory=deque)  # by the second in which they were used
    recent: int = 0
    day: int = 0
    day_tokens: int = 0
    reserved: dict[str, _Reserved] = field(default_factory=dict)

    def prune(self, now: float) -> None:
        while self.requests and self.requests[0] <= now - MINUTE_S:
            self.requests.popleft()
        while self.tokens and self.tokens[0][0] <= now - MINUTE_S:
            self.recent -= self.tokens.popleft()[1]
        if (day := Period.DAY.start_of(now)) > self.day:
            self.day, self.day_tokens = day, 0
        for name in [name for name, each in self.reserved.items() if each.until <= now]:
            del self.reserved[name]

    def use(self, at: float, tokens: int) -> None:
        second = math.floor(at)
        if self.tokens and self.tokens[-1][0] >= second:
            last, before = self.tokens.pop()
            self.tokens.append((last, before + tokens))
        else:
            self.tokens.append((second, tokens))
        self.recent += tokens

    @property
    def open_tokens(self) -> int:
        return sum(each.estimate.total for each in self.reserved.values())

    @property
    def known_tokens(self) -> int:
        """Of requests that have ended, and whose accounts are on their way."""
        return sum(each.estimate.total for each in self.reserved.values() if each.known)


class Quotas:
    """The use of each key that has limits. One writer: its owner."""

    def __init__(self) -> None:
        self._keys: dict[str, _KeyUse] = {}

    def reserve(
        self, key: str, limits: KeyLimits, name: str, estimate: Estimate, now: float, *, counts: bool = True
    ) -> QuotaRefusal | None:
        """Reserve what a request is expected to use, or say why it does not fit. A repeated name is the same request.

        Args:
            key: the key's name.
            limits: the key's.
            name: the request's.
            estimate: the request's.
            now: as everywhere in this module.
            counts: whether it counts as a request; not for the second choice of one call.
        """
        use = self._use(key, now)
        if name in use.reserved:
            return None
        refusal = (self._requests(use, limits, now) if counts else None) or self._tokens(use, limits, estimate, now)
        if refusal is None:
            self._add(use, name, estimate, now, counts=counts)
        return refusal

    def heard(self, key: str, name: str, estimate: Estimate, now: float, *, counts: bool) -> None:
        """Another gateway has let a request in."""
        use = self._use(key, now)
        if name not in use.reserved:
            self._add(use, name, estimate, now, counts=counts)

    def day_is_over_limit(self, key: str, limits: KeyLimits, now: float) -> bool:
        """Whether a key has used up its tokens of the day: then no batch is taken either."""
        use = self._use(key, now)
        return 0 < limits.tokens_per_day <= use.day_tokens + use.known_tokens

    def release(self, key: str, name: str) -> None:
        """The request was not stored."""
        if (use := self._keys.get(key)) is not None:
            use.reserved.pop(name, None)

    def ended(self, key: str, name: str, now: float, used: Estimate | None = None) -> None:
        """A request has ended. Its account comes soon, unless the request is a repeated one.

        Args:
            key: the key's name.
            name: the request's.
            now: as everywhere in this module.
            used: what it has used; None if that is not known.
        """
        if (use := self._keys.get(key)) is not None and (reserved := use.reserved.get(name)) is not None:
            reserved.until = min(reserved.until, now + ENDED_FOR_S)
            if used is not None:
                reserved.estimate, reserved.known = used, True

    def settle(self, note: UsageNote, at: float, now: float, *, today: bool = True) -> None:
        """Count the account of a request, and drop its estimate.

        Of an answer that was broken off the account has no prompt; the estimate of it counts.

        Args:
            note: the account.
            at: when it was stored.
            now: as everywhere in this module.
            today: whether it is not yet in what `learn` told.
        """
        use = self._use(note.key, now)
        reserved = use.reserved.pop(note.id, None)
        tokens = note.tokens
        if reserved is not None and note.completion and not note.prompt:
            tokens += reserved.estimate.prompt
        if not note.batch and at > now - MINUTE_S:
            use.use(at, tokens)
        if today and Period.DAY.start_of(at) == use.day:
            use.day_tokens += tokens

    def forget_used(self) -> None:
        """Forget the tokens that were used, to read them again. Reservations and requests stay."""
        for use in self._keys.values():
            use.tokens.clear()
            use.recent = use.day_tokens = 0

    def learn(self, key: str, day: int, tokens: int, now: float) -> None:
        """What a key has used in the day that began at a time, from the accounts: one tenant's part of it."""
        use = self._use(key, now)
        if day == use.day:
            use.day_tokens += tokens

    def standing(self, key: str, limits: KeyLimits, now: float) -> dict[Literal["requests", "tokens"], LimitState]:
        """What is left to a key, for the headers of a response. Of two limits of tokens, that of a minute."""
        use, standing = self._use(key, now), dict[Literal["requests", "tokens"], LimitState]()
        if most := limits.requests_per_minute:
            reset_s = use.requests[-1] + MINUTE_S - now if use.requests else 0.0
            standing["requests"] = LimitState(most, max(0, most - len(use.requests)), max(0.0, reset_s))
        if most := limits.tokens_per_minute:
            reset_s = use.tokens[-1][0] + MINUTE_S - now if use.tokens else 0.0
            reset_s = MINUTE_S if use.reserved else max(0.0, reset_s)
            standing["tokens"] = LimitState(most, max(0, most - use.recent - use.open_tokens), reset_s)
        elif most := limits.tokens_per_day:
            used = use.day_tokens + use.open_tokens
            reset_s = Period.DAY.end_of(now) - now if used else 0.0
            standing["tokens"] = LimitState(most, max(0, most - used), reset_s)
        return standing

    def _use(self, key: str, now: float) -> _KeyUse:
        use = self._keys.setdefault(key, _KeyUse())
        use.prune(now)
        return use

    @staticmethod
    def _add(use: _KeyUse, name: str, estimate: Estimate, now: float, *, counts: bool) -> None:
        use.reserved[name] = _Reserved(estimate, now + RESERVED_FOR_S)
        if counts:
            use.requests.append(now)

    @staticmethod
    def _requests(use: _KeyUse, limits: KeyLimits, now: float) -> QuotaRefusal | None:
        most, used = limits.requests_per_minute, len(use.requests)
        if not most or used < most:
            return None
        # So many must leave the minute that one more fits.
        retry_s = use.requests[used - most] + MINUTE_S - now
        return QuotaRefusal("requests_per_minute", most, used, 1, retry_s, exhausted=True)

    @staticmethod
    def _tokens(use: _KeyUse, limits: KeyLimits, estimate: Estimate, now: float) -> QuotaRefusal | None:
        """A request that is larger than a limit fits if nothing else counts against it."""
        if most := limits.tokens_per_day:
            asked, used = min(estimate.total, most), use.day_tokens + use.open_tokens
            if used + asked > most:
                exhausted = use.day_tokens + use.known_tokens + asked > most
                retry_s = Period.DAY.end_of(now) - now if exhausted else _ASK_AGAIN_S
                return QuotaRefusal("tokens_per_day", most, used, asked, retry_s, exhausted)
        if most := limits.tokens_per_minute:
            asked, used = min(estimate.total, most), use.recent + use.open_tokens
            if used + asked > most:
                retry_s = _free_in_s(use, used + asked - most, now)
                return QuotaRefusal(
                    "tokens_per_minute", most, used, asked, retry_s, use.recent + use.known_tokens + asked > most
                )
        return None


def _free_in_s(use: _KeyUse, tokens: int, now: float) -> float:
    """When so many tokens have left the minute, if no open request ends before."""
    for second, each in use.tokens:
        tokens -= each
        if tokens <= 0:
            return max(0.0, second + MINUTE_S - now)
    return _ASK_AGAIN_S
