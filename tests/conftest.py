"""Fixtures for every test: a real nats-server on a free loopback port, headrace's streams on it, and a connection."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings

from pipeline.broker import topology
from pipeline.broker.jetstream import Bus
from pipeline.broker.secret import learn_moves
from pipeline.config import ENV_PREFIX, Config
from tests.support import ROOT, NatsServer, quick_folder

# Every run tries the same examples, and no example has to be quick. `--hypothesis-profile search` tries others.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile("steady")

DEMO = "headrace-demo"
# Begun first, so that no worker of xdist is left with a long file at the end.
LONG = ("e2e", "acceptance", "chaos", "security", "pipeline/test_cli.py", "pipeline/up", "consumers")


def pytest_configure() -> None:
    """Restore SIGINT: a suite in the background inherits it as ignored, and its children would too.

    Processes that session fixtures start use the demo model. No test but those marked `real` fetches one.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["HEADRACE_MODEL"] = DEMO


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: half of the time, a test waits for a lease, a timer or a process."""
    return (os.cpu_count() or 1) + 1


def pytest_sessionstart() -> None:
    """While the tests are collected, no garbage is searched for among what stays until the end, nor afterwards."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files by how long they take."""

    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(ROOT / "tests").as_posix()
        return next((number for number, prefix in enumerate(LONG) if path.startswith(prefix)), len(LONG))

    items.sort(key=place)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HEADRACE_MODEL", DEMO)
    # Child processes import this checkout, even if another one is installed.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


@contextmanager
def _server() -> Iterator[NatsServer]:
    """A server whose store nothing reads after it: it is killed, which takes a quarter of a second less than a stop."""
    with quick_folder() as folder:
        server = NatsServer(folder)
        server.start()
        try:
            yield server
        finally:
            server.kill()


@pytest.fixture
def nats_server() -> Iterator[NatsServer]:
    """A fresh server for one test."""
    with _server() as server:
        yield server


@pytest.fixture(scope="session")
def shared_nats_server() -> Iterator[NatsServer]:
    """One server for the tests that leave no state on it and do not kill it."""
    with _server() as server:
        yield server


@pytest.fixture
def config(nats_server: NatsServer, tmp_path: Path) -> Config:
    """The default settings, with the URL of the test's own server and the demo model."""
    return Config(nats_url=nats_server.url, state_dir=str(tmp_path / "state"), model=DEMO)


@pytest.fixture
async def bus(config: Config) -> AsyncIterator[Bus]:
    """A connection to the test's own server, on which headrace's streams exist."""
    async with Bus.connect(config.nats_url, name="test") as connected:
        await topology.apply(connected.js, config)
        await learn_moves(connected)
        yield connected


@pytest.fixture
def python() -> str:
    """The interpreter for child processes."""
    return sys.executable
