"""The faults of one run, drawn from one seed, and when each happened."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from bench.chaos.fleet import BROKER, STANDIN, Fleet
from pipeline.aio import Background

FREEZE_LEASES = 3
# The kinds of faults and their relative frequencies.
KINDS = {
    "kill mlx worker": 5,
    "kill engine child": 2,
    "freeze mlx worker": 2,
    "kill broker": 3,
    "kill router": 2,
    "kill monitor": 2,
    "kill ollama consumer": 2,
    "kill gateway": 1,
    "kill stand-in": 2,
    "freeze stand-in": 1,
}


class Fault(NamedTuple):
    """One fault. `at` is in unix seconds."""

    kind: str
    at: float
    victim: str


@dataclass(slots=True)
class Tormentor:
    """Causes one fault after the other, with pauses. Freezes overlap with the faults that follow.

    Attributes:
        faults: the faults so far, in order.
        back_s: the time until the process served again, by fault.
    """

    fleet: Fleet
    draw: random.Random
    pause_s: tuple[float, float] = (2.0, 6.0)
    faults: list[Fault] = field(default_factory=list)
    back_s: dict[Fault, float] = field(default_factory=dict)
    _pending: Background = field(default_factory=Background)

    async def run(self, seconds: float) -> None:
        """Cause faults for some seconds. At the end, no process is frozen or held down."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            kind = self.draw.choices(list(KINDS), list(KINDS.values()))[0]
            await self.do(kind)
            await asyncio.sleep(self.draw.uniform(*self.pause_s))
        await self.settle()

    async def each(self, kinds: Sequence[str]) -> None:
        """Cause these faults in order, each as soon as its victim serves."""
        for kind in kinds:
            while await self.do(kind) is None:  # noqa: ASYNC110 - members send no events
                await asyncio.sleep(0.05)
            await asyncio.sleep(self.draw.uniform(*self.pause_s))
        await self.settle()

    async def settle(self) -> None:
        """Wait until every process that was frozen or killed serves again."""
        await self._pending.join()
        await self.fleet.until_ready()

    async def do(self, kind: str) -> Fault | None:
        """Cause one fault now. Returns None if its victim does not serve."""
        action, _, what = kind.partition(" ")
        victim = self._victim(what)
        member = self.fleet[victim]
        if member.pid is None or not member.ready.is_set():
            return None
        fault = Fault(kind, time.time(), victim)
        if kind == "kill engine child":
            if not member.kill_child():
                return None
        elif action == "freeze":
            member.freeze()
            thawing = self._thaw(victim, FREEZE_LEASES * self.fleet.config.lease_s)
            self._pending.start(thawing, what=f"thawing {victim}")
        elif victim == BROKER:
            member.hold_down()
            member.kill()
            await asyncio.sleep(self.draw.uniform(0, 3))
            member.let_up()
        else:
            member.kill()
        self.faults.append(fault)
        if action == "kill":
            self._pending.start(self._note_back(fault), what=f"waiting for {victim}")
        return fault

    def lasts_s(self, fault: Fault) -> float:
        """How long the victim was away, seconds; at least a lease, after which another worker takes over."""
        lease_s = self.fleet.config.lease_s
        frozen_s = FREEZE_LEASES * lease_s if fault.kind.startswith("freeze") else 0.0
        return max(lease_s, frozen_s, self.back_s.get(fault, 0.0))

    def _victim(self, what: str) -> str:
        fixed = {"broker": BROKER, "stand-in": STANDIN, "ollama consumer": "ollama"}
        if what in ("mlx worker", "engine child"):
            return self.draw.choice(self.fleet.workers)
        return fixed.get(what, what)

    async def _thaw(self, victim: str, after_s: float) -> None:
        try:
            await asyncio.sleep(after_s)
        finally:
            self.fleet[victim].thaw()

    async def _note_back(self, fault: Fault) -> None:
        await asyncio.sleep(0.05)
        member = self.fleet[fault.victim]
        await member.ready.wait()
        self.back_s[fault] = max(0.0, member.ready_at - fault.at)


async def until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Wait for condition. Returns whether it became true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True
