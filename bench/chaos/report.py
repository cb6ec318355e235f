"""The output of a run: the verdict, and the times of recovery."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bench.chaos.client import Client
from bench.chaos.ledger import Ledger, Summary, goes_on_after
from bench.chaos.torment import Fault, Tormentor

# A recovery longer than this is printed with its request.
NOTABLE_S = 6.0
_OF_MLX = ("kill mlx worker", "freeze mlx worker", "kill engine child", "kill broker")


class _Slow(NamedTuple):
    seconds: float
    id: str
    clock: str


def verdict(summary: Summary, client: Client, left: dict[str, int], surprises: Sequence[str]) -> list[str]:
    """The verdict as lines of text."""
    ended = ", ".join(f"{kind} {count}" for kind, count in summary.ended.most_common())
    faults = ", ".join(f"{kind} {count}" for kind, count in summary.faults.most_common()) or "none"
    lines = [
        f"accepted                  {summary.accepted}",
        f"ended                     {ended}",
        f"lost                      {summary.lost}",
        f"doubled                   {sum(n for kind, n in summary.faults.items() if 'doubled' in kind)}",
        f"known answers compared    {summary.known_compared}",
        f"faults of answers         {faults}",
        f"re-executed               {summary.reexecuted} (attempts: {dict(sorted(summary.attempts.items()))})",
        f"inboxes: last repeated    {summary.repeated_at_inbox}",
        f"inboxes: last missed      {summary.missed_at_inbox}",
        f"refused at publishing     {dict(client.ledger.refused) or 'none'}",
        f"answers to cancels        {dict(client.cancels)}",
        f"core requests             {dict(client.asks)}",
        f"left in the queues        {left}",
        f"ended by themselves       {', '.join(surprises) or 'none'}",
    ]
    lines += [f"    {fault}: {', '.join(ids)}" for fault, ids in summary.examples.items()]
    return lines


def recovery(tormentor: Tormentor, ledger: Ledger) -> list[str]:
    """A table by kind of fault: how often, the time until the process served again, and that until answers went on.

    The latter is that of the slowest answer that ran at the fault. The last columns leave out faults that overlap with
    another one: the worker that takes over may die too.
    """
    titles = ("process serves again, s", "slowest answer goes on, s", "no other fault, s")
    lines = [f"{'fault':22} {'times':>5}" + "".join(f"   {title:^27}" for title in titles)]
    lines.append(f"{'':28}" + f"   {'p50':>9}{'p95':>9}{'max':>9}" * 3)
    for kind in sorted({fault.kind for fault in tormentor.faults}):
        faults = [fault for fault in tormentor.faults if fault.kind == kind]
        back = [tormentor.back_s[fault] for fault in faults if fault in tormentor.back_s]
        slowest = {fault: found for fault in faults if (found := _slowest(fault, ledger)) is not None}
        alone = [found.seconds for fault, found in slowest.items() if _is_alone(fault, found.seconds, tormentor)]
        worst = max(slowest.values(), default=None)
        whose = f"  {worst.id} at {worst.clock}" if worst and worst.seconds > NOTABLE_S else ""
        columns = (back, [one.seconds for one in slowest.values()], alone)
        lines.append(f"{kind:22} {len(faults):>5}" + "".join(f"   {_quantiles(one)}" for one in columns) + whose)
    return lines


def _is_alone(fault: Fault, seconds: float, tormentor: Tormentor) -> bool:
    """Whether no other process that MLX's answers need was away while they recovered from a fault."""
    return not any(
        other is not fault
        and other.kind in _OF_MLX
        and other.at < fault.at + seconds
        and other.at + tormentor.lasts_s(other) > fault.at
        for other in tormentor.faults
    )


def _slowest(fault: Fault, ledger: Ledger) -> _Slow | None:
    """The answer that took longest to go on, of those that ran at a fault."""
    clock = time.strftime("%H:%M:%S", time.localtime(fault.at))
    times = ((goes_on_after(entry, fault.at), entry.id) for entry in ledger.entries.values())
    return max((_Slow(seconds, name, clock) for seconds, name in times if seconds is not None), default=None)


def _quantiles(values: Iterable[float]) -> str:
    ordered = sorted(values)
    if not ordered:
        return f"{'-':>9}" * 3
    picked = (ordered[min(len(ordered) - 1, int(len(ordered) * part))] for part in (0.5, 0.95, 1.0))
    return "".join(f"{value:>9.2f}" for value in picked)
