"""The one device that injects faults: a process's connection that dies, freezes or loses what the test names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Literal, NamedTuple

from pipeline.aio import Grouping
from pipeline.broker.connection import Unreachable
from pipeline.broker.jetstream import Bus

Fate = Literal["dies", "freezes", "loses", "hears nothing", "hears late"]


class Died(BaseException):
    """The process ended here: no handler of it runs any more."""


class Operation(NamedTuple):
    """Something that a process asks of the broker; `subject` tells what."""

    subject: str
    data: bytes


def _any(_: Operation) -> bool:
    return True


class Process(Bus):
    """A process's connection, and its fate.

    Attributes:
        doom: what happens at the operation after `steps` more: before it the process `dies`, or `freezes` until `thaw`;
            it `loses` what it sends; it `hears nothing` of the answer; or it `hears late` of it, after `thaw`.
        steps: how many operations still go well.
        at: which operations count, all of them by default.
        struck: whether it has happened.
        answered: the deliveries that were acknowledged or returned.
        seen: called with each operation, before it.
    """

    def __init__(self, bus: Bus) -> None:
        for one in fields(bus):
            setattr(self, one.name, getattr(bus, one.name))
        self.accounts = Grouping()
        self.doom: Fate | None = None
        self.steps = 0
        self.at: Callable[[Operation], bool] = _any
        self.struck = False
        self.thawed = asyncio.Event()
        self.answered: set[str] = set()
        self.seen: Callable[[Operation], None] = lambda _: None

    def meets(self, fate: Fate | None, at: Callable[[Operation], bool] = _any, steps: int = 0) -> None:
        """Let it meet its fate, a new one after `thaw`: after so many more of the operations that count."""
        self.doom, self.at, self.steps = fate, at, steps
        self.struck = False
        self.thawed.clear()

    async def _step(self, subject: str, data: bytes) -> Fate | None:
        """What happens to an operation beyond what happens to the process before it."""
        self.seen(Operation(subject, data))
        if self.doom is None or not self.at(Operation(subject, data)):
            return None
        if self.steps > 0:
            self.steps -= 1
            return None
        self.struck = True
        if self.doom == "dies":
            raise Died
        if self.doom == "freezes":
            await self.thawed.wait()
            return None
        return self.doom

    def thaw(self) -> None:
        """Let it go on where it froze."""
        self.doom = None
        self.thawed.set()

    @property
    def is_frozen(self) -> bool:
        return self.struck and self.doom == "freezes"

    async def publish(self, subject: str, data: bytes, **more: Any) -> None:
        if await self._step(subject, data) == "loses":
            return
        await super().publish(subject, data, **more)
        if data.startswith((b"+ACK", b"-NAK")):
            self.answered.add(subject)

    async def request(self, subject: str, data: bytes = b"", **more: Any) -> Any:
        fate = await self._step(subject, data)
        answer = await super().request(subject, data, **more)
        if fate == "hears nothing":
            self.doom = None
            raise Unreachable("the answer was lost")
        if fate == "hears late":
            await self.thawed.wait()
        return answer

    async def batch(self, stream: str, subject: str, *arguments: Any, **more: Any) -> Any:
        await self._step(f"$JS.API.DIRECT.GET.{stream}.{subject}", b"")
        return await super().batch(stream, subject, *arguments, **more)
