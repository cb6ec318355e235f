"""The stand-in in front of llama.cpp: what differs from the demo model. `test_standin.py` holds what is alike."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ollama import AsyncClient, ResponseError

from consumers.engines.llamacpp.native import LlamaServer
from consumers.engines.ollama import OllamaClient
from consumers.standin.embedding import EMBEDDER
from tests import tiny_gguf
from tests.consumers.conftest import MODEL, ROOT, Launch, StandIn

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
LONG = [{"role": "user", "content": "word " * 380}]
TOOL: dict[str, Any] = {"function": {"name": "get_weather", "description": "The weather.", "parameters": {}}}


def size_of(file: Path) -> int:
    return file.stat().st_size


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
async def client(llama: StandIn) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(llama.url, trust_env=False, timeout=60) as client:
        yield client


@pytest.fixture
def single(launch: Launch, tiny: Path) -> Iterator[StandIn]:
    """A stand-in in front of llama.cpp that runs one request at once."""
    with launch("--gguf", str(tiny), "--name", "tiny", "--parallel", "1", "--threads", "1") as standin:
        yield standin


# ---- what it is ------------------------------------------------------------------------------------------------------


async def test_its_lists_tell_the_truth_about_the_file(client: AsyncClient, tiny: Path) -> None:
    (listed,) = (await client.list()).models
    assert (listed.model, listed.size) == (f"{MODEL}:latest", size_of(tiny))
    assert listed.details is not None
    assert (listed.details.family, listed.details.format) == ("llama", "gguf")
    assert listed.details.quantization_level == "F32"
    assert listed.details.parameter_size == "0.02M"
    shown = await client.show(MODEL)
    assert shown.capabilities == ["completion"]
    assert shown.parameters == f"num_ctx {tiny_gguf.CONTEXT}"
    assert shown.template == tiny_gguf.TEMPLATE.rstrip("\n")
    assert (shown.modelinfo or {})["general.architecture"] == "llama"


async def test_a_file_without_a_name_is_served_under_its_own(launch: Launch, tiny: Path) -> None:
    with launch("--gguf", str(tiny), "--threads", "1") as standin:
        async with AsyncClient(standin.url, trust_env=False) as client:
            assert [model.model for model in (await client.list()).models] == ["tiny:latest"]


async def test_slots_share_the_context(launch: Launch, tiny: Path) -> None:
    with launch("--gguf", str(tiny), "--parallel", "16", "--threads", "1") as standin:
        async with AsyncClient(standin.url, trust_env=False) as client:
            (running, _) = (await client.ps()).models
            assert running.context_length == tiny_gguf.CONTEXT


async def test_it_makes_no_embeddings(client: AsyncClient) -> None:
    for model, status in ((MODEL, 501), (EMBEDDER, 404)):
        with pytest.raises(ResponseError) as caught:
            await client.embed(model, "x")
        assert caught.value.status_code == status


def test_llama_cpps_own_server_is_closed_to_others(tiny: Path) -> None:
    server = LlamaServer(tiny, slots=1, threads=1)
    try:
        body = {"messages": QUESTION, "max_tokens": 1}
        path = f"{server.url}/v1/chat/completions"
        assert httpx.post(path, json=body, trust_env=False).status_code == 401
        assert httpx.post(path, json=body, headers=server.headers, trust_env=False).status_code == 200
    finally:
        server.close()


@pytest.mark.parametrize("content", [None, b"GGUF", b"no model"])
def test_a_file_that_is_no_model_ends_it_with_a_sentence(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "broken.gguf"
    if content is not None:
        file.write_bytes(content)
    command = [sys.executable, "-m", "consumers.standin", "--gguf", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert str(file) in done.stderr
    assert "Traceback" not in done.stderr


# ---- internal work ---------------------------------------------------------------------------------------------------


async def test_the_same_weights_answer_internal_work_under_the_internal_name(
    client: AsyncClient, llama: StandIn
) -> None:
    internal = OllamaClient(llama.url, idle_timeout_s=30, load_timeout_s=30)
    assert await internal.load_internal("tinyllama")
    said = await internal.ask_internal("tinyllama", "Is water wet?")
    await internal.close()
    options = {"temperature": 0, "num_predict": 8}
    asked = await client.chat(MODEL, [{"role": "user", "content": "Is water wet?"}], options=options)
    assert said == (asked.message.content or "").strip() != ""


async def test_the_internal_name_is_warm_and_is_in_no_list(client: AsyncClient) -> None:
    assert [model.model for model in (await client.ps()).models] == [f"{MODEL}:latest", "tinyllama:latest"]
    assert "tinyllama:latest" not in [model.model for model in (await client.list()).models]
    with pytest.raises(ResponseError) as caught:
        await client.show("tinyllama")
    assert caught.value.status_code == 404


async def test_without_internal_models_there_is_none(launch: Launch, tiny: Path) -> None:
    with launch("--gguf", str(tiny), "--threads", "1", internal_models="[]") as standin:
        async with AsyncClient(standin.url, trust_env=False) as client:
            assert len((await client.ps()).models) == 1


# ---- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.5},
        {"temperature": 1.5, "top_k": 2},
        {"temperature": 1.5, "top_p": 0.2},
        {"temperature": 1.5, "min_p": 0.9},
        {"temperature": 1.5, "repeat_penalty": 2.0},
        {"temperature": 1.5, "presence_penalty": 2.0},
        {"temperature": 1.5, "frequency_penalty": 2.0},
    ],
)
async def test_each_option_changes_the_answer(client: AsyncClient, options: dict[str, Any]) -> None:
    steady = {"seed": 3, "num_predict": 48, "top_k": 0, "min_p": 0.0}
    plain = {"temperature": 1.5} if len(options) > 1 else {"temperature": 0}
    one, other = [await client.chat(MODEL, QUESTION, options=steady | given) for given in (plain, options)]
    assert one.message.content != other.message.content


async def test_a_format_is_kept(client: AsyncClient) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    answer = await client.chat(MODEL, QUESTION, format=schema, options={"temperature": 1, "num_predict": 60})
    assert json.loads(answer.message.content or "")["n"] in (1, 2)
    started = await client.chat(MODEL, QUESTION, format="json", options={"num_predict": 8})
    # The grammar of JSON lets a model begin with any white space.
    assert (started.message.content or "").lstrip()[:1] in ("", "{")


async def test_a_schema_that_is_none_is_refused(client: AsyncClient) -> None:
    with pytest.raises(ResponseError) as caught:
        await client.chat(MODEL, QUESTION, format={"type": "nonsense"})
    assert caught.value.status_code == 400


async def test_an_answer_without_a_limit_ends_with_the_context(client: AsyncClient) -> None:
    answer = await client.chat(MODEL, LONG, options={"temperature": 1, "num_predict": -1})
    assert answer.done_reason == "length"
    assert (answer.prompt_eval_count or 0) + (answer.eval_count or 0) == tiny_gguf.CONTEXT


async def test_a_long_prompt_sends_signs_of_life_before_the_answer(client: AsyncClient) -> None:
    turns = [{"role": "user", "content": "sign " * 380}]
    parts = [part async for part in await client.chat(MODEL, turns, stream=True, options={"num_predict": 3})]
    texts = [part.message.content for part in parts[:-1]]
    signs = [text for text in texts if not text]
    assert len(signs) >= 10
    assert texts[: len(signs)] == signs
    assert parts[-1].prompt_eval_duration


async def test_tools_are_for_a_model_whose_template_has_them(
    client: AsyncClient, launch: Launch, tmp_path: Path
) -> None:
    with pytest.raises(ResponseError) as caught:
        await client.chat(MODEL, QUESTION, tools=[TOOL])
    assert (caught.value.status_code, caught.value.error) == (400, f"{MODEL} does not support tools")
    file = tiny_gguf.write(tmp_path / "tools.gguf", template=tiny_gguf.TOOLS_TEMPLATE)
    with launch("--gguf", str(file), "--threads", "1") as standin:
        async with AsyncClient(standin.url, trust_env=False) as other:
            assert (await other.show("tools")).capabilities == ["completion", "tools"]
            counts = [
                (await other.chat("tools", QUESTION, tools=tools, options={"num_predict": 1})).prompt_eval_count
                for tools in ([], [TOOL])
            ]
    assert (counts[1] or 0) > (counts[0] or 0)


# ---- clients that leave, and crashes ---------------------------------------------------------------------------------


async def test_llama_cpp_stops_computing_when_the_client_hangs_up(single: StandIn) -> None:
    """It would need minutes for all of these answers."""
    body = {"model": "tiny", "messages": QUESTION, "stream": False, "options": {"temperature": 1, "num_predict": -1}}
    async with httpx.AsyncClient(base_url=single.url, trust_env=False) as http:
        for _ in range(60):
            with pytest.raises(httpx.ReadTimeout):
                await http.post("/api/chat", json=body, timeout=httpx.Timeout(5, read=0.03))
    async with asyncio.timeout(30), AsyncClient(single.url, trust_env=False) as client:
        assert (await client.chat("tiny", QUESTION, options={"num_predict": 2})).eval_count == 2


async def test_sigterm_ends_it_in_the_middle_of_an_answer(single: StandIn) -> None:
    async with AsyncClient(single.url, trust_env=False) as client:
        parts = await client.chat("tiny", QUESTION, stream=True, options={"num_predict": -1})
        assert (await anext(parts)).message.content
        single.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(single.process.wait, 20) == 0


# ---- 16-bit copies ---------------------------------------------------------------------------------------------------


async def test_a_small_quantized_file_is_unpacked_once(launch: Launch, tmp_path: Path) -> None:
    file = tiny_gguf.write(tmp_path / "small.gguf", quantized=True)
    copy = tmp_path / "small.f16.gguf"
    made = []
    for _ in range(2):
        with launch("--gguf", str(file), "--threads", "1") as standin:
            async with AsyncClient(standin.url, trust_env=False) as client:
                (listed,) = (await client.list()).models
                assert listed.model == "small:latest"
                assert (listed.details and listed.details.quantization_level, listed.size) == (
                    "F16",
                    copy.stat().st_size,
                )
        made.append(copy.stat().st_ino)
    assert made[0] == made[1]
    assert names_in(tmp_path) == ["small.f16.gguf", "small.gguf"]


async def test_a_folder_that_cannot_be_written_leaves_the_file_as_it_is(launch: Launch, tmp_path: Path) -> None:
    file = tiny_gguf.write(tmp_path / "small.gguf", quantized=True)
    (tmp_path / "small.f16.gguf").mkdir()
    with launch("--gguf", str(file), "--threads", "1") as standin:
        async with AsyncClient(standin.url, trust_env=False) as client:
            (listed,) = (await client.list()).models
            assert (listed.details and listed.details.quantization_level) == "Q8_0"


async def test_reasoning_of_a_model_that_always_reasons_is_its_thinking(launch, tmp_path: Path) -> None:
    earlier = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    turns = "{% for m in messages %}<|start|>{{ m.role }}\n" + earlier + "<|end|>\n{% endfor %}"
    opening = "{% if add_generation_prompt %}<|start|>assistant\n<think>\n{% endif %}"
    gguf = tiny_gguf.write(tmp_path / "thinker.gguf", template=turns + opening)
    with launch("--gguf", str(gguf), "--name", "thinker", "--threads", "1") as standin:
        async with AsyncClient(standin.url, trust_env=False, timeout=60) as client:
            whole = await client.chat("thinker", QUESTION, options={"num_predict": 20, "seed": 3})
            assert (bool(whole.message.thinking), whole.message.content) == (True, "")
            parts = await client.chat("thinker", QUESTION, options={"num_predict": 20, "seed": 3}, stream=True)
            thought = "".join([part.message.thinking or "" async for part in parts])
            assert thought == whole.message.thinking
            text = await client.generate("thinker", "Hi", options={"num_predict": 20})
            assert (bool(text.thinking), text.response) == (True, "")
