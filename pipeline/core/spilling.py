"""What a spill gains: the second engine's room and time, and which of its work the first engine would begin sooner.

Pure: the two engines as their workers and loads report them, what the router has just spilled, and no clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pipeline.core.triage import Room
from pipeline.core.waits import Capacity
from pipeline.wire.messages import Load
from pipeline.wire.subjects import Priority

# A queued request is taken back only for a start that is earlier by this much: predictions are not exact, and a move
# costs a few milliseconds.
SOONER_BY_S = 0.5
# A running answer is taken back only for an end that is earlier by this much, and by this factor.
_ENDS_SOONER_BY_S = 1.0
_ENDS_SOONER_TIMES = 1.25


def room(second: Capacity, waiting: int, *, most_waiting: int) -> Room:
    """What the second engine has left, and when it would have answered one more request.

    It gets no more than one waiting request for each that it runs: what waits for the first engine can still go either
    way. While its speed is not known it gets a single request.

    Args:
        second: its workers.
        waiting: requests that were spilled and have not begun, those of this moment included.
        most_waiting: the most requests that may wait for it.
    """
    slots = second.slots_total
    healthy = slots > 0
    if not second.measured:
        return Room(healthy=healthy, free=int(healthy) - second.slots_used - waiting, answer_ms=0.0)
    # All that runs and waits shares the engine: it ends before this request, or slows it down as much.
    work_s = second.pending_s + (waiting + 1) * second.request_s
    free_now = second.slots_used + waiting < slots
    alone_s = second.loading_s + second.answer_s
    answer_s = alone_s if free_now else max(work_s, alone_s)
    return Room(
        healthy=healthy,
        free=slots + min(most_waiting, slots) - second.slots_used - waiting,
        answer_ms=answer_s * 1000,
    )


def wanted_back(second: Capacity, queued: Mapping[Priority, int]) -> set[Priority]:
    """The priorities whose oldest spilled request, still queued, is better begun by a free slot of the first engine.

    Args:
        second: the second engine's workers. While none is ready, or its speed is not known, nothing waits for it.
        queued: the depths of its lanes.
    """
    if second.slots_total and second.slots_used < second.slots_total:
        return set()
    # The oldest of a lane begins when the next slot falls free; a lane behind others waits longer than that.
    next_s = second.pending_s / max(1, second.slots_used) if second.measured else math.inf
    ahead, wanted = 0, set()
    for priority in Priority:
        depth = queued.get(priority, 0)
        if depth and next_s + ahead * second.request_s > SOONER_BY_S:
            wanted.add(priority)
        ahead += depth
    return wanted


def is_idle(load: Load) -> bool:
    """Whether an engine has a free slot and nothing waits for it."""
    queued = load.queued.high + load.queued.medium + load.queued.low
    return load.available and load.slots.used < load.slots.total and not queued


def ends_sooner(
    first: Load | None,
    at_first: Capacity,
    at_second: Capacity,
    priority: Priority,
    rest_s: float,
    *,
    keeps: bool = True,
) -> bool:
    """Whether the first engine would end a running answer of the second sooner.

    It reads the prompt and what was written, and writes the rest, once the request has begun there.

    Args:
        first: the first engine's load; None if it is not known.
        at_first: its workers.
        at_second: the second engine's workers.
        priority: the request's.
        rest_s: how long the second engine probably still takes; infinite if that is not known.
        keeps: whether the first engine goes on after what was written. Of an answer that is not streamed, nothing is
            kept.
    """
    if first is None or not first.available or not at_first.measured:
        return False
    if math.isinf(rest_s):
        return is_idle(first)
    beside = max(1, min(at_first.slots_used + 1, at_first.slots_total))
    rate = at_first.answer_tokens_per_s or at_first.tokens_per_s / beside
    read = at_second.prompt_tokens_per_request + (at_second.tokens_per_request if keeps else 0.0)
    reading_s = read / at_first.prompt_tokens_per_s if at_first.prompt_tokens_per_s > 0 else 0.0
    rest_tokens = rest_s * at_second.answer_tokens_per_s if keeps else at_second.tokens_per_request
    there_s = first.predicted_wait_ms.of(priority) / 1000 + reading_s + rest_tokens / rate
    return there_s * _ENDS_SOONER_TIMES + _ENDS_SOONER_BY_S < rest_s
