"""Which lane is served next: weighted shares of service, with a floor and a bound on waiting.

Start-time fair queueing (Goyal, Vin, Cheng, 1996) over priorities: each has a virtual time that advances by the
service it used divided by its share, and the priority furthest behind goes first. Service is counted in tokens, not
requests, so a lane of long answers does not take more than its share. A request is charged an estimate when it starts,
so that slots which become free together are shared as well, and its real cost when it ends. A priority that was idle
returns at the present virtual time, that of the priority furthest behind among those that take turns: it has saved up
nothing. When nothing runs and nothing waits, all start again at the same virtual time.

A request that has waited beyond the bound is started out of turn and not charged: its priority keeps its floor, and the
virtual time is that of the priorities that take turns.

Among the lanes of one priority (untriaged, simple, complex, and the same of tenants) the oldest request goes first, as
far as the announcements of stored requests tell; without them the lanes take turns. A saturated engine prefers requests
that only it can answer, by a smooth weighted round robin and not strictly, so that simple requests are served even if
the second engine is absent.

A lane that an operator has paused counts as empty until it is resumed: it is not asked, its priority saves up nothing,
and its requests do not count for the rule of the longest wait.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from pipeline.wire.subjects import LANES, Lane, Priority, Task

EVEN = {Task.UNTRIAGED: 1.0, Task.SIMPLE: 1.0, Task.COMPLEX: 1.0}
PREFER_COMPLEX = {Task.UNTRIAGED: 2.0, Task.SIMPLE: 1.0, Task.COMPLEX: 4.0}

# A lane that was empty is asked again after this long even if no request was announced: a request that was returned, or
# whose worker died, is not announced again.
RECHECK_S = 0.5
# The same for a lane of tenants that was never seen to hold a request. A broker without tenants is asked less often.
RECHECK_UNSEEN_S = 5.0
# While requests of a priority wait beyond the bound, every fourth choice goes to that priority.
OVERDUE_EVERY = 4
# So many announced requests of a lane are remembered. The order of arrival is a guess beyond them.
_MOST_REMEMBERED = 10_000
# A request without any tokens (a refused one, say) is charged this much: an endless row of them must not keep the other
# priorities out.
LEAST_COST = 1.0
_FIRST_ESTIMATE = 64.0
_SMOOTHING = 0.2
_IDLE = math.inf
_IN_TURN = -math.inf


def shares(weights: Mapping[Priority, float], floor: float) -> dict[Priority, float]:
    """Each priority's share of the service, adding up to 1; none below floor (at most 1 / len(weights))."""
    floor = min(floor, 1 / len(weights))
    lifted: set[Priority] = set()
    while True:
        rest = 1 - floor * len(lifted)
        total = sum(weight for priority, weight in weights.items() if priority not in lifted)
        result = {p: floor if p in lifted else rest * w / total for p, w in weights.items()}
        below = {p for p, share in result.items() if share < floor * (1 - 1e-9)}
        if not below:
            return result
        lifted |= below


def _smoothed(mean: float | None, value: float) -> float:
    return value if mean is None else mean + _SMOOTHING * (value - mean)


@dataclass(slots=True)
class _Account:
    """The account of one priority.

    Attributes:
        share: of the service, 0 to 1.
        virtual_time: the service it was charged, divided by its share.
        joined_at: the virtual time at which it joined, `_IN_TURN` once it has been served, and `_IDLE` if all its lanes
            were found empty. A priority that has not been asked yet has joined: its lanes may hold requests.
        mean_cost: of its latest requests, in weighted tokens; None until one has ended.
        head_stored_at: about when its oldest waiting request was stored (the broker's UTC).
    """

    share: float
    virtual_time: float = 0.0
    joined_at: float = 0.0
    mean_cost: float | None = None
    head_stored_at: float | None = None


