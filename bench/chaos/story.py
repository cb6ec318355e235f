"""One chaos run from start to verdict."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.chaos import report
from bench.chaos.client import Client
from bench.chaos.fleet import Fleet, running
from bench.chaos.ledger import Ledger, Summary
from bench.chaos.load import Load
from bench.chaos.torment import Tormentor
from pipeline.config import Config

# Requests are lost if none has ended for this long.
STUCK_S = 90.0
_READ_EVERY_S = 1.0
QUEUES = ("LLM", "LLM_OLLAMA")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """The parameters of a run. With a script, its faults happen in order, once each; else they are drawn."""

    seconds: float
    engine: Literal["simulated", "mlx"] = "simulated"
    seed: int = 1
    rate_per_s: float = 5.0
    max_tokens: int = 40
    lease_s: float = 3.0
    pause_s: tuple[float, float] = (2.0, 6.0)
    script: tuple[str, ...] = ()

    def config(self) -> Config:
        """The settings of the roles: small batches, answers of one to two seconds, enough attempts for many kills."""
        return Config(
            engine=self.engine,
            model="headrace-demo",
            slots=4,
            simulated_tokens_per_s=160.0,
            simulated_answer_tokens=self.max_tokens,
            lease_s=self.lease_s,
            max_attempts=8,
            engine_faults=True,
            ollama_slots=2,
            target_wait_s=1.0,
            step_timeout_s=20.0,
            blas="none",  # seeded texts are compared to the letter
            log_level="info",
        )


@dataclass(slots=True)
class Stage:
    """A serving fleet, its client and the ledger."""

    fleet: Fleet
    client: Client
    ledger: Ledger

    async def settle(self) -> bool:
        """Wait until every request has its last message and the queues are empty. Returns whether that is so.

        A slow machine may need long. This gives up when nothing has ended for a while.
        """
        before, give_up_at = -1, 0.0
        while True:
            await self.client.read_record()
            left = len(self.ledger.open()) + sum((await self.left()).values())
            if not left:
                return True
            if left != before:
                before, give_up_at = left, time.monotonic() + STUCK_S
            elif time.monotonic() >= give_up_at:
                return False
            await asyncio.sleep(0.2)

    async def left(self) -> dict[str, int]:
        """The number of messages in each queue."""
        return {stream: await self.client.left_in(stream) for stream in QUEUES}


@asynccontextmanager
async def stage(folder: Path, config: Config, *, workers: int = 2) -> AsyncIterator[Stage]:
    """A serving fleet with a client that reads, for the duration of the block."""
    ledger = Ledger()
    async with running(folder, config, workers=workers) as fleet, Client.connected(fleet.url, ledger) as client:
        reading = asyncio.create_task(_keep_reading(client))
        try:
            yield Stage(fleet, client, ledger)
        finally:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading


async def _keep_reading(client: Client) -> None:
    while True:
        await asyncio.sleep(_READ_EVERY_S)
        await client.read_record()


async def run(plan: Plan, folder: Path, say: Say) -> Summary:
    """Run load and faults as planned, wait until every request has ended, and print the verdict."""
    async with stage(folder, plan.config()) as scene:
        load = Load(scene.client, random.Random(plan.seed), plan.rate_per_s, plan.max_tokens)
        await load.learn_undisturbed()
        tormentor = Tormentor(scene.fleet, random.Random(plan.seed + 1), pause_s=plan.pause_s)
        say(f"{plan.engine} engine, seed {plan.seed}: {plan.seconds:.0f} s of load and faults; logs in {folder}")
        progress = asyncio.create_task(_say_progress(scene, tormentor, say))
        try:
            tormenting = tormentor.each(plan.script) if plan.script else tormentor.run(plan.seconds)
            loading = asyncio.create_task(load.run(float("inf") if plan.script else plan.seconds))
            await tormenting
            if plan.script:
                load.stop()
            await loading
        finally:
            progress.cancel()
        quiet = await scene.settle()
        summary = scene.ledger.summary()
        say("" if quiet else f"requests are still open, and none has ended for {STUCK_S:.0f} s")
        for line in report.recovery(tormentor, scene.ledger):
            say(line)
        say("")
        for line in report.verdict(summary, scene.client, await scene.left(), scene.fleet.surprises):
            say(line)
        return summary


async def _say_progress(scene: Stage, tormentor: Tormentor, say: Say) -> None:
    while True:
        await asyncio.sleep(30)
        count = len(scene.ledger.entries)
        say(f"  {count} accepted, {len(scene.ledger.open())} open, {len(tormentor.faults)} faults")
