"""Requests for models that only servers of OpenAI's API have: their workers share Ollama's lanes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from consumers.engines.openai import OpenAIEngine
from pipeline.broker.jetstream import Bus
from pipeline.config import Config
from pipeline.delivery.lanes import OLLAMA_SOURCE
from pipeline.wire.answers import Chunk, Completion, ErrorAnswer
from pipeline.wire.subjects import STREAM_OLLAMA
from tests import tiny_gguf
from tests.consumers.llama_server import KEY, LlamaProcess, llama_server
from tests.consumers.ollama_server import Connection
from tests.consumers.openai_server import counted, openai_server, said
from tests.pipeline.worker.conftest import Client, ScriptedEngine
from tests.waiting import eventually

CONFIG = Config(openai_key=KEY)
# The 591st token of this model has another one that is as likely: which of them wins depends on the size of the batch.
LONG = 560


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaProcess]:
    folder = tmp_path_factory.mktemp("llama")
    with llama_server(tiny_gguf.write(folder / "tiny.gguf"), folder / "log") as server:
        yield server


@pytest.fixture
async def beside(start, bus: Bus) -> AsyncIterator:
    """Starts the workers of servers beside that of an MLX which has none of their models."""
    async with AsyncExitStack() as stack:

        @asynccontextmanager
        async def engine_of(url: str) -> AsyncIterator[OpenAIEngine]:
            async with OpenAIEngine(CONFIG, url) as engine:
                yield engine

        async def begin(*urls: str) -> list[OpenAIEngine]:
            engines = [await stack.enter_async_context(engine_of(url)) for url in urls]
            mlx = await start(ScriptedEngine())
            others = [await start(engine, OLLAMA_SOURCE) for engine in engines]
            models = {name for engine in engines for name in engine.status().models}
            for worker in (mlx, *others):
                await eventually(lambda worker=worker: models <= set(worker.worker.me.peers.models("ollama")))
            return engines

        yield begin


def body(model: str, **fields: object) -> bytes:
    return json.dumps({"prompt": "hello", "model": model, "temperature": 0} | fields).encode()


async def none_is_left(client: Client) -> None:
    await client.none_waits()

    async def empty() -> bool:
        return (await client.bus.stream_state(STREAM_OLLAMA)).messages == 0

    await eventually(empty, what="all spilled requests acknowledged")


async def test_a_request_for_a_model_that_only_such_a_server_has_goes_there(
    beside, client: Client, llama: LlamaProcess
) -> None:
    (engine,) = await beside(llama.url)
    (model,) = engine.status().models
    await client.ask("one", body(model, max_tokens=5))
    answer = await client.answer("one")
    assert isinstance(answer, Completion)
    assert (answer.headrace.engine, answer.headrace.dialect, answer.headrace.spilled) == ("ollama", "openai", True)
    assert (answer.model, answer.usage.completion_tokens) == (model, 5)
    await none_is_left(client)


async def test_an_answer_goes_on_after_its_server_was_killed_in_the_middle(
    beside, client: Client, llama: LlamaProcess
) -> None:
    (engine,) = await beside(llama.url)
    (model,) = engine.status().models
    await client.ask("whole", body(model, max_tokens=LONG))
    undisturbed = await client.answer("whole")
    await client.ask("streamed", body(model, max_tokens=LONG, stream=True))
    await client.ask("unseen", body(model, max_tokens=LONG))
    await client.until("streamed", 3)
    llama.freeze()
    llama.kill()
    await eventually(lambda: engine.status().state == "down", what="the engine is down")
    llama.start()
    for name in ("streamed", "unseen"):
        answer = await client.answer(name)
        assert isinstance(answer, Completion), answer
        assert answer.choices[0].message.content == undisturbed.choices[0].message.content
        # What of the prompt was in the server's cache differs from call to call.
        assert answer.usage.prompt_tokens == undisturbed.usage.prompt_tokens
        assert answer.usage.completion_tokens == undisturbed.usage.completion_tokens
    record = await client.record("streamed")
    chunks = [message for message in record if isinstance(message, Chunk)]
    assert [chunk.seq for chunk in chunks] == list(range(len(chunks)))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == undisturbed.choices[0].message.content
    assert sum(isinstance(message, Completion | ErrorAnswer) for message in record) == 1
    await none_is_left(client)


async def test_two_servers_share_a_model_and_each_keeps_its_own(beside, client: Client) -> None:
    async def answer(connection: Connection) -> None:
        await connection.lines(said(json.loads(connection.body)["model"], "stop"), counted(3, 1))
        await connection.end()

    async with openai_server() as first, openai_server() as second:
        first.models = [{"id": "both"}, {"id": "mine"}]
        second.models = [{"id": "both"}, {"id": "yours"}]
        first.chat = second.chat = answer
        await beside(first.url, second.url)
        models = [("both", "mine", "yours")[number % 3] for number in range(30)]
        for number, model in enumerate(models):
            await client.ask(f"r{number}", body(model))
        for number, model in enumerate(models):
            answered = await client.answer(f"r{number}")
            assert isinstance(answered, Completion), answered
            assert answered.choices[0].message.content == model
        assert {sent["model"] for sent in first.bodies} <= {"both", "mine"}
        assert {sent["model"] for sent in second.bodies} <= {"both", "yours"}
        assert len(first.bodies) + len(second.bodies) == len(models)
        await none_is_left(client)


async def test_a_cancel_reaches_the_server(beside, client: Client, bus: Bus) -> None:
    gone = asyncio.Event()

    async def endless(connection: Connection) -> None:
        await connection.lines(said("a "))
        try:
            while True:
                await connection.lines_more(said("a "))
                await asyncio.sleep(0.01)
        except ConnectionError:
            gone.set()

    async with openai_server() as server:
        server.chat = endless
        (engine,) = await beside(server.url)
        await client.ask("long", body("good", stream=True))
        await client.until("long", 3)
        await bus.publish("llm.cancel.long", b"")
        assert await client.code("long") == "cancelled"
        await eventually(gone.is_set, what="the server noticed")
        await eventually(lambda: engine.status().slots_used == 0)
        await none_is_left(client)


async def test_a_request_that_brings_the_server_down_each_time_ends_within_its_attempts(beside, client: Client) -> None:
    async def breaks(connection: Connection) -> None:
        await connection.lines(said("half "))

    async with openai_server() as server:
        server.chat = breaks
        await beside(server.url)
        await client.ask("odd", body("good", stream=True))
        assert await client.code("odd") == "engine_failed"
        await none_is_left(client)
