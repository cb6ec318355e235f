"""A model is pulled with Ollama's client while another one is served, its worker is killed in the middle, and again."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType
from ollama import AsyncClient, ResponseError

from tests.consumers.models.conftest import Site
from tests.consumers.models.ggufs import written
from tests.e2e.conftest import Pipeline, running
from tests.waiting import eventually

OPTIONS = ("--model", "demo", "--ollama-host", "none", "--no-ollama-standin")


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "files").mkdir()
    written(tmp_path / "files" / "tiny.gguf", kind=GGMLQuantizationType.F32)
    with Site(tmp_path / "files") as site:
        yield site


@pytest.fixture
def pipeline(tmp_path: Path) -> Iterator[Pipeline]:
    (tmp_path / "up").mkdir()
    with running(tmp_path / "up", *OPTIONS, "--models-dir", str(tmp_path / "store")) as started:
        yield started


@pytest.fixture
async def client(pipeline: Pipeline) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(pipeline.http, trust_env=False, timeout=120) as made:
        yield made


async def answered(client: AsyncClient, model: str) -> str:
    answer = await client.chat(model, [{"role": "user", "content": "hello"}], options={"num_predict": 4})
    return answer.model or ""


def fetching(address: str) -> bool:
    command = ["pgrep", "-f", f"consumers.models.pulling {address}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


async def test_a_model_is_pulled_killed_in_the_middle_pulled_again_and_served(
    pipeline: Pipeline, client: AsyncClient, files: Site, tmp_path: Path
):
    address = f"{files.url}/tiny.gguf"
    files.gate.clear()
    async with aclosing(await client.pull(address, stream=True)) as lines:
        async for line in lines:
            if line.completed:
                break
        assert await answered(client, "headrace-demo") == "headrace-demo"
        await asyncio.to_thread(pipeline.kill, "mlx")
        with pytest.raises(ResponseError, match=r"does not answer any more\. Pull again"):
            async for _ in lines:
                pass
    files.gate.set()
    await eventually(lambda: not fetching(address), what="the fetch has ended with its worker", every_s=0.2)
    assert not (tmp_path / "store" / "tiny").exists()

    async def pulled() -> list[str]:
        """The steps of a pull, once the next worker listens."""
        try:
            return [line.status or "" async for line in await client.pull(address, stream=True)]
        except ResponseError as error:
            if error.status_code != 503:
                raise
            return []

    steps = await eventually(pulled, what="the model is pulled", every_s=0.2)
    assert (steps[0], steps[-2:]) == ("pulling manifest", ["its name is tiny", "success"])
    assert [bool(wanted) for _, wanted in files.asked] == [False, True], "the download was resumed"
    assert [model.model for model in (await client.list()).models] == ["headrace-demo", "tiny", "auto"]
    assert await answered(client, "tiny") == "tiny"
    assert await answered(client, "headrace-demo") == "headrace-demo"
