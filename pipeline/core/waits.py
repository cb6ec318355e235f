"""How long a request waits for an engine: the capacity of its workers, and a simulation of the shares.

The lanes are taken as fluids, as in generalized processor sharing (Parekh, Gallager, 1993). Each lane that has work is
served at the engine's rate times its part of the shares of all lanes that have work, until one runs empty and the
others get its part. Work is measured in seconds of the whole engine; prompts are read at one rate, and answers are
written at another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.wire.messages import WorkerStatus
from pipeline.wire.subjects import Priority

# The predicted wait of an engine without a ready worker, which has no rate to predict from.
UNKNOWN_WAIT_S = 60.0
# The longest predicted wait. A rate near 0 would make it infinite, which JSON cannot express.
MAX_WAIT_S = 24 * 3600.0
# Rates of arrival are measured over about these times.
_SHORT_S, _LONG_S = 5.0, 60.0
# Requests that arrived in less than this time are no measure of a rate over a long time.
_LEAST_MEASURED_S = 20.0
# Over a short time, a rate appears this many times lower than it is by mere chance.
_BY_CHANCE = 2.0
# Less work than this is a rounding error.
_NOTHING_S = 1e-9


@dataclass(frozen=True, slots=True)
class Capacity:
    """All workers of one engine together. Rates are measured; 0 means not known yet.

    Attributes:
        pending_tokens: the output that is still expected of the running requests.
        pending_prompt_tokens: what is still to be read of their prompts.
        tokens_per_s: how fast the engine writes while it reads no prompts.
        prompt_tokens_per_s: how fast it reads prompts.
        tokens_per_request, prompt_tokens_per_request: of an average request.
        answer_tokens_per_s: how fast one answer is written beside those that run with it; 0 if it was not measured.
        loading_s: how long the next request waits until its model is loaded.
        running: the requests in the engine, by priority.
        suspends: whether a more urgent request can take the place of a less urgent one.
        kv_share: the part of the KV memory in use.
        down_reason: why there is no ready worker; empty if there is one.
    """

    slots_used: int = 0
    slots_total: int = 0
    pending_tokens: float = 0.0
    pending_prompt_tokens: float = 0.0
    tokens_per_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    tokens_per_request: float = 0.0
    prompt_tokens_per_request: float = 0.0
    answer_tokens_per_s: float = 0.0
    loading_s: float = 0.0
    running: Mapping[Priority, int] = field(default_factory=dict)
    suspends: bool = False
    kv_share: float = 0.0
    down_reason: str = ""

    @classmethod
    def of(cls, statuses: list[WorkerStatus]) -> Capacity:
        """Add up the statuses of one engine's workers. Workers that are not ready do not count."""
        ready = [status for status in statuses if status.state == "ready"]
        if not ready:
            states = ", ".join(f"{status.worker} is {status.state}" for status in statuses)
            return cls(down_reason=f"no worker is ready: {states}" if states else "no worker is running")
        return cls(
            slots_used=sum(status.slots.used for status in ready),
            slots_total=sum(status.slots.total for status in ready),
            pending_tokens=sum(status.pending_tokens for status in ready),
            pending_prompt_tokens=sum(status.pending_prompt_tokens for status in ready),
            tokens_per_s=sum(status.tokens_per_s for status in ready),
            prompt_tokens_per_s=sum(status.prompt_tokens_per_s for status in ready),
            tokens_per_request=_mean([status.tokens_per_request for status in ready]),
            prompt_tokens_per_request=_mean([status.prompt_tokens_per_request for status in ready]),
            answer_tokens_per_s=_mean([status.answer_tokens_per_s for status in ready]),
            loading_s=min(status.loading_s for status in ready),
            running={priority: sum(status.running.of(priority) for status in ready) for priority in Priority},
            suspends=any(status.suspends for status in ready),
            kv_share=max(
                (status.kv_bytes / status.kv_bytes_limit for status in ready if status.kv_bytes_limit), default=0.0
            ),
        )

    @property
    def measured(self) -> bool:
        """Whether there is a ready worker whose speed is known."""
        return self.slots_total > 0 and self.tokens_per_s > 0 and self.tokens_per_request > 0

    @property
    def request_s(self) -> float:
        """How long the whole engine would take for one average request; 0 if that is not known."""
        if not self.measured:
            return 0.0
        return self._seconds(self.tokens_per_request, self.prompt_tokens_per_request)

    @property
    def answer_s(self) -> float:
        """How long one average request takes from its beginning to its end; 0 if that is not known."""
        if not self.measured:
            return 0.0
        rate = self.answer_tokens_per_s or self.tokens_per_s / max(1, min(self.slots_used, self.slots_total))
        return min(self._reading_s(self.prompt_tokens_per_request) + self.tokens_per_request / rate, MAX_WAIT_S)

    @property
    def pending_s(self) -> float:
        """How long it needs for the rest of what runs, loading included; 0 if that is not known."""
        if not self.measured:
            return 0.0
        return self.loading_s + self._seconds(self.pending_tokens, self.pending_prompt_tokens)

    def _seconds(self, tokens: float, prompt_tokens: float) -> float:
        return min(tokens / self.tokens_per_s + self._reading_s(prompt_tokens), MAX_WAIT_S)

    def _reading_s(self, prompt_tokens: float) -> float:
        return prompt_tokens / self.prompt_tokens_per_s if self.prompt_tokens_per_s > 0 else 0.0


