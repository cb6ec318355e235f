"""Which lane is served next: weighted shares of service, with a floor and a bound on waiting.

`pipeline.core.fair` shares the service by tokens: among the priorities by their weights, and within each priority among
the tenants who have requests there, equally. The default tenant is one tenant.

A request that has waited beyond the bound is started out of turn and its priority is not charged: it keeps its floor,
and the virtual time is that of the priorities that take turns. Its tenant is charged.

Among the lanes of one tenant and priority (untriaged, simple, complex) the oldest request goes first, as far as the
announcements of stored requests tell; without them the lanes take turns. A saturated engine prefers requests that only
it can answer, by a smooth weighted round robin and not strictly, so that simple requests are served even if the second
engine is absent.

A lane that was empty is asked again after a time, because a request that was returned is not announced again. A lane of
a named tenant is asked again only where a request was returned: there may be many, and `arrived` tells of the rest.

A lane that an operator has paused counts as empty until it is resumed: it is not asked, its priority and its tenant
save up nothing, and its requests do not count for the rule of the longest wait.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.core.fair import Fair
from pipeline.core.planning import EVEN, OVERDUE_EVERY, PREFER_COMPLEX, LaneState, Planning, turns_taken
from pipeline.wire.subjects import LANES, Lane, Priority, Task

# A lane that was empty is asked again after this long even if no request was announced: a request that was returned, or
# whose worker died, is not announced again.
RECHECK_S = 0.5
# A lane of a tenant is asked again for this long after a request of it could be delivered again. That one still waits
# there is seen by looking at the consumers, more often than this.
RETURNED_S = 5.0
# And for this long after one was announced: the broker may announce it before it delivers it, and the process that
# takes it may return it at once.
ANNOUNCED_S = 1.0
# A process that has returned a request lets others have it for this long: they may be able to serve it.
OTHERS_FIRST_S = 0.2
# So many announced requests of a lane are remembered. The order of arrival is a guess beyond them.
_MOST_REMEMBERED = 10_000


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


@dataclass(slots=True)
class Scheduler:
    """Chooses the next lane. One writer: the pull loop of one process.

    Args:
        weights, floor_share, max_wait_s: the settings.
        lanes: those that it chooses from at the start.
        paused: whether a lane is paused. `recheck` is called when the answer may have changed.
    """

    weights: Mapping[Priority, float]
    floor_share: float = 0.05
    max_wait_s: float = 600.0
    lanes: Sequence[Lane] = LANES
    paused: Callable[[Lane], bool] = lambda _: False
    _lanes: dict[Lane, LaneState] = field(init=False, default_factory=dict)
    # The lanes that may hold a request, by priority and tenant, and of the others those that are asked again.
    _open: dict[Priority, dict[str, dict[Lane, None]]] = field(init=False, default_factory=dict)
    _asked: dict[Lane, None] = field(init=False, default_factory=dict)
    _priorities: Fair[Priority] = field(init=False)
    _tenants: dict[Priority, Fair[str]] = field(init=False)
    # About when the oldest waiting request of a priority and a tenant was stored (the broker's UTC).
    _heads: dict[Priority, dict[str, float]] = field(init=False)
    _choices_since_overdue: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._priorities = Fair(shares(self.weights, self.floor_share).__getitem__)
        self._tenants = {priority: Fair(lambda _: 1.0, lasting=False) for priority in self.weights}
        self._heads = {priority: {} for priority in self.weights}
        for lane in self.lanes:
            self.add(lane)

    # ---- which lanes there are

    def add(self, lane: Lane) -> None:
        """Choose from a lane as well. It may hold a request. Twice is harmless."""
        if lane not in self._lanes:
            self._lanes[lane] = LaneState(tuple(lane._replace(task=task) for task in Task))
            self._opened(lane)

    def remove(self, lane: Lane) -> None:
        """Choose from a lane no longer."""
        if lane in self._lanes:
            self._closed(lane)
            self._asked.pop(lane, None)
            del self._lanes[lane]

    def __contains__(self, lane: Lane) -> bool:
        return lane in self._lanes

    # ---- choosing

    def order(self, now: float, *, wall_now: float, saturated: bool = False) -> list[Lane]:
        """The lanes that may hold a request, the one to ask first in front. Changes nothing.

        Args:
            now: monotonic seconds, as in `empty`.
            wall_now: the broker's UTC seconds, as `stored_at` in `start`.
            saturated: whether the engine is.
        """
        return list(self.choices(now, wall_now=wall_now, saturated=saturated))

    def choices(self, now: float, *, wall_now: float, saturated: bool = False) -> Iterator[Lane]:
        """As `order`, one after another: the order of those that are not asked for is not worked out."""
        again: dict[Priority, dict[str, list[Lane]]] = {}
        for lane in self._due(now):
            again.setdefault(lane.priority, {}).setdefault(lane.tenant, []).append(lane)
        # By priority and whether the lanes may hold a request as far as is known.
        groups = [(priority, True) for priority in self._open] + [(priority, False) for priority in again]
        lifted, share = self._lifted(wall_now, self._choices_since_overdue), self._priorities.share
        tags = self._priorities.start_tags(list(self.weights))

        def rank(group: tuple[Priority, bool]) -> tuple[bool, float, bool, float]:
            priority, known = group
            # A lane whose turn it is to be asked again goes first: behind a lane that always has work, it would not be.
            return priority is not lifted, tags[priority], known, -share(priority)

        for priority, known in sorted(groups, key=rank):
            lanes = self._open.get(priority, {}) if known else again[priority]
            yield from self._by_tenant(priority, {t: list(found) for t, found in lanes.items()}, saturated=saturated)

    def _by_tenant(self, priority: Priority, lanes: Mapping[str, list[Lane]], *, saturated: bool) -> Iterator[Lane]:
        tags = self._tenants[priority].start_tags(list(lanes))

        def rank(tenant: str) -> tuple[float, int]:
            return tags[tenant], min(self._lanes[lane].oldest() for lane in lanes[tenant])

        weights = PREFER_COMPLEX if saturated else EVEN

        def lane_rank(lane: Lane) -> tuple[int, float]:
            state = self._lanes[lane]
            return 0 if saturated else state.oldest(), -(state.credit + weights[lane.task])

        if not lanes:
            return
        # Most often one is enough.
        first = min(lanes, key=rank)
        yield from sorted(lanes[first], key=lane_rank)
        # What was found empty meanwhile is still there: `empty` is called between two choices.
        for tenant in sorted((tenant for tenant in lanes if tenant != first), key=lambda one: tags[one]):
            yield from sorted((lane for lane in lanes[tenant] if lane in self._lanes), key=lane_rank)

    def plan(
        self, count: int, lanes: Iterable[Lane], now: float, *, wall_now: float, saturated: bool = False
    ) -> Counter[Lane]:
        """How many of the next count requests each lane gives, as if each had enough of them. Changes nothing.

        A lane that was empty and is asked again gives one.

        Args:
            count: how many requests are to be taken at once.
            lanes: only these.
            now, wall_now, saturated: as in `order`.
        """
        planning = Planning(
            self._lanes,
            self._open,
            self._due(now),
            set(lanes),
            self._priorities,
            self._tenants,
            lambda choices: self._lifted(wall_now, choices),
            self._choices_since_overdue,
            saturated,
        )
        planned = Counter[Lane]()
        while planned.total() < count and (lane := planning.next()) is not None:
            planned[lane] += 1
        return planned

    def may_preempt(self, priority: Priority, victim: Priority) -> bool:
        """Whether the next request of a priority may take the place of one of the victim's priority.

        It may as long as the service that its priority has had does not exceed its share by more than one request of
        the victim's. So a few requests always may, and an endless row of them only until its share is used.
        """
        return self._priorities.may_overtake(priority, victim)

    # ---- what happens

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
        is_lifted = lane.priority is self._lifted(wall_now, self._choices_since_overdue)
        self._choices_since_overdue = 0 if is_lifted else self._choices_since_overdue + 1
        self.add(lane)
        self._take_turn(lane, PREFER_COMPLEX if saturated else EVEN)
        self.arrived(lane)
        if sequence is not None:
            self._lanes[lane].was_taken(sequence)
        if stored_at is None:
            self._heads[lane.priority].pop(lane.tenant, None)
        else:
            self._heads[lane.priority][lane.tenant] = stored_at
        self._tenants[lane.priority].start(request_id, lane.tenant)
        if not is_lifted:
            self._priorities.start(request_id, lane.priority)
        if not pending:
            self.empty(lane, now, announced=sequence)
        if self._lanes[lane].paused:
            # An attempt had begun it, so it goes on. The lane still counts as empty.
            self._rests(lane)

    def progress(self, request_id: str, cost: float) -> None:
        """Record what a request that runs has cost so far, in weighted tokens. Unknown ids are ignored."""
        self._priorities.progress(request_id, cost)

    def finish(self, request_id: str, cost: float) -> None:
        """Correct the charges of a request that ended to its real cost, in weighted tokens. Unknown ids are ignored."""
        self._priorities.finish(request_id, cost)
        for fair in self._tenants.values():
            fair.finish(request_id, cost)

    def used(self, priority: Priority, tenant: str, cost: float) -> None:
        """Charge a tenant what it used in another process, in weighted tokens."""
        self._tenants[priority].used(tenant, cost)

    def empty(self, lane: Lane, now: float, *, announced: int | None = None) -> None:
        """Record that lane was found empty at now.

        Args:
            lane: the lane.
            now: monotonic seconds.
            announced: `announced` of the lane when it was asked. A request that was announced since then came too late
                for the answer, and the lane is not empty.
        """
        state = self._lanes.get(lane)
        if state is None or (announced is not None and state.announced > announced):
            return
        state.empty_since = now
        state.waiting.clear()
        self._closed(lane)
        if state.paused or (lane.tenant and now >= state.asked_until):
            self._asked.pop(lane, None)
        else:
            self._asked[lane] = None

    def announced(self, lane: Lane) -> int:
        """The stream sequence of the newest request announced for lane, 0 if there was none."""
        return self._lanes[lane].announced if lane in self._lanes else 0

    def recheck(self, now: float) -> None:
        """Record which lanes are paused from now (monotonic seconds) on."""
        for lane, state in self._lanes.items():
            if not self.paused(lane):
                if state.paused:
                    state.paused = False
                    self.arrived(lane)
            elif not state.paused:
                state.paused = True
                self.empty(lane, now)

    def arrived(self, lane: Lane, sequence: int = 0) -> None:
        """Record that lane holds a request; sequence is the request's if it was announced."""
        state = self._lanes[lane]
        if sequence > state.announced:
            state.announced = sequence
            if len(state.waiting) < _MOST_REMEMBERED:
                state.waiting.append(sequence)
        if not state.paused:
            self._opened(lane)

    def returned(self, lane: Lane, now: float, for_s: float = RETURNED_S) -> None:
        """Record that a request of lane may be delivered at any time from now (monotonic seconds) on.

        So the lane is asked again for some seconds even if it is found empty.
        """
        if lane in self._lanes:
            self._asked_again(lane, now, now + for_s)
            self.arrived(lane)

    def gave_back(self, lane: Lane, now: float, delay_s: float) -> None:
        """As `returned`, by this process, at now; it is delivered again after delay_s, and others may have it first."""
        if (state := self._lanes.get(lane)) is not None:
            self._asked_again(lane, now + OTHERS_FIRST_S, now + max(delay_s, OTHERS_FIRST_S) + RETURNED_S)
            if state.empty_since is not None and not state.paused:
                self._asked[lane] = None

    def _asked_again(self, lane: Lane, first: float, last: float) -> None:
        state = self._lanes[lane]
        state.asked_from, state.asked_until = first, max(state.asked_until, last)

    def asked_again(self, now: float) -> list[Lane]:
        """The lanes of named tenants that were found empty, and may hold a request again at any time."""
        tenants = [(lane, self._lanes[lane]) for lane in self._asked if lane.tenant]
        for lane, state in tenants:
            if now >= state.asked_until:
                del self._asked[lane]
        return [lane for lane, state in tenants if state.asked_from <= now < state.asked_until]

    def asked_again_in(self, now: float) -> float | None:
        """In how many seconds there are more of these; None if that is not known."""
        coming = [state.asked_from - now for lane in self._asked if (state := self._lanes[lane]).asked_from > now]
        return min(coming, default=None)

    def forget(self) -> None:
        """Forget which lanes were empty, as after a reconnect: every priority may have work, and joins."""
        for lane, state in self._lanes.items():
            if not state.paused:
                self._opened(lane)

    # ---- inside

    def _opened(self, lane: Lane) -> None:
        """The lane may hold a request, and its priority and tenant take part."""
        self._lanes[lane].empty_since = None
        self._asked.pop(lane, None)
        of_tenant = self._open.setdefault(lane.priority, {}).setdefault(lane.tenant, {})
        if lane not in of_tenant:
            of_tenant[lane] = None
            self._priorities.joins(lane.priority)
            self._tenants[lane.priority].joins(lane.tenant)

    def _closed(self, lane: Lane) -> None:
        """The lane holds no request."""
        of_priority = self._open.get(lane.priority, {})
        of_tenant = of_priority.get(lane.tenant, {})
        if lane not in of_tenant:
            return
        del of_tenant[lane]
        if not of_tenant:
            del of_priority[lane.tenant]
        if not of_priority:
            del self._open[lane.priority]
        self._rests(lane)

    def _rests(self, lane: Lane) -> None:
        """The tenant and the priority of a lane take no part if no lane of theirs may hold a request."""
        of_priority = self._open.get(lane.priority, {})
        if lane.tenant not in of_priority:
            self._heads[lane.priority].pop(lane.tenant, None)
            self._tenants[lane.priority].leaves(lane.tenant)
        if not of_priority:
            self._priorities.leaves(lane.priority)

    def _due(self, now: float) -> list[Lane]:
        """The lanes that were empty and are to be asked again."""
        return [
            lane
            for lane in self._asked
            if (since := (state := self._lanes[lane]).empty_since) is not None
            and now - since >= RECHECK_S
            and now >= state.asked_from
        ]

    def _lifted(self, wall_now: float, choices: int) -> Priority | None:
        """The priority that goes first because its requests have waited beyond the bound, or None.

        Choices is how many there were since one went first for that reason.
        """
        if choices + 1 < OVERDUE_EVERY:
            return None
        heads = {priority: min(known.values()) for priority, known in self._heads.items() if known}
        oldest = min(heads, key=lambda p: heads[p], default=None)
        return oldest if oldest is not None and wall_now - heads[oldest] > self.max_wait_s else None

    def _take_turn(self, lane: Lane, task_weights: Mapping[Task, float]) -> None:
        """Smooth weighted round robin among the lanes of one priority and tenant that are not known to be empty."""
        of_tenant = self._open.get(lane.priority, {}).get(lane.tenant, {})
        rivals = [each for each in self._lanes[lane].siblings if each == lane or each in of_tenant]
        if len(rivals) > 1:
            for rival, change in turns_taken(lane, rivals, task_weights).items():
                self._lanes[rival].credit += change
