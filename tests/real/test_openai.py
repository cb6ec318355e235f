"""Servers of OpenAI's API behind the whole pipeline: `mlx_lm.server` and two of llama.cpp's, with the real model."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from consumers.engines.local.blas import selected, threads_environment
from consumers.models.getting import LocalModel
from tests.consumers.llama_server import KEY, LlamaProcess, llama_server
from tests.e2e.conftest import Asker, Pipeline, asking, chat, joined, running, text_of
from tests.support import ROOT, wait_until

# A busy machine writes a token a second.
PATIENCE_S = 200.0
pytestmark = [pytest.mark.real, pytest.mark.timeout(3 * PATIENCE_S)]

QUESTION = "What is the capital of France?"
STORY = "Tell me a story about a dog."
STEADY = {"temperature": 0, "max_tokens": 16}
# Long enough that a server can be killed in the middle.
LONG = STEADY | {"max_tokens": 40}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


class MlxServer:
    """`mlx_lm.server` with the BLAS library and the weights of headrace's engine. It is started again on its port."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model = model
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        # It lists the models of this folder, which must exist.
        (folder / "hub").mkdir(parents=True)

    def start(self) -> None:
        """Start, and wait until it answers."""
        library = asyncio.run(selected("auto", 2))
        arguments = [library.library if library else "", str(self._model), str(self._port)]
        environ = os.environ | threads_environment(2) | {"HF_HOME": str(self._folder), "HF_HUB_OFFLINE": "1"}
        with (self._folder / "log").open("ab") as log:
            command = [sys.executable, "-m", "bench.peer", *arguments]
            self._process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=log)
        wait_until(self._answers, what="mlx_lm.server", timeout_s=PATIENCE_S)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/v1/models", trust_env=False, timeout=30).is_success
        except httpx.TransportError:
            return False

    def freeze(self) -> None:
        """Stop the process where it is."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        """End it with SIGKILL, frozen or not."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)
            self._process = None


Server = MlxServer | LlamaProcess