def _mean(measured: list[float]) -> float:
    known = [value for value in measured if value > 0]
    return sum(known) / len(known) if known else 0.0


@dataclass(slots=True)
class Inflow:
    """How many requests arrive in each lane. One writer: the backpressure monitor.

    The rate over a long time counts. When requests stop arriving, the rate over a short time says so first. Arrivals
    are counted from the first call on.
    """

    _short: dict[Priority, float] = field(init=False, default_factory=dict)
    _long: dict[Priority, float] = field(init=False, default_factory=dict)
    _began_at: float = field(init=False, default=math.inf)
    _counted_at: float = field(init=False, default=0.0)

    def arrived(self, priority: Priority, now: float) -> None:
        """A request was stored at now, monotonic seconds."""
        self._forget(now)
        self._short[priority] = self._short.get(priority, 0.0) + 1 / _SHORT_S
        self._long[priority] = self._long.get(priority, 0.0) + 1 / _LONG_S

    def per_s(self, now: float) -> dict[Priority, float]:
        """Requests per second in each lane."""
        self._forget(now)
        measured = 1 - math.exp(-max(now - self._began_at, _LEAST_MEASURED_S) / _LONG_S)
        return {
            lane: min(self._long.get(lane, 0.0) / measured, _BY_CHANCE * self._short.get(lane, 0.0))
            for lane in Priority
        }

    def _forget(self, now: float) -> None:
        self._began_at = min(self._began_at, now)
        passed_s, self._counted_at = max(0.0, now - self._counted_at), now
        for rates, window_s in ((self._short, _SHORT_S), (self._long, _LONG_S)):
            for lane, rate in rates.items():
                rates[lane] = rate * math.exp(-passed_s / window_s)


def predicted_waits_s(
    capacity: Capacity,
    queued: Mapping[Priority, int],
    shares: Mapping[Priority, float],
    target_wait_s: float,
    inflow: Mapping[Priority, float] | None = None,
) -> dict[Priority, float]:
    """How long a request stored now in each lane would wait for a slot, in seconds: `predicted_wait_s` for each."""
    return {lane: predicted_wait_s(capacity, queued, lane, shares, target_wait_s, inflow) for lane in queued}


