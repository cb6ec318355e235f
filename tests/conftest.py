"""What every test may ask for: a real nats-server on a free loopback port, headrace's streams on it, a connection."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from pipeline.broker import topology
from pipeline.broker.jetstream import Bus
from pipeline.config import ENV_PREFIX, Config
from tests.support import ROOT, NatsServer


def pytest_configure() -> None:
    """A suite that is run in the background inherits an ignored SIGINT, and so would each process that it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
        monkeypatch.delenv(name)
    # Child processes must find this checkout, whatever is installed.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


@pytest.fixture
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A fresh server for one test."""
    server = NatsServer(tmp_path_factory.mktemp("nats"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def shared_nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """One server for all tests that leave nothing behind and kill nothing."""
    server = NatsServer(tmp_path_factory.mktemp("nats-shared"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def config(nats_server: NatsServer, tmp_path: Path) -> Config:
    """The default settings, against the test's own server."""
    return Config(nats_url=nats_server.url, state_dir=str(tmp_path / "state"))


@pytest.fixture
async def bus(config: Config) -> AsyncIterator[Bus]:
    """A connection to the test's own server, which has headrace's streams."""
    async with Bus.connect(config.nats_url, name="test") as connected:
        await topology.apply(connected.js, config)
        yield connected


@pytest.fixture
def python() -> str:
    """The interpreter for child processes."""
    return sys.executable
