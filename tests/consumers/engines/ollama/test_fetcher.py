"""Models that an Ollama server pulls: its progress is passed on, and its errors are named."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from consumers.engines.ollama import OllamaEngine, OllamaFetcher
from pipeline.config import Config
from pipeline.wire.errors import ErrorCode, HeadraceError
from pipeline.wire.fetches import FetchStep
from tests.consumers.conftest import StandIn
from tests.consumers.ollama_server import Connection, OllamaServer, ollama_server
from tests.waiting import eventually

LINES = [
    {"status": "pulling manifest"},
    {"status": "pulling 797b70c4edf8", "digest": "sha256:797b70c4edf8", "total": 20},
    {"status": "pulling 797b70c4edf8", "digest": "sha256:797b70c4edf8", "total": 20, "completed": 20},
    {"status": "verifying sha256 digest"},
]
STEPS = [
    FetchStep("pulling manifest"),
    FetchStep("pulling 797b70c4edf8", "sha256:797b70c4edf8", 20, 0),
    FetchStep("pulling 797b70c4edf8", "sha256:797b70c4edf8", 20, 20),
    FetchStep("verifying sha256 digest"),
]


@pytest.fixture
async def ollama() -> AsyncIterator[OllamaServer]:
    async with ollama_server() as server:
        yield server


@pytest.fixture
async def fetcher(ollama: OllamaServer) -> AsyncIterator[OllamaFetcher]:
    async with OllamaEngine(Config(), ollama.url) as engine:
        yield OllamaFetcher(engine)


async def test_a_model_that_was_pulled_is_known_at_once(ollama: OllamaServer, fetcher: OllamaFetcher):
    async def pull(connection: Connection) -> None:
        ollama.models.append({"name": "new:latest"})
        await connection.lines(*LINES, {"status": "success"})
        await connection.end()

    ollama.chat = pull
    steps: list[FetchStep] = []
    assert fetcher.fetchable("new") == "new"
    assert await fetcher.fetch("new", steps.append) == "new:latest"
    assert steps == STEPS
    assert ollama.bodies == [{"model": "new", "stream": True}]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([{"status": "pulling manifest"}, {"error": "pull model manifest: file does not exist"}], "does not exist"),
        ([{"status": "pulling manifest"}], 'pull of "new" broke off. Pull again'),
        ([{"status": "pulling manifest"}, {"status": "success"}, b"no JSON\n"], "is not a JSON object"),
    ],
)
async def test_a_pull_that_fails_says_what_ollama_says(ollama: OllamaServer, fetcher: OllamaFetcher, lines, said: str):
    async def pull(connection: Connection) -> None:
        await connection.lines(*lines)
        await connection.end()

    ollama.chat = pull
    with pytest.raises(HeadraceError, match=said) as caught:
        await fetcher.fetch("new", lambda _: None)
    assert caught.value.code is ErrorCode.ENGINE_FAILED


async def test_a_server_that_dies_ends_the_pull(ollama: OllamaServer, fetcher: OllamaFetcher):
    async def pull(connection: Connection) -> None:
        await connection.lines(LINES[0])

    ollama.chat = pull
    with pytest.raises(HeadraceError, match='Ollama cannot pull "new": the connection broke'):
        await fetcher.fetch("new", lambda _: None)


async def test_a_pull_that_is_given_up_disconnects(ollama: OllamaServer, fetcher: OllamaFetcher):
    gone, steps = asyncio.Event(), list[FetchStep]()

    async def pull(connection: Connection) -> None:
        try:
            while True:
                await connection.lines_more(LINES[0]) if steps else await connection.lines(LINES[0])
                await asyncio.sleep(0.01)
        finally:
            gone.set()

    ollama.chat = pull
    fetching = asyncio.ensure_future(fetcher.fetch("new", steps.append))
    await eventually(lambda: steps)
    fetching.cancel()
    await asyncio.wait([fetching])
    await eventually(gone.is_set, what="the server notices")


async def test_the_stand_in_pulls_nothing(demo: StandIn):
    async with OllamaEngine(Config(), demo.url) as engine:
        with pytest.raises(HeadraceError, match="there is no Ollama server") as caught:
            OllamaFetcher(engine).fetchable("qwen3:0.6b")
    assert caught.value.code is ErrorCode.MODEL_NOT_FOUND