@pytest.fixture(scope="module")
def servers(smollm2: LocalModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """`mlx_lm.server`, and two of llama.cpp's servers with a model in common."""
    folder = tmp_path_factory.mktemp("servers")
    assert smollm2.gguf is not None
    mlx = MlxServer(Path(smollm2.path), folder / "mlx")
    with contextlib.ExitStack() as stack:
        stack.callback(mlx.kill)
        mlx.start()
        llamas = [stack.enter_context(llama_server(smollm2.gguf, folder / f"llama{number}.log")) for number in (1, 2)]
        yield [mlx, *llamas]


@pytest.fixture(scope="module")
def pipeline(servers: list[Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    environ = {
        "HEADRACE_ENGINE": "simulated",
        "HEADRACE_OLLAMA_HOST": "none",
        "HEADRACE_OPENAI": msgspec.json.encode([server.url for server in servers]).decode(),
        "HEADRACE_OPENAI_KEY": KEY,
    }
    with running(tmp_path_factory.mktemp("openai"), environ=environ) as pipeline:
        wait_until(lambda: len(names_of(pipeline)) == 2, what="the models of all servers")
        yield pipeline


@pytest.fixture
async def asker(pipeline: Pipeline) -> AsyncIterator[Asker]:
    async with asking(pipeline.url) as connected:
        yield connected


def states_of(pipeline: Pipeline) -> list[dict[str, Any]]:
    stats: dict[str, Any] = httpx.get(f"{pipeline.http}/queue/stats", timeout=30).json()
    return [server for server in stats["servers"] if server["dialect"] == "openai"]


def names_of(pipeline: Pipeline) -> dict[str, str]:
    """The names of the servers' models: of `mlx_lm.server`'s, and of llama.cpp's."""
    ready = [server for server in states_of(pipeline) if server["state"] == "ready"]
    return {"llama" if name.endswith(".gguf") else "mlx": name for server in ready for name in server["models"]}


@pytest.mark.parametrize("kind", ["mlx", "llama"])
async def test_chats_and_streams(pipeline: Pipeline, asker: Asker, kind: str) -> None:
    model = names_of(pipeline)[kind]
    ids = [await asker.ask("llm.request.high", chat(QUESTION, model=model, stream=s, **STEADY)) for s in (False, True)]
    whole, streamed = await asker.answers(ids, timeout_s=PATIENCE_S)
    assert whole["headrace"]["dialect"] == streamed["headrace"]["dialect"] == "openai"
    assert text_of(whole) == text_of(streamed) == joined(asker.messages[ids[1]])
    assert "Paris" in text_of(whole) or kind == "llama"
    assert whole["usage"]["prompt_tokens"] > 0


@pytest.mark.parametrize("kind", ["mlx", "llama"])
async def test_tools_are_passed_on(pipeline: Pipeline, asker: Asker, kind: str) -> None:
    """The model calls none, so the answer notes that nothing was called."""
    model = names_of(pipeline)[kind]
    asked = chat(QUESTION, model=model, tools=[TOOL], tool_choice="required", **STEADY)
    answer = await asker.answer(await asker.ask("llm.request.high", asked), timeout_s=PATIENCE_S)
    calls = answer["choices"][0]["message"].get("tool_calls")
    ended = answer["choices"][0]["finish_reason"]
    assert calls or ended == "length" or "tool_choice" in " ".join(answer["headrace"]["notes"])


@pytest.mark.parametrize("kind", ["mlx", "llama"])
async def test_a_cancel_stops_the_server(pipeline: Pipeline, asker: Asker, kind: str) -> None:
    model = names_of(pipeline)[kind]
    asked = chat(STORY, model=model, stream=True, temperature=0, max_tokens=1500)
    request_id = await asker.ask("llm.request.high", asked)
    await asker.until(lambda: joined(asker.messages[request_id]) != "", timeout_s=PATIENCE_S)
    assert (await asker.request(f"llm.cancel.{request_id}"))["state"] == "cancelled"
    assert (await asker.answer(request_id))["error"]["code"] == "cancelled"
    wait_until(lambda: not any(server["slots"]["used"] for server in states_of(pipeline)), what="free slots")


@pytest.mark.parametrize("kind", ["mlx", "llama"])
async def test_an_answer_survives_a_server_that_is_killed_in_the_middle(
    pipeline: Pipeline, servers: list[Server], asker: Asker, kind: str
) -> None:
    model = names_of(pipeline)[kind]
    undisturbed = await asker.answer(await asker.ask("llm.request.high", chat(STORY, model=model, **LONG)))
    victims = servers[:1] if kind == "mlx" else servers[1:]
    streamed, unseen = [
        await asker.ask("llm.request.high", chat(STORY, model=model, stream=stream, **LONG)) for stream in (True, False)
    ]
    await asker.until(lambda: joined(asker.messages[streamed]) != "", timeout_s=PATIENCE_S)
    for server in victims:
        server.freeze()
        server.kill()
    for server in victims:
        await asyncio.to_thread(server.start)
    for request_id in (streamed, unseen):
        answer = await asker.answer(request_id, timeout_s=PATIENCE_S)
        assert answer["object"] == "chat.completion", answer
        assert text_of(answer) == text_of(undisturbed)
        assert asker.lasts(request_id) == 1
    assert joined(asker.messages[streamed]) == text_of(undisturbed)
    assert (await asker.answer(streamed))["headrace"]["attempts"] > 1


async def test_two_servers_with_a_model_in_common_share_its_requests(pipeline: Pipeline, asker: Asker) -> None:
    wait_until(lambda: len([s for s in states_of(pipeline) if s["state"] == "ready"]) == 3, what="three servers")
    model = names_of(pipeline)["llama"]
    asked = chat(STORY, model=model, temperature=0, max_tokens=8)
    ids = [await asker.ask("llm.request.medium", asked) for _ in range(8)]
    assert all(answer["object"] == "chat.completion" for answer in await asker.answers(ids, timeout_s=PATIENCE_S))
    wait_until(
        lambda: sum(server["tokens_per_s"] > 0 for server in states_of(pipeline) if model in server["models"]) == 2,
        what="both have answered",
    )