def predicted_wait_s(
    capacity: Capacity,
    ahead: Mapping[Priority, int],
    priority: Priority,
    shares: Mapping[Priority, float],
    target_wait_s: float = 0.0,
    inflow: Mapping[Priority, float] | None = None,
) -> float:
    """How long a request of a priority waits for a slot, in seconds, at most `MAX_WAIT_S`.

    Before it begins, a slot must fall free, at best after the rest of what runs is spread over the slots. On an engine
    that suspends requests, the first ones of a priority take the places of less urgent ones instead. Without measured
    rates, every full round of the slots is taken to last one target.

    Args:
        capacity: the engine's.
        ahead: the requests in each lane; in its own, those in front of it.
        priority: its own.
        shares: each priority's part of the service.
        target_wait_s: the target of the longest wait, for an engine without measured rates.
        inflow: how many requests arrive in each lane, per second; None if no further ones are expected.
    """
    if not capacity.slots_total:
        return UNKNOWN_WAIT_S
    free = capacity.slots_total - capacity.slots_used
    if free > sum(ahead.values()):
        return 0.0
    request_s = capacity.request_s or target_wait_s / capacity.slots_total
    # Free slots take the first requests at once, which then share the engine: their work is half done on average.
    first_s = -free * request_s / 2 if free > 0 else capacity.pending_s / max(capacity.slots_used, 1)
    own = ahead[priority] - _preempting(capacity, priority, shares)
    if own < 0:
        return 0.0
    work = {lane: depth * request_s for lane, depth in ahead.items() if lane is not priority}
    arriving = {lane: rate * request_s for lane, rate in (inflow or {}).items()}
    return min(max(0.0, first_s + _served_after_s(own * request_s, work, priority, shares, arriving)), MAX_WAIT_S)


def _preempting(capacity: Capacity, priority: Priority, shares: Mapping[Priority, float]) -> int:
    """How many more requests of a priority begin at once, in the places of less urgent ones, within its share.

    A priority may be ahead of a victim's by one request of the victim's, in service divided by share.
    """
    if not capacity.suspends:
        return 0
    order = list(Priority)
    own, most = capacity.running.get(priority, 0), 0
    for victim in order[order.index(priority) + 1 :]:
        if running := capacity.running.get(victim, 0):
            most = max(most, min(running, int(shares[priority] / shares[victim] + _NOTHING_S) - own))
    return most


def _served_after_s(
    own_s: float,
    others_s: Mapping[Priority, float],
    priority: Priority,
    shares: Mapping[Priority, float],
    inflow: Mapping[Priority, float],
) -> float:
    """When a lane has got own_s seconds of the engine, while the others have so much work each, and get more."""
    passed_s, others = 0.0, dict(others_s)
    while own_s > _NOTHING_S:
        rates = _rates(others, priority, shares, inflow)
        losing = {lane: rate for lane in others if (rate := rates[lane] - inflow.get(lane, 0.0)) > _NOTHING_S}
        empty_s = [others[lane] / rate for lane, rate in losing.items() if others[lane] > 0]
        span_s = min([own_s / rates[priority], *empty_s])
        passed_s += span_s
        own_s -= span_s * rates[priority]
        left_s = {lane: work + span_s * (inflow.get(lane, 0.0) - rates[lane]) for lane, work in others.items()}
        others = {lane: left if left > _NOTHING_S else 0.0 for lane, left in left_s.items()}
    return passed_s


def _rates(
    others: Mapping[Priority, float],
    priority: Priority,
    shares: Mapping[Priority, float],
    inflow: Mapping[Priority, float],
) -> dict[Priority, float]:
    """The part of the engine that each lane gets now. An empty one gets no more than arrives in it."""
    free, rates = 1.0, dict.fromkeys(others, 0.0)
    lanes = {priority, *(lane for lane, work in others.items() if work > 0 or inflow.get(lane, 0.0) > 0)}
    while True:
        total = sum(shares[lane] for lane in lanes)
        light = {
            lane
            for lane in lanes
            if lane is not priority and not others[lane] and inflow[lane] <= free * shares[lane] / total
        }
        if not light:
            return rates | {lane: free * shares[lane] / total for lane in lanes}
        for lane in light:
            rates[lane] = inflow[lane]
            free -= inflow[lane]
        lanes -= light
