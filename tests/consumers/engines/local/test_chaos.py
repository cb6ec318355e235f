"""Many requests, some of which crash the engine or are closed half way: the others are answered as usual."""

import asyncio
import random

import pytest

from consumers.engines.local.process import EngineProcess
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.requests import ChatRequest
from tests.consumers.engines.conformance import Answer, ask, read, work

pytestmark = pytest.mark.chaos

KINDS = 10


def request(kind: int, fault: str = "") -> ChatRequest:
    return ChatRequest(prompt=f"Count from {kind} to 20. {fault}", max_tokens=30, temperature=1)


async def serve(engine: EngineProcess, kind: int, draw: random.Random) -> tuple[str, Answer | HeadraceError | None]:
    """One request and its fate: `whole`, `closed` half way, or `poison`."""
    if draw.random() < 0.05:
        fault = f"[[fault:{draw.choice(['abort', 'raise', 'segfault'])}@{draw.randint(0, 2)}]]"
        poison = await engine.submit(work(request(kind, fault), seed=kind))
        (outcome,) = await asyncio.gather(read(poison), return_exceptions=True)
        return "poison", outcome
    generation = await engine.submit(work(request(kind), seed=kind))
    if draw.random() < 0.15:
        await generation.next()
        await generation.close()
        return "closed", None
    (outcome,) = await asyncio.gather(read(generation), return_exceptions=True)
    return "whole", outcome


@pytest.mark.parametrize(("engine_kind", "requests"), [("simulated", 200), ("mlx", 100)])
async def test_only_the_requests_that_crash_the_engine_fail(start, engine_kind, requests):
    draw = random.Random(4)
    async with start(engine_kind) as engine:
        undisturbed = [await ask(engine, request(kind), seed=kind) for kind in range(KINDS)]
        slots = asyncio.Semaphore(engine.status().slots_total)

        async def one(number: int):
            async with slots:
                return number % KINDS, *await serve(engine, number % KINDS, draw)

        outcomes = await asyncio.gather(*map(one, range(requests)))
        poisons = [outcome for _, fate, outcome in outcomes if fate == "poison"]
        whole = [(kind, outcome) for kind, fate, outcome in outcomes if fate == "whole"]
        assert len(poisons) >= 2
        assert all(outcome.code is ErrorCode.ENGINE_FAILED for outcome in poisons)
        assert [answer.text for _, answer in whole] == [undisturbed[kind].text for kind, _ in whole]
        assert engine.status().slots_used == 0
