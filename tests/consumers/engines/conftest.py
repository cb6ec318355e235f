"""Fixtures for engines in a child process."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from consumers.engines.local.process import EngineProcess
from pipeline.config import Config
from tests.consumers.engines.conformance import until_ready
from tests.consumers.engines.processes import engine_of

Starter = Callable[..., AbstractAsyncContextManager[EngineProcess]]


@asynccontextmanager
async def started(kind: str, **options) -> AsyncIterator[EngineProcess]:
    settings = {"engine": kind, "slots": 8, "engine_faults": True, "step_timeout_s": 30.0, "model": "demo"}
    if kind == "simulated":
        settings |= {"simulated_tokens_per_s": 4000.0, "simulated_answer_tokens": 60}
    async with engine_of(Config(**settings | options)) as engine:
        await until_ready(engine)
        yield engine


@pytest.fixture(scope="session")
def start() -> Starter:
    """Starts an engine, `mlx` or `simulated`, and waits until it is ready."""
    return started
