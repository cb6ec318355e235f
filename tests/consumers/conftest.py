"""Stand-in servers for the tests, each in its own process, ended with the tests that use it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_gguf

ROOT = Path(__file__).parents[2]
MODEL = "headrace-demo-mini"


class StandIn:
    """A running stand-in."""

    def __init__(self, process: subprocess.Popen[str], url: str, pid: int) -> None:
        self.process = process
        self.url = url
        self.pid = pid
        self.port = int(url.rpartition(":")[2])


Launch = Callable[..., AbstractContextManager[StandIn]]


@contextlib.contextmanager
def launched(folder: Path, *options: str, **settings: Any) -> Iterator[StandIn]:
    ready_file = folder / f"ready-{os.urandom(4).hex()}.json"
    environment = {f"HEADRACE_{key.upper()}": str(value) for key, value in settings.items()}
    process = subprocess.Popen(
        [sys.executable, "-m", "consumers.standin", "--ready-file", str(ready_file), *options],
        cwd=ROOT,
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if "serving at" in line:
            break
    else:
        process.stderr.close()
        process.wait(60)
        raise AssertionError(f"the stand-in did not start:\n{''.join(said)}")
    drain = threading.Thread(target=process.stderr.read)
    drain.start()
    ready = json.loads(ready_file.read_text())
    try:
        yield StandIn(process, ready["url"], ready["pid"])
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()
            process.wait()
            drain.join()
            process.stderr.close()


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    folder = tmp_path_factory.mktemp("standins")
    return lambda *options, **settings: launched(folder, *options, **settings)


@pytest.fixture(scope="session")
def demo(launch: Launch) -> Iterator[StandIn]:
    """A stand-in in front of the demo model, four answers at once."""
    with launch("--parallel", "4", engine="mlx") as standin:
        yield standin


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of a model with random weights."""
    return tiny_gguf.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="session")
def llama(launch: Launch, tiny: Path) -> Iterator[StandIn]:
    """A stand-in in front of llama.cpp with that model, under the demo model's name, four answers at once."""
    with launch("--gguf", str(tiny), "--name", MODEL, "--parallel", "4", "--threads", "1") as standin:
        yield standin


@pytest.fixture(params=["demo", "llama"])
def either(request: pytest.FixtureRequest) -> StandIn:
    """A stand-in in front of the demo model, and one in front of llama.cpp."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def slow(launch: Launch) -> Iterator[StandIn]:
    """A stand-in whose answers last until somebody hangs up, one at a time."""
    with launch("--parallel", "1", engine="simulated", simulated_answer_tokens=30_000) as standin:
        yield standin