@dataclass(slots=True)
class Scheduler:
    """Chooses the next lane. One writer: the pull loop of one process.

    Args:
        weights, floor_share, max_wait_s: the settings.
        lanes: those that it chooses from.
        paused: whether a lane is paused. `recheck` is called when the answer may have changed.
    """

    weights: Mapping[Priority, float]
    floor_share: float = 0.05
    max_wait_s: float = 600.0
    lanes: Sequence[Lane] = LANES
    paused: Callable[[Lane], bool] = lambda _: False
    _paused: set[Lane] = field(init=False, default_factory=set)
    _accounts: dict[Priority, _Account] = field(init=False)
    _empty_since: dict[Lane, float] = field(init=False, default_factory=dict)
    _announced: dict[Lane, int] = field(init=False, default_factory=dict)
    _seen: set[Lane] = field(init=False, default_factory=set)
    # The sequences of the requests that were announced in each lane and have not been taken, as far as is known here.
    _waiting: dict[Lane, deque[int]] = field(init=False)
    _taken: dict[Lane, int] = field(init=False)
    _credit: dict[Lane, float] = field(init=False)
    _charged: dict[str, tuple[Priority, float]] = field(init=False, default_factory=dict)
    _mean_cost: float | None = field(init=False, default=None)
    _virtual_now: float = field(init=False, default=0.0)
    _choices_since_overdue: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._accounts = {p: _Account(share) for p, share in shares(self.weights, self.floor_share).items()}
        self._credit = dict.fromkeys(self.lanes, 0.0)
        self._waiting = {lane: deque() for lane in self.lanes}
        self._taken = dict.fromkeys(self.lanes, 0)

    def order(self, now: float, *, wall_now: float, saturated: bool = False) -> list[Lane]:
        """The lanes that may hold a request, the one to ask first in front. Changes nothing.

        Args:
            now: monotonic seconds, as in `empty`.
            wall_now: the broker's UTC seconds, as `stored_at` in `start`.
            saturated: whether the engine is.
        """
        lifted = self._lifted(wall_now)
        task_weights = PREFER_COMPLEX if saturated else EVEN

        def rank(lane: Lane) -> tuple[bool, float, bool, float, int, float]:
            share = self._accounts[lane.priority].share
            oldest = 0 if saturated else self._oldest(lane)
            credit = self._credit[lane] + task_weights[lane.task]
            # A lane whose turn it is to be asked again goes first: behind a lane that always has work, it would not be.
            known = lane not in self._empty_since
            return lane.priority is not lifted, self._start_tag(lane.priority), known, -share, oldest, -credit

        return sorted((lane for lane in self.lanes if self._may_hold_work(lane, now)), key=rank)

    def plan(
        self, count: int, lanes: Sequence[Lane], now: float, *, wall_now: float, saturated: bool = False
    ) -> Counter[Lane]:
        """How many of the next count requests each lane gives, as if each had enough of them. Changes nothing.

        A lane that was empty and is asked again gives one.

        Args:
            count: how many requests are to be taken at once.
            lanes: only these.
            now, wall_now, saturated: as in `order`.
        """
        planned = Counter[Lane]()
        with self._undone():
            for _ in range(count):
                order = self.order(now, wall_now=wall_now, saturated=saturated)
                lane = next((lane for lane in order if lane in lanes), None)
                if lane is None:
                    break
                planned[lane] += 1
                again, head = lane in self._empty_since, self._accounts[lane.priority].head_stored_at
                stored_at = wall_now if head is None else head
                self.start(
                    "",
                    lane,
                    stored_at=stored_at,
                    pending=1,
                    now=now,
                    wall_now=wall_now,
                    saturated=saturated,
                    sequence=self._oldest(lane),
                )
                if again:
                    self.empty(lane, now)
        return planned

    @contextmanager
    def _undone(self) -> Iterator[None]:
        """Undo at the end of the block what it changed."""
        accounts = {priority: replace(account) for priority, account in self._accounts.items()}
        empty_since, announced = dict(self._empty_since), dict(self._announced)
        credit, charged = dict(self._credit), dict(self._charged)
        waiting, taken = {lane: known.copy() for lane, known in self._waiting.items()}, dict(self._taken)
        seen = self._seen.copy()
        virtual_now, choices = self._virtual_now, self._choices_since_overdue
        try:
            yield
        finally:
            self._accounts, self._empty_since, self._announced = accounts, empty_since, announced
            self._credit, self._charged = credit, charged
            self._waiting, self._taken, self._seen = waiting, taken, seen
            self._virtual_now, self._choices_since_overdue = virtual_now, choices

    def may_preempt(self, priority: Priority, victim: Priority) -> bool:
        """Whether the next request of a priority may take the place of one of the victim's priority.

        It may if, in virtual time, it starts before the next request of the victim's priority ends. So a few requests
        always may, and an endless row of them only until its priority has used its share.
        """
        account = self._accounts[victim]
        return self._start_tag(priority) < account.virtual_time + self._estimate(account) / account.share

    def start(
        self,
        request_id: str,
        lane: Lane,
        *,
        stored_at: float | None,
        pending: int,
        now: float,
        wall_now: float,
        saturated: bool = False,
        sequence: int | None = None,
    ) -> None:
        """Record that a request, stored at stored_at (the broker's UTC), was taken from lane; pending more are left.

        Without stored_at it does not count for the rule of the longest wait.
        """
        is_lifted = lane.priority is self._lifted(wall_now)
        self._choices_since_overdue = 0 if is_lifted else self._choices_since_overdue + 1
        self._take_turn(lane, PREFER_COMPLEX if saturated else EVEN)
        self.arrived(lane)
        if sequence is not None:
            self._was_taken(lane, sequence)
        account = self._accounts[lane.priority]
        account.head_stored_at = stored_at
        if not is_lifted:
            self._virtual_now = self._start_tag(lane.priority)
            estimate = self._estimate(account)
            account.virtual_time = self._virtual_now + estimate / account.share
            account.joined_at = _IN_TURN
            self._charged[request_id] = (lane.priority, estimate)
        if not pending:
            self.empty(lane, now, announced=sequence)

    def finish(self, request_id: str, cost: float) -> None:
        """Correct the charge of a request that ended to its real cost, in weighted tokens, `LEAST_COST` at least.

        Ids that are not charged are ignored.
        """
        priority, estimate = self._charged.pop(request_id, (None, 0.0))
        if priority is None:
            return
        cost = max(cost, LEAST_COST)
        account = self._accounts[priority]
        account.virtual_time += (cost - estimate) / account.share
        account.mean_cost = _smoothed(account.mean_cost, cost)
        self._mean_cost = _smoothed(self._mean_cost, cost)
        self._begin_anew()

    def _estimate(self, account: _Account) -> float:
        """The estimated cost of a priority's next request: as its latest ones, or else as the latest of all."""
        known = account.mean_cost if account.mean_cost is not None else self._mean_cost
        return _FIRST_ESTIMATE if known is None else known

    def empty(self, lane: Lane, now: float, *, announced: int | None = None) -> None:
        """Record that lane was found empty at now.

        Args:
            lane: the lane.
            now: monotonic seconds.
            announced: `announced` of the lane when it was asked. A request that was announced since then came too late
                for the answer, and the lane is not empty.
        """
        if announced is not None and self.announced(lane) > announced:
            return
        self._empty_since[lane] = now
        self._waiting[lane].clear()
        if all(other in self._empty_since for other in self.lanes if other.priority is lane.priority):
            account = self._accounts[lane.priority]
            account.joined_at = _IDLE
            account.head_stored_at = None
            self._begin_anew()

    def announced(self, lane: Lane) -> int:
        """The stream sequence of the newest request announced for lane, 0 if there was none."""
        return self._announced.get(lane, 0)

    def recheck(self, now: float) -> None:
        """Record which lanes are paused from now (monotonic seconds) on."""
        for lane in self.lanes:
            if not self.paused(lane):
                if lane in self._paused:
                    self._paused.remove(lane)
                    self.arrived(lane)
            elif lane not in self._paused:
                self._paused.add(lane)
                self.empty(lane, now)

    def arrived(self, lane: Lane, sequence: int = 0) -> None:
        """Record that lane holds a request; sequence is the request's if it was announced."""
        if sequence > self.announced(lane):
            self._announced[lane] = sequence
            if len(self._waiting[lane]) < _MOST_REMEMBERED:
                self._waiting[lane].append(sequence)
        if lane in self._paused:
            return
        self._empty_since.pop(lane, None)
        self._seen.add(lane)
        account = self._accounts[lane.priority]
        if account.joined_at == _IDLE:
            account.joined_at = self._present()

    def forget(self) -> None:
        """Forget which lanes were empty, as after a reconnect: every priority may have work, and joins."""
        self._empty_since = {lane: since for lane, since in self._empty_since.items() if lane in self._paused}
        present = self._present()
        for priority in {lane.priority for lane in self.lanes if lane not in self._paused}:
            account = self._accounts[priority]
            if account.joined_at == _IDLE:
                account.joined_at = present

    def _may_hold_work(self, lane: Lane, now: float) -> bool:
        if lane in self._paused:
            return False
        since = self._empty_since.get(lane)
        pause_s = RECHECK_UNSEEN_S if lane.tenant and lane not in self._seen else RECHECK_S
        return since is None or now - since >= pause_s

    def _oldest(self, lane: Lane) -> int:
        """The sequence of a lane's oldest request; where it is not known, the lowest that it can have."""
        waiting = self._waiting[lane]
        return waiting[0] if waiting else self._taken[lane] + 1

    def _was_taken(self, lane: Lane, sequence: int) -> None:
        """The request of a sequence was the first of its lane: no older one waits there."""
        self._taken[lane] = max(self._taken[lane], sequence)
        waiting = self._waiting[lane]
        while waiting and waiting[0] <= sequence:
            waiting.popleft()

    def _start_tag(self, priority: Priority) -> float:
        """The virtual time at which the priority's next request would start.

        A priority that waits for its first turn moves down with the others where they cost less than was thought.
        """
        account = self._accounts[priority]
        return max(account.virtual_time, min(account.joined_at, self._present()))

    def _present(self) -> float:
        """The virtual time of the priority furthest behind among those in turn; of the last start if none is."""
        in_turn = [account.virtual_time for account in self._accounts.values() if account.joined_at == _IN_TURN]
        return min(in_turn, default=self._virtual_now)

    def _begin_anew(self) -> None:
        """Put all at the same virtual time when nothing runs and nothing waits."""
        if not self._charged and all(account.joined_at == _IDLE for account in self._accounts.values()):
            self._virtual_now = max(account.virtual_time for account in self._accounts.values())

    def _lifted(self, wall_now: float) -> Priority | None:
        """The priority that goes first because its requests have waited beyond the bound, or None."""
        if self._choices_since_overdue + 1 < OVERDUE_EVERY:
            return None
        heads = {p: a.head_stored_at for p, a in self._accounts.items() if a.head_stored_at is not None}
        oldest = min(heads, key=lambda p: heads[p], default=None)
        return oldest if oldest is not None and wall_now - heads[oldest] > self.max_wait_s else None

    def _take_turn(self, lane: Lane, task_weights: Mapping[Task, float]) -> None:
        """Smooth weighted round robin among the lanes of one priority that are not known to be empty."""
        rivals = [
            other
            for other in self.lanes
            if other == lane or (other.priority is lane.priority and other not in self._empty_since)
        ]
        for rival in rivals:
            self._credit[rival] += task_weights[rival.task]
        self._credit[lane] -= sum(task_weights[rival.task] for rival in rivals)
