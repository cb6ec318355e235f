"""What is known about the lanes, and which ones the scheduler would choose next, without charging them."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from pipeline.core.fair import Fair
from pipeline.wire.subjects import Lane, Priority, Task

EVEN = {Task.UNTRIAGED: 1.0, Task.SIMPLE: 1.0, Task.COMPLEX: 1.0}
PREFER_COMPLEX = {Task.UNTRIAGED: 2.0, Task.SIMPLE: 1.0, Task.COMPLEX: 4.0}
# While requests of a priority wait beyond the bound, every fourth choice goes to that priority.
OVERDUE_EVERY = 4

# By priority and tenant: the lanes that may hold a request.
OpenLanes = Mapping[Priority, Mapping[str, Collection[Lane]]]


@dataclass(slots=True)
class LaneState:
    """What is known of one lane.

    Attributes:
        siblings: the lanes of the same priority and tenant, itself included.
        announced: the sequence of the newest request that was announced there.
        waiting: the sequences of the requests that were announced and have not been taken, as far as is known here.
        taken: the highest sequence that was taken from it.
        credit: of the round robin among its siblings.
        empty_since: when it was found empty, monotonic seconds; None if it may hold a request.
        asked_from, asked_until: when it is asked again although it was empty, monotonic seconds.
        paused: whether an operator has paused it.
    """

    siblings: tuple[Lane, ...]
    announced: int = 0
    waiting: deque[int] = field(default_factory=deque)
    taken: int = 0
    credit: float = 0.0
    empty_since: float | None = None
    asked_from: float = 0.0
    asked_until: float = 0.0
    paused: bool = False

    def oldest(self, after: int = 0) -> int:
        """The sequence of its oldest request after so many; where it is not known, the lowest that it can have."""
        if len(self.waiting) > after:
            return self.waiting[after]
        return (self.waiting[-1] if self.waiting else self.taken) + 1

    def was_taken(self, sequence: int) -> None:
        """The request of a sequence was the first of the lane: no older one waits there."""
        self.taken = max(self.taken, sequence)
        while self.waiting and self.waiting[0] <= sequence:
            self.waiting.popleft()


def turns_taken(lane: Lane, rivals: Iterable[Lane], weights: Mapping[Task, float]) -> dict[Lane, float]:
    """How the credits of the lanes of one priority and tenant change when one of them is chosen.

    It is smooth weighted round robin.
    """
    changes = {rival: weights[rival.task] for rival in rivals}
    changes[lane] -= sum(changes.values())
    return changes


@dataclass(slots=True)
class Planning:
    """Chooses lanes as the scheduler would, each as if it had enough requests. Changes nothing outside.

    Args:
        states: of the lanes.
        open_lanes: those that may hold a request.
        due: those that were empty and are asked again; each gives one request.
        allowed: only these are chosen.
        priorities, tenants: the accounts.
        lifts: whether the priority that has waited beyond the bound goes first, after so many choices of others.
        choices: how many there were since it did.
        saturated: whether the engine is.
    """

    states: Mapping[Lane, LaneState]
    open_lanes: OpenLanes
    due: Iterable[Lane]
    allowed: Collection[Lane]
    priorities: Fair[Priority]
    tenants: Mapping[Priority, Fair[str]]
    lifts: Callable[[int], Priority | None]
    choices: int
    saturated: bool
    _again: dict[Priority, list[Lane]] = field(init=False, default_factory=dict)
    _accounts: dict[Priority, Fair[str]] = field(init=False, default_factory=dict)
    # By priority: (start tag, oldest request, tenant) of the tenants with a lane that may be chosen. Start tags only
    # rise, so an entry that is out of date is not too far behind.
    _order: dict[Priority, list[tuple[float, int, str]]] = field(init=False, default_factory=dict)
    _taken: dict[Lane, int] = field(init=False, default_factory=dict)
    _credit: dict[Lane, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.priorities = self.priorities.trial()
        for lane in self.due:
            if lane in self.allowed:
                self._again.setdefault(lane.priority, []).append(lane)
        for priority, by_tenant in self.open_lanes.items():
            tenants = [tenant for tenant, lanes in by_tenant.items() if any(lane in self.allowed for lane in lanes)]
            if tenants:
                tags = self._fair(priority).start_tags(tenants)
                self._order[priority] = [(tags[tenant], self._oldest(priority, tenant), tenant) for tenant in tenants]
                heapq.heapify(self._order[priority])
        for priority, lanes in self._again.items():
            tags = self._fair(priority).start_tags([lane.tenant for lane in lanes])
            lanes.sort(key=lambda lane: (tags[lane.tenant], self.states[lane].oldest()), reverse=True)

    def next(self) -> Lane | None:
        """The next lane; None if none is left."""
        lifted = self.lifts(self.choices)
        priority, known = self._priority(lifted)
        if priority is None:
            return None
        lane = self._of_open(priority) if known else self._again[priority].pop()
        self.choices = 0 if priority is lifted else self.choices + 1
        self._charge(lane, lifted=priority is lifted)
        if not known:
            self._emptied(lane)
        return lane

    def _priority(self, lifted: Priority | None) -> tuple[Priority | None, bool]:
        groups = [(p, False) for p, lanes in self._again.items() if lanes] + [(p, True) for p in self._order]
        if not groups:
            return None, False
        tags, share = self.priorities.start_tags([priority for priority, _ in groups]), self.priorities.share
        return min(groups, key=lambda group: (group[0] is not lifted, tags[group[0]], group[1], -share(group[0])))

    def _of_open(self, priority: Priority) -> Lane:
        order, fair = self._order[priority], self._fair(priority)
        while True:
            tag, oldest, tenant = order[0]
            now = (fair.start_tag(tenant), self._oldest(priority, tenant), tenant)
            if now <= (tag, oldest, tenant):
                break
            heapq.heapreplace(order, now)
        lanes = [lane for lane in self.open_lanes[priority][tenant] if lane in self.allowed]
        return lanes[0] if len(lanes) == 1 else min(lanes, key=self._rank)

    def _rank(self, lane: Lane) -> tuple[int, float]:
        weights = PREFER_COMPLEX if self.saturated else EVEN
        credit = self._credit.get(lane, self.states[lane].credit) + weights[lane.task]
        return 0 if self.saturated else self._oldest_of(lane), -credit

    def _oldest(self, priority: Priority, tenant: str) -> int:
        return min(map(self._oldest_of, self.open_lanes[priority][tenant]))

    def _oldest_of(self, lane: Lane) -> int:
        return self.states[lane].oldest(self._taken.get(lane, 0))

    def _fair(self, priority: Priority) -> Fair[str]:
        if (fair := self._accounts.get(priority)) is None:
            fair = self._accounts[priority] = self.tenants[priority].trial()
        return fair

    def _charge(self, lane: Lane, *, lifted: bool) -> None:
        request_id = f"planned {lane.consumer} {self._taken.get(lane, 0)}"
        rivals = [*self.open_lanes.get(lane.priority, {}).get(lane.tenant, ())]
        rivals += [] if lane in rivals else [lane]
        if len(rivals) > 1:
            for rival, change in turns_taken(lane, rivals, PREFER_COMPLEX if self.saturated else EVEN).items():
                self._credit[rival] = self._credit.get(rival, self.states[rival].credit) + change
        self._taken[lane] = self._taken.get(lane, 0) + 1
        self._fair(lane.priority).start(request_id, lane.tenant)
        if not lifted:
            self.priorities.start(request_id, lane.priority)

    def _emptied(self, lane: Lane) -> None:
        """A lane that was empty and gave one is taken to be empty again."""
        priority, tenant = lane.priority, lane.tenant
        if not self.open_lanes.get(priority, {}).get(tenant):
            self._fair(priority).leaves(tenant)
        if not self.open_lanes.get(priority):
            self.priorities.leaves(priority)
