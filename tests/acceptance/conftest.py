"""Eight checks of a pipeline as its user sees it, over HTTP; `--report` ends them with a table of their figures.

A test names its check with `@pytest.mark.check("...")` and reports what it measured with the fixture `figure`. A check
can have several tests; it has passed if all of them have.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from tests.e2e.conftest import Pipeline, running
from tests.support import ROOT, quick_folder, wait_until

REPORT_COLUMNS = 118
# No Ollama server is looked for, so `up` starts the stand-in on every machine.
NO_OLLAMA = ("--ollama-host", "none")
ROLES = ("mlx", "ollama", "router", "monitor", "gateway")


@dataclass
class Check:
    """The result of one check so far."""

    passed: bool = True
    figures: list[str] = field(default_factory=list)


CHECKS = pytest.StashKey[dict[str, Check]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report", action="store_true", help="end with a table of the acceptance checks")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "check(title): is part of one of the acceptance checks")
    config.stash[CHECKS] = {}


def check_of(item: pytest.Item) -> Check | None:
    mark = item.get_closest_marker("check")
    return None if mark is None else item.config.stash[CHECKS].setdefault(mark.args[0], Check())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if (check := check_of(item)) is not None and not report.passed:
        check.passed = False
    return report


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Adds a line of measured figures to the report."""
    check = check_of(request.node)
    assert check is not None, "only a check has figures"
    return check.figures.append


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.getoption("report", default=False):
        return
    table = Table(box=None, header_style="bold", pad_edge=False, show_edge=False)
    for heading in ("", "check", "result", "figures"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "result")
    for number, (title, check) in enumerate(config.stash[CHECKS].items(), 1):
        result = "passed" if check.passed else "FAILED"
        table.add_row(str(number), title, result, "\n".join(check.figures), end_section=True)
    terminalreporter.write_line("")
    Console(width=REPORT_COLUMNS, highlight=False, markup=False).print(table)


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Pipeline]:
    """`headrace up` on its embedded defaults: broker, MLX with the demo model, the stand-in for Ollama."""
    with quick_folder() as folder, running(folder, *NO_OLLAMA) as started:
        yield started


@pytest.fixture(scope="module")
def pids(pipeline: Pipeline) -> dict[str, int]:
    """The processes of the roles as they were at first."""
    return pids_of(pipeline)


def pids_of(pipeline: Pipeline) -> dict[str, int]:
    return {role: pipeline.pid(f"pipeline.cli run {role}") for role in ROLES}


@contextmanager
def standin(folder: Path, model: str) -> Iterator[str]:
    """A stand-in with one model of this name; yields its URL."""
    ready = folder / "standin.json"
    command = [sys.executable, "-m", "consumers.standin", "--name", model, "--ready-file", str(ready)]
    environ = {**os.environ, "HEADRACE_ENGINE": "simulated"}
    process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(ready.exists, what="the stand-in", timeout_s=60)
        yield json.loads(ready.read_text())["url"]
    finally:
        process.terminate()
        process.wait(20)
