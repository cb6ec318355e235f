"""Checks of single promises: kills during answers, a frozen worker, cancels while queued, a rolling restart.

Each check runs a fleet of its own.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from msgspec.structs import replace

from bench.chaos import report
from bench.chaos.fleet import BROKER, STANDIN
from bench.chaos.ledger import Entry, Summary
from bench.chaos.load import Load
from bench.chaos.story import Stage, stage
from bench.chaos.torment import Fault, Tormentor, until
from pipeline.config import Config

_WAIT_S = 60.0


class Shown(NamedTuple):
    """The result of a check: lines to print, and what is wrong. `wrong` is empty if the promise was kept."""

    lines: list[str]
    wrong: list[str]


async def kills(folder: Path, config: Config, *, times: int, rate_per_s: float = 3.0, seed: int = 1) -> Shown:
    """Kill an MLX worker during an answer, `times` times in one run, under a steady load of streams."""
    async with stage(folder, replace(config, max_attempts=max(100, times))) as scene:
        max_tokens = 40 if config.engine == "simulated" else 160
        load = Load(scene.client, random.Random(seed), rate_per_s, max_tokens, poison_share=0)
        await load.learn_undisturbed()
        tormentor = Tormentor(scene.fleet, random.Random(seed))
        loading = asyncio.create_task(load.run(float("inf")))
        try:
            while len(tormentor.faults) < times:
                if not await until(lambda: bool(_in_mid_answer(scene)), _WAIT_S):
                    return Shown([], ["no stream was running"])
                await tormentor.do("kill mlx worker")
                # Some kills come during the recovery from the last one, others after it.
                await asyncio.sleep(tormentor.draw.uniform(0.2, 3 * config.lease_s))
        finally:
            load.stop()
            await loading
        return await _closing(scene, tormentor)


async def frozen(folder: Path, config: Config, *, leases: int = 3) -> Shown:
    """Freeze a worker during answers for some leases. Another one takes over, and the frozen one must write nothing."""
    async with stage(folder, config) as scene:
        load = Load(scene.client, random.Random(1), 5.0, 200)
        entries = [await load.publish_one(kind) for kind in ("plain", "inbox", "plain", "inbox", "plain", "inbox")]
        frozen_worker = scene.fleet[scene.fleet.workers[0]]
        pid = frozen_worker.pid or 0
        # Until streams run, some of them on the worker that is to be frozen.
        await until(lambda: len(_in_mid_answer(scene)) > 1 and scene.client.slots_used.get(pid, 0) > 0, _WAIT_S)
        frozen_at = time.time()
        frozen_worker.freeze()
        try:
            await asyncio.sleep(leases * config.lease_s)
            quiet = await scene.settle()
            before = [_all_seen(entry) for entry in entries]
        finally:
            frozen_worker.thaw()
        thawed_at = time.time()
        heard = await until(lambda: scene.client.workers_at.get(pid, 0) > thawed_at, _WAIT_S)
        # Anything that it still writes arrives within a lease.
        await asyncio.sleep(config.lease_s)
        await scene.client.read_record()
        after = [_all_seen(entry) for entry in entries]
        summary = scene.ledger.summary()
        wrong = list(summary.faults)
        wrong += [] if quiet else ["not all requests were answered while the worker was frozen"]
        wrong += [] if heard else ["the frozen worker never came back"]
        wrong += ["a reader saw a message from the worker after it woke"] if before != after else []
        wrong += [] if summary.reexecuted else ["the frozen worker held no request"]
        lines = [
            f"frozen for {thawed_at - frozen_at:.1f} s, lease {config.lease_s:.1f} s",
            f"requests {len(entries)}, taken over from the frozen worker {summary.reexecuted}",
            f"messages that readers saw before it woke {sum(map(len, before))}, after {sum(map(len, after))}",
        ]
        return Shown(lines, wrong)


async def cancelled(folder: Path, config: Config, *, requests: int, seed: int = 1) -> Shown:
    """Queue many requests and cancel half of them while they wait. No engine must begin those."""
    draw = random.Random(seed)
    async with stage(folder, replace(config, lane_max_messages=requests + 1)) as scene:
        workers = [scene.fleet[name] for name in scene.fleet.workers]
        for worker in workers:
            worker.hold_down()
            worker.kill()
        began_at = time.monotonic()
        entries = await _queued(scene, requests, draw)
        queued_at = time.monotonic()
        chosen = draw.sample(entries, requests // 2)
        first_late = int(len(chosen) * 0.9)
        early, late = chosen[:first_late], chosen[first_late:]
        await _side_by_side(64, (scene.client.cancel(entry.id) for entry in early))
        cancelled_at = time.monotonic()
        # The last cancels race with the engines.
        for worker in workers:
            worker.let_up()
        await _side_by_side(16, (scene.client.cancel(entry.id) for entry in late))
        quiet = await scene.settle()
        ended = _ended_by_cancels(scene, early, quiet=quiet)
        lines = [
            f"queued {requests} in {queued_at - began_at:.1f} s",
            f"cancelled {len(early)} in {cancelled_at - queued_at:.1f} s, then {len(late)} beside running engines",
        ]
        return Shown(lines + ended.lines, ended.wrong)


async def _queued(scene: Stage, requests: int, draw: random.Random) -> list[Entry]:
    """Publish many short requests in all lanes."""
    entries = [Entry(f"q{n}", "cancelled", False, 0.0, may_end=frozenset({"cancelled"})) for n in range(requests)]
    body = json.dumps({"prompt": "x", "max_tokens": 4}).encode()
    lanes = [f"llm.request.{draw.choice(('high', 'medium', 'low'))}" for _ in entries]
    works = (scene.client.publish(entry, lane, body, {}) for entry, lane in zip(entries, lanes, strict=True))
    await _side_by_side(64, works)
    return entries


def _ended_by_cancels(scene: Stage, early: Sequence[Entry], *, quiet: bool) -> Shown:
    """How the requests ended. `early` were cancelled before any engine ran."""
    in_queue = scene.client.cancelled_in_queue
    begun = [request_id for request_id in in_queue if scene.client.started[request_id]]
    missed = [entry.id for entry in early if entry.id not in in_queue]
    summary = scene.ledger.summary()
    wrong = [f"{kind} {count}" for kind, count in summary.faults.items()]
    wrong += [] if quiet else ["requests are still open at the end"]
    wrong += [f"engines began {len(begun)} cancelled requests: {begun[:3]}"] if begun else []
    wrong += [f"{len(missed)} cancels before any engine ran had no effect: {missed[:3]}"] if missed else []
    lines = [
        f"ended: {dict(summary.ended)}",
        f"cancelled while queued {len(in_queue)}; engines began {len(begun)} of them",
        f"requests begun by engines {len(scene.client.started)}; answers to cancels {dict(scene.client.cancels)}",
    ]
    return Shown(lines, wrong)


async def rolling(folder: Path, config: Config, *, rounds: int = 1, seed: int = 1) -> Shown:
    """Drain and restart every role under load, one after the other. No request must be lost."""
    async with stage(folder, config) as scene:
        load = Load(scene.client, random.Random(seed), 3.0, 40, poison_share=0)
        await load.learn_undisturbed()
        tormentor = Tormentor(scene.fleet, random.Random(seed))
        loading = asyncio.create_task(load.run(float("inf")))
        try:
            for _ in range(rounds):
                for name, member in scene.fleet.members.items():
                    if name in (BROKER, STANDIN):
                        continue
                    fault = Fault(f"drain {name}", time.time(), name)
                    member.drain(config.drain_timeout_s)
                    await until(member.ready.is_set, _WAIT_S)
                    tormentor.faults.append(fault)
                    tormentor.back_s[fault] = member.ready_at - fault.at
                    await asyncio.sleep(0.5)
        finally:
            load.stop()
            await loading
        return await _closing(scene, tormentor)


SHOWS: dict[str, Callable[..., Coroutine[Any, Any, Shown]]] = {
    "kills": kills,
    "frozen": frozen,
    "cancelled": cancelled,
    "rolling": rolling,
}


async def _closing(scene: Stage, tormentor: Tormentor) -> Shown:
    await tormentor.settle()
    quiet = await scene.settle()
    summary: Summary = scene.ledger.summary()
    lines = report.recovery(tormentor, scene.ledger)
    lines += ["", *report.verdict(summary, scene.client, await scene.left(), scene.fleet.surprises)]
    wrong = [f"{kind} {count}" for kind, count in summary.faults.items()]
    return Shown(lines, wrong if quiet else [*wrong, "requests are still open at the end"])


def _in_mid_answer(scene: Stage) -> list[Entry]:
    """The streams whose live reader has chunks, but no last message."""
    return [entry for entry in scene.ledger.entries.values() if entry.is_in_mid_answer]


def _all_seen(entry: Entry) -> list[bytes]:
    return [*(kept.data for kept in entry.record), *entry.live, *(entry.inbox or ())]


async def _side_by_side(width: int, works: Iterator[Awaitable[Any]]) -> None:
    """Await all works, `width` at a time."""

    async def one_after_another() -> None:
        for work in works:
            await work

    await asyncio.gather(*(one_after_another() for _ in range(width)))
