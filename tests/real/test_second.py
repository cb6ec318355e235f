"""The second engine with the real model: llama.cpp behind the stand-in, alone and behind the whole pipeline."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import httpx
import msgspec
import pytest
from ollama import AsyncClient, ResponseError

from consumers import mlx, monitor, ollama, router
from consumers.models.getting import LocalModel
from pipeline.broker.jetstream import Bus
from pipeline.config import Config
from pipeline.process.lifecycle import Lifecycle
from pipeline.wire.answers import Completion
from tests.consumers.conftest import StandIn, launched
from tests.pipeline.worker.conftest import Client

pytestmark = pytest.mark.real

NAME = "smollm2"
STEADY = {"temperature": 0, "num_predict": 40}
FACTS = [
    ("What is the capital of France?", "Paris"),
    ("What is 2 plus 3?", "5"),
    ("What is the capital of Japan?", "Tokyo"),
    ("Who wrote Hamlet?", "Shakespeare"),
]


@pytest.fixture(scope="module")
def second(smollm2: LocalModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    with launched(tmp_path_factory.mktemp("second"), "--gguf", str(smollm2.gguf), "--name", NAME) as standin:
        yield standin


@pytest.fixture
async def client(second: StandIn) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(second.url, trust_env=False, timeout=100) as client:
        yield client


# ---- alone -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("question", "fact"), FACTS)
async def test_answers_are_right(client: AsyncClient, question: str, fact: str) -> None:
    answer = await client.chat(NAME, [{"role": "user", "content": question}], options=STEADY)
    assert fact in (answer.message.content or "")


async def test_the_internal_name_answers_the_same(client: AsyncClient) -> None:
    question = [{"role": "user", "content": FACTS[0][0]}]
    answers = [(await client.chat(name, question, options=STEADY)).message.content for name in (NAME, "tinyllama")]
    assert answers[0] == answers[1]


async def test_several_turns_and_a_system_prompt_reach_the_model(client: AsyncClient) -> None:
    turns = [
        {"role": "system", "content": "You answer with one word."},
        {"role": "user", "content": "My name is Ada. What is my name?"},
        {"role": "assistant", "content": "Ada"},
        {"role": "user", "content": "What is my name?"},
    ]
    assert "Ada" in ((await client.chat(NAME, turns, options=STEADY)).message.content or "")


async def test_russian_and_symbols_come_whole(client: AsyncClient) -> None:
    question = [{"role": "user", "content": "Repeat after me, and say nothing else: Привет, мир! 🚀"}]
    whole = await client.chat(NAME, question, options=STEADY | {"seed": 1})
    parts = [p async for p in await client.chat(NAME, question, options=STEADY | {"seed": 1}, stream=True)]
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert "\ufffd" not in (whole.message.content or "")


async def test_a_seed_repeats_an_answer_and_another_changes_it(client: AsyncClient) -> None:
    question = [{"role": "user", "content": "Tell me a story about a dog."}]
    texts = [
        (await client.chat(NAME, question, options={"temperature": 1, "seed": seed, "num_predict": 30})).message.content
        for seed in (7, 7, 8)
    ]
    assert texts[0] == texts[1] != texts[2]


async def test_a_stop_string_that_spans_tokens_ends_the_answer_before_it(client: AsyncClient) -> None:
    question = [{"role": "user", "content": FACTS[0][0]}]
    answer = await client.chat(NAME, question, options=STEADY | {"stop": ["of Fran"]})
    assert (answer.message.content, answer.done_reason) == ("The capital ", "stop")


async def test_a_format_is_kept(client: AsyncClient) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    question = [{"role": "user", "content": "Name a city, as JSON."}]
    answer = await client.chat(NAME, question, format=schema, options={"temperature": 0, "num_predict": 200})
    assert isinstance(json.loads(answer.message.content or "")["name"], str)


async def test_a_prompt_beyond_the_context_is_refused_and_tools_are(client: AsyncClient) -> None:
    with pytest.raises(ResponseError, match="input length exceeds the context length"):
        await client.chat(NAME, [{"role": "user", "content": "word " * 3000}])
    tool = {"function": {"name": "f", "description": "x", "parameters": {}}}
    with pytest.raises(ResponseError, match="does not support tools"):
        await client.chat(NAME, [{"role": "user", "content": "x"}], tools=[tool])


async def test_a_client_that_hangs_up_in_mid_prompt_makes_room(second: StandIn, client: AsyncClient) -> None:
    """Reading these prompts to the end would take minutes."""
    async with httpx.AsyncClient(base_url=second.url, trust_env=False) as http:
        for number in range(16):
            body = {"model": NAME, "messages": [{"role": "user", "content": f"{number} " + "word " * 1900}]}
            with pytest.raises(httpx.ReadTimeout):
                await http.post("/api/chat", json=body, timeout=httpx.Timeout(10, read=0.3))
    async with asyncio.timeout(60):
        answer = await client.chat(NAME, [{"role": "user", "content": FACTS[0][0]}], options=STEADY)
    assert "Paris" in (answer.message.content or "")


# ---- behind the pipeline ---------------------------------------------------------------------------------------------


@pytest.fixture
async def pipeline(config: Config, bus: Bus, second: StandIn) -> AsyncIterator[Client]:
    """A simulated MLX engine that serves the same name and is soon saturated, a router, and llama.cpp."""
    settings = msgspec.structs.replace(
        config,
        engine="simulated",
        model=NAME,
        slots=1,
        simulated_tokens_per_s=8.0,
        simulated_answer_tokens=100,
        target_wait_s=1.0,
        ollama_host=second.url,
    )
    async with AsyncExitStack() as stack:
        for role in (mlx.main, ollama.main, monitor.main, router.main):
            lifecycle = Lifecycle(role.__module__, drain_timeout_s=5)
            task = asyncio.create_task(role(settings, lifecycle))
            stack.push_async_callback(_end, lifecycle, task)
        yield Client(bus)


async def _end(lifecycle: Lifecycle, task: asyncio.Task[None]) -> None:
    lifecycle.stop(drain_s=0.0)
    await asyncio.wait_for(task, 20)


async def test_simple_requests_that_name_the_model_spill_and_are_answered_right(pipeline: Client) -> None:
    for number in range(8):
        await pipeline.ask(f"busy{number}", json.dumps({"prompt": "Tell me a story.", "model": NAME}).encode())
    asked = {f"fact{number}": fact for number, fact in enumerate(FACTS)}
    for request_id, (question, _) in asked.items():
        body = {"prompt": question, "model": NAME, "temperature": 0, "max_tokens": 40}
        await pipeline.ask(request_id, json.dumps(body).encode())
    spilled = 0
    for request_id, (_, fact) in asked.items():
        answer = await pipeline.answer(request_id, timeout_s=100)
        assert isinstance(answer, Completion), answer
        if answer.headrace.engine == "ollama":
            spilled += 1
            assert fact in (answer.choices[0].message.content or "")
            assert answer.headrace.spilled
    assert spilled >= 2
