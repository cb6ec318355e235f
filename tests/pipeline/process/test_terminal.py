"""What becomes of a process whose terminal is closed."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.broker.jetstream import Bus
from pipeline.cli import main
from pipeline.config import Config
from tests.support import ROOT, wait_until

# Ends a test that hangs; nothing is expected within it.
TIMEOUT_S = 100.0
HEADRACE = (sys.executable, "-m", "pipeline.cli")
PIPELINE = ("--engine", "simulated", "--no-ollama-standin", "--http-port", "0", "--nats-port", "0")


class OnTerminal:
    """A process at a terminal of its own."""

    def __init__(self, *command: str, ignores_hangup: bool = False) -> None:
        self._terminal, theirs = os.openpty()

        def take_terminal() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGHUP, signal.SIG_IGN if ignores_hangup else signal.SIG_DFL)

        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OLLAMA_HOST": "127.0.0.1:9"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=take_terminal,  # noqa: PLW1509 - there are no threads here
        )
        os.close(theirs)
        self._said = b""
        self._open = True

    def says(self, text: str) -> None:
        """Read what it writes until the text has come."""
        while text.encode() not in self._said:
            self._said += os.read(self._terminal, 1 << 12)

    def close(self) -> None:
        """Close the terminal."""
        if self._open:
            self._open = False
            os.close(self._terminal)

    def wait(self) -> int:
        return self.process.wait(TIMEOUT_S)


@pytest.fixture
def on_terminal() -> Iterator[Callable[..., OnTerminal]]:
    started: list[OnTerminal] = []

    def start(*command: str, ignores_hangup: bool = False) -> OnTerminal:
        started.append(OnTerminal(*command, ignores_hangup=ignores_hangup))
        return started[-1]

    yield start
    for each in started:
        each.close()
        each.process.kill()
        each.wait()


def test_a_pipeline_whose_terminal_is_closed_drains(on_terminal, tmp_path):
    up = on_terminal(*HEADRACE, "up", "--state-dir", str(tmp_path / "state"), *PIPELINE)
    up.says("Press Ctrl-C")
    up.close()
    assert up.wait() == 0
    assert not (tmp_path / "state" / "run.json").exists()


def role_pid(parent: int, role: str) -> int:
    command = ["pgrep", "-P", str(parent), "-f", f"pipeline.cli run {role}"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return int(said[0]) if said else 0


def test_a_pipeline_that_ignores_the_signal_goes_on_and_writes_nowhere(on_terminal, tmp_path):
    state = tmp_path / "state"
    up = on_terminal(*HEADRACE, "up", "--state-dir", str(state), *PIPELINE, ignores_hangup=True)
    up.says("Press Ctrl-C")
    router = role_pid(up.process.pid, "router")
    up.close()
    os.kill(router, signal.SIGKILL)  # which the screen shows
    wait_until(lambda: role_pid(up.process.pid, "router") not in (0, router), what="the router is started again")
    assert json.loads((state / "run.json").read_text())["pid"] == up.process.pid
    up.process.send_signal(signal.SIGTERM)
    assert up.wait() == 0


async def test_a_role_whose_terminal_is_closed_drains(on_terminal, bus: Bus, config: Config):
    role = on_terminal(*HEADRACE, "run", "monitor", "--nats-url", config.nats_url)
    await asyncio.to_thread(role.says, " ready")
    role.close()
    assert await asyncio.to_thread(role.wait) == 0


async def test_a_worker_whose_terminal_is_closed_drains_with_its_engine(on_terminal, bus: Bus, config: Config):
    role = on_terminal(*HEADRACE, "run", "mlx", "--nats-url", config.nats_url, "--engine", "simulated")
    await asyncio.to_thread(role.says, " ready")
    role.close()
    assert await asyncio.to_thread(role.wait) == 0


async def test_a_gateway_that_rereads_its_keys_at_the_signal_drains_when_its_terminal_is_closed(
    on_terminal, bus: Bus, config: Config, tmp_path: Path
):
    file = tmp_path / "headrace.toml"
    assert main(["key", "add", "alice", "--config", str(file)]) == 0
    options = ("--config", str(file), "--nats-url", config.nats_url, "--http-port", "0")
    role = on_terminal(*HEADRACE, "run", "gateway", *options)
    await asyncio.to_thread(role.says, " ready")
    os.kill(role.process.pid, signal.SIGHUP)
    file.write_text("nonsense = 1\n")
    await asyncio.to_thread(role.says, "The API keys stay as they were")
    role.close()
    assert await asyncio.to_thread(role.wait) == 0
