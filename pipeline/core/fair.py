"""Start-time fair queueing (Goyal, Vin, Cheng, 1996): which of several takers of one service is served next.

Each has a virtual time that advances by the service it used divided by its share, and the one furthest behind goes
first. Service is counted in tokens, not requests, so long answers get no more than their share. A request is charged an
estimate when it starts, so that slots which become free together are shared as well, and its real cost when it ends.
Who was idle returns at the present virtual time, that of the one furthest behind among those that take turns: it has
saved up nothing. When nothing runs and nothing waits, all start again at the same virtual time.

A charge runs ahead of the service: requests that hold all slots of a slow engine are charged at once and served for
minutes. Who may take a place from whom is decided by what each has had so far, and by the charges of the one who takes.

The scheduler uses it twice: for the priorities, and for the tenants within each priority.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Generic, NamedTuple, TypeVar

# A request without any tokens (a refused one, say) is charged this much: an endless row of them must not keep the
# others out.
LEAST_COST = 1.0
_FIRST_ESTIMATE = 64.0
_SMOOTHING = 0.2
# Accounts that could be closed are looked for when there are so many, and then when their number has doubled.
_SWEEP_FROM = 64
_IDLE = math.inf
_IN_TURN = -math.inf

K = TypeVar("K", bound=Hashable)


def _smoothed(mean: float | None, value: float) -> float:
    return value if mean is None else mean + _SMOOTHING * (value - mean)


@dataclass(slots=True)
class _Account:
    """What one has used.

    Attributes:
        share: of the service; only the ratio to the others' shares counts.
        virtual_time: the service it was charged, divided by its share.
        joined_at: the virtual time at which it joined, `_IN_TURN` once it has been served, and `_IDLE` while nothing of
            it waits.
        mean_cost: of its latest requests, in weighted tokens; None until one has ended.
        running: how many of its charges are estimates.
        had: the service that it had so far, divided by its share. Who returns has had as much as the one of those that
            run or wait who has had the least.
    """

    share: float
    virtual_time: float = 0.0
    joined_at: float = _IDLE
    mean_cost: float | None = None
    running: int = 0
    had: float = 0.0

    @property
    def takes_part(self) -> bool:
        """Whether a request of it runs or waits."""
        return self.running > 0 or self.joined_at != _IDLE

    def may_close(self, present: float) -> bool:
        """Whether a new account would begin at the same virtual time: it is idle and owes nothing."""
        return self.joined_at == _IDLE and not self.running and self.virtual_time <= present


class _Charge(NamedTuple, Generic[K]):
    """Of a request that runs: the estimate, and the service that it had so far, in weighted tokens."""

    key: K
    estimate: float
    had: float = 0.0


@dataclass(slots=True)
class Fair(Generic[K]):
    """The accounts of those who share a service. One writer: the scheduler.

    Args:
        share: the share of each; it is asked once, when an account is opened.
        lasting: whether idle accounts are kept. Else those that owe nothing are closed, so that names which come and go
            take no memory.
    """

    share: Callable[[K], float]
    lasting: bool = True
    _accounts: dict[K, _Account] = field(init=False, default_factory=dict)
    _charged: dict[str, _Charge[K]] = field(init=False, default_factory=dict)
    _mean_cost: float | None = field(init=False, default=None)
    _virtual_now: float = field(init=False, default=0.0)
    _had_now: float = field(init=False, default=0.0)
    _sweep_at: int = field(init=False, default=_SWEEP_FROM)

    def __len__(self) -> int:
        return len(self._accounts)

    def trial(self) -> Fair[K]:
        """A copy to try on what would follow: it shares nothing that changes."""
        copy = Fair(self.share, self.lasting)
        copy._accounts = {key: replace(account) for key, account in self._accounts.items()}
        copy._charged = self._charged.copy()
        copy._mean_cost, copy._virtual_now, copy._had_now = self._mean_cost, self._virtual_now, self._had_now
        return copy

    # ---- who takes part

    def joins(self, key: K) -> None:
        """Record that it may have a request that waits. Twice is harmless."""
        account = self._account(key)
        if account.joined_at == _IDLE:
            if not account.running:
                others = [other.had for other in self._accounts.values() if other.takes_part]
                account.had = max(account.had, min(others, default=self._had_now))
            account.joined_at = self._present()

    def leaves(self, key: K) -> None:
        """Record that nothing of it waits. Twice is harmless."""
        if (account := self._accounts.get(key)) is not None:
            account.joined_at = _IDLE
            self._close(key, account)
            self._begin_anew()

    def start_tag(self, key: K) -> float:
        """The virtual time at which its next request would start: the lowest goes first.

        Who waits for a first turn moves down with the others where they cost less than was thought.
        """
        return self.start_tags([key])[key]

    def start_tags(self, keys: list[K]) -> dict[K, float]:
        """The same for several."""
        present, accounts = self._present(), self._accounts
        found = {}
        for key in keys:
            account = accounts.get(key)
            found[key] = present if account is None else max(account.virtual_time, min(account.joined_at, present))
        return found

    def may_overtake(self, key: K, victim: K) -> bool:
        """Whether its next request may take the place of one of the victim's that runs.

        It may if, with all that it was charged, it has had less than the victim will have had after one more request.
        """
        account, other = self._account(key), self._account(victim)
        charged = sum(max(0.0, each.estimate - each.had) for each in self._charged.values() if each.key == key)
        return account.had + charged / account.share < other.had + self._estimate(other) / other.share

    # ---- what is used

    def start(self, request_id: str, key: K) -> None:
        """Charge an estimate for a request that starts."""
        account = self._account(key)
        self._virtual_now = self.start_tag(key)
        estimate = self._estimate(account)
        account.virtual_time = self._virtual_now + estimate / account.share
        account.joined_at = _IN_TURN
        self._drop_charge(request_id)
        account.running += 1
        self._charged[request_id] = _Charge(key, estimate)

    def progress(self, request_id: str, cost: float) -> None:
        """A request that runs has cost this much so far, in weighted tokens. Ids that are not charged are ignored."""
        if (charge := self._charged.get(request_id)) is not None:
            account = self._account(charge.key)
            account.had += (cost - charge.had) / account.share
            self._charged[request_id] = charge._replace(had=cost)

    def finish(self, request_id: str, cost: float) -> None:
        """Correct the charge of a request that ended to its real cost, in weighted tokens, `LEAST_COST` at least.

        Ids that are not charged are ignored.
        """
        cost = max(cost, LEAST_COST)
        self.progress(request_id, cost)
        if (charge := self._drop_charge(request_id)) is None:
            return
        key, account = charge.key, self._account(charge.key)
        account.virtual_time += (cost - charge.estimate) / account.share
        account.mean_cost = _smoothed(account.mean_cost, cost)
        self._mean_cost = _smoothed(self._mean_cost, cost)
        self._close(key, account)
        self._begin_anew()

    def used(self, key: K, cost: float) -> None:
        """Charge what it used elsewhere, in weighted tokens. It is owed nothing for the time before it joined."""
        account = self._account(key)
        account.virtual_time = max(account.virtual_time, min(account.joined_at, self._present())) + cost / account.share
        if account.joined_at != _IDLE:
            account.joined_at = _IN_TURN
        self._close(key, account)
        self._begin_anew()

    # ---- inside

    def _account(self, key: K) -> _Account:
        if (account := self._accounts.get(key)) is None:
            if not self.lasting and len(self._accounts) >= self._sweep_at:
                self._sweep()
            account = self._accounts[key] = _Account(self.share(key))
        return account

    def _sweep(self) -> None:
        present = self._present()
        self._accounts = {key: each for key, each in self._accounts.items() if not each.may_close(present)}
        self._sweep_at = max(_SWEEP_FROM, 2 * len(self._accounts))

    def _drop_charge(self, request_id: str) -> _Charge[K] | None:
        if (charge := self._charged.pop(request_id, None)) is not None:
            self._account(charge.key).running -= 1
        return charge

    def _estimate(self, account: _Account) -> float:
        """The estimated cost of its next request: as its latest ones, or else as the latest of all."""
        known = account.mean_cost if account.mean_cost is not None else self._mean_cost
        return _FIRST_ESTIMATE if known is None else known

    def _present(self) -> float:
        """The virtual time of the one furthest behind among those in turn; of the last start if none is."""
        in_turn = [account.virtual_time for account in self._accounts.values() if account.joined_at == _IN_TURN]
        return min(in_turn, default=self._virtual_now)

    def _close(self, key: K, account: _Account) -> None:
        if not self.lasting and account.may_close(self._present()):
            self._accounts.pop(key, None)

    def _begin_anew(self) -> None:
        """Put all at the same virtual time when nothing runs and nothing waits."""
        if not self._charged and all(account.joined_at == _IDLE for account in self._accounts.values()):
            accounts = self._accounts.values()
            self._virtual_now = max((account.virtual_time for account in accounts), default=self._virtual_now)
            self._had_now = max((account.had for account in accounts), default=self._had_now)
            if not self.lasting:
                self._accounts.clear()
