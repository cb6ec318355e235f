"""Random preemptions with a real model, and a long LOW prompt beside a HIGH answer: parts of `bench.real`."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import pairwise
from pathlib import Path

from bench.bare import PROMPTS
from consumers.engines.local.process import EngineProcess
from pipeline.config import Config
from pipeline.engine import Work
from pipeline.wire.requests import ChatRequest
from pipeline.wire.subjects import Priority

AT_ONCE = 4
SEED = 17
# At most so many LOW tokens are written between two HIGH requests.
MOST_BETWEEN = 8
HIGH_QUESTION = "What color is the sky?"
SENTENCE = "The river runs past the mill, under the stone bridge and down to the sea. "
SENTENCE_TOKENS = 17


@contextlib.asynccontextmanager
async def started(config: Config) -> AsyncIterator[EngineProcess]:
    """The engine, ready."""
    async with EngineProcess(config, model_path=config.model, served_name="m") as engine:
        await until(engine, ready=True)
        yield engine


async def until(engine: EngineProcess, *, ready: bool) -> None:
    """Wait until the engine is ready, or no longer ready."""
    changed = asyncio.Event()
    engine.on_change(changed.set)
    while (engine.status().state == "ready") is not ready:
        await changed.wait()
        changed.clear()


class Told:
    """An answer: its text, how often it was preempted, and when its tokens came."""

    def __init__(self) -> None:
        self.text = ""
        self.preempted = 0
        self.times: list[float] = []


async def ask(
    engine: EngineProcess,
    asked: ChatRequest,
    seed: int,
    priority: Priority,
    on_token: Callable[[], None] = lambda: None,
) -> Told:
    """Ask, and read to the end."""
    told = Told()
    generation = await engine.submit(Work(f"{priority.value}-{seed}", asked, "", seed=seed, priority=priority))
    while True:
        piece = await generation.next()
        told.text += piece.text
        told.preempted += piece.preempted
        if piece.token_ids:
            told.times.append(time.perf_counter())
            on_token()
        if piece.finish_reason is not None:
            await generation.close()
            return told


# ---- random preemptions ----------------------------------------------------------------------------------------------


class Disturber:
    """Asks HIGH again and again, after a random number of LOW tokens each time."""

    def __init__(self, engine: EngineProcess) -> None:
        self._engine = engine
        self._chance = random.Random(SEED)
        self._tokens = 0
        self._written = asyncio.Event()

    def note(self) -> None:
        """A LOW token was written."""
        self._tokens += 1
        self._written.set()

    async def run(self) -> None:
        """Runs until it is cancelled."""
        while True:
            wanted = self._tokens + self._chance.randint(1, MOST_BETWEEN)
            while self._tokens < wanted:
                self._written.clear()
                await self._written.wait()
            question = ChatRequest(prompt=HIGH_QUESTION, max_tokens=self._chance.randint(1, 3))
            await ask(self._engine, question, 0, Priority.HIGH)


async def group(
    engine: EngineProcess, indices: Sequence[int], tokens: int, on_token: Callable[[], None] = lambda: None
) -> list[Told]:
    """Seeded texts, written together at LOW."""
    requests = [
        ChatRequest(prompt=PROMPTS[index % len(PROMPTS)], max_tokens=tokens, temperature=1.0) for index in indices
    ]
    answers = (
        ask(engine, asked, index, Priority.LOW, on_token) for asked, index in zip(requests, indices, strict=True)
    )
    return list(await asyncio.gather(*answers))


async def preempted(engine: EngineProcess, count: int, tokens: int) -> list[Told]:
    """Texts, in groups of `AT_ONCE`, until there were so many preemptions."""
    disturber, found = Disturber(engine), list[Told]()
    disturbing = asyncio.create_task(disturber.run())
    while sum(told.preempted for told in found) < count:
        found += await group(engine, range(len(found), len(found) + AT_ONCE), tokens, disturber.note)
        if disturbing.done():
            disturbing.result()
    disturbing.cancel()
    await asyncio.gather(disturbing, return_exceptions=True)
    return found


async def preemptions(model: Path, count: int, tokens: int, blas: str, threads: int) -> None:
    """How many texts differ from the undisturbed ones, and how many differ between two batches without preemption."""
    settings = Config(
        model=str(model),
        blas=blas,
        mlx_threads=threads,
        slots=AT_ONCE,
        max_preemptions=1_000_000,
        max_suspended_s=1e6,
        step_timeout_s=600.0,
    )
    async with started(settings) as engine:
        disturbed = await preempted(engine, count, tokens)
        indices = range(len(disturbed))
        alike, others = list[Told](), dict[int, Told]()
        for first in indices[::AT_ONCE]:
            alike += await group(engine, indices[first : first + AT_ONCE], tokens)
        # Every group of the second batches has texts of several groups of the first ones.
        across = sorted(indices, key=lambda index: (index % AT_ONCE, index))
        for first in indices[::AT_ONCE]:
            some = across[first : first + AT_ONCE]
            others.update(zip(some, await group(engine, some, tokens), strict=True))
    texts = [told.text for told in alike]
    moved = sum(told.text != text for told, text in zip(disturbed, texts, strict=True))
    batched = sum(others[index].text != text for index, text in enumerate(texts))
    times = sum(told.preempted for told in disturbed)
    print(
        f"  blas {blas:<5} {times} preemptions of {len(texts)} texts of {tokens} tokens: {moved} differ from the "
        f"undisturbed text; {batched} differ between two batches without preemption",
        flush=True,
    )


# ---- a long prompt ---------------------------------------------------------------------------------------------------


async def endless(engine: EngineProcess, stop: asyncio.Event) -> list[float]:
    """HIGH answers one after another, until stop. Returns the seconds between the tokens within each of them."""
    gaps: list[float] = []
    while not stop.is_set():
        asked = ChatRequest(prompt=PROMPTS[0], max_tokens=256, temperature=0)
        told = await ask(engine, asked, 0, Priority.HIGH)
        gaps += [late - early for early, late in pairwise(told.times)]
    return gaps


async def long_prompt(model: Path, prompt_tokens: int, threads: int) -> None:
    """A LOW prompt of about so many tokens, alone and beside HIGH answers: its time, and the gaps in theirs."""
    settings = Config(model=str(model), mlx_threads=threads, step_timeout_s=600.0)
    asked = ChatRequest(prompt=SENTENCE * (prompt_tokens // SENTENCE_TOKENS), max_tokens=1, temperature=0)
    async with started(settings) as engine:
        begun = time.perf_counter()
        await ask(engine, asked, 1, Priority.LOW)
        alone_s = time.perf_counter() - begun
        stop = asyncio.Event()
        beside = asyncio.create_task(endless(engine, stop))
        begun = time.perf_counter()
        await ask(engine, asked, 2, Priority.LOW)
        beside_s = time.perf_counter() - begun
        stop.set()
        gaps = sorted(await beside)
    target = settings.inter_token_target_s
    print(f"a LOW prompt of about {prompt_tokens} tokens: {alone_s:.1f} s alone, {beside_s:.1f} s beside HIGH answers")
    print(
        f"gaps in the HIGH answers, s: median {gaps[len(gaps) // 2]:.3f}, p99 {gaps[int(0.99 * len(gaps))]:.3f}, "
        f"longest {gaps[-1]:.3f} of {len(gaps)} (target {target:g})",
        flush=True,
    )
