"""Versions of headrace that can be run: their trees, what they require, and the processes started from them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.revision import ROOT

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 40.0
_LOOK_EVERY_S = 0.05


class Broken(Exception):
    """A part that could not be carried through; the message says at which step."""


@dataclass(frozen=True, slots=True)
class Version:
    """One version of headrace that can be run: its tree, and an interpreter with what it requires."""

    name: str
    root: Path
    python: Path

    def environ(self, settings: Mapping[str, str]) -> dict[str, str]:
        """The environment in which this tree is imported, whatever is installed."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("HEADRACE_")}
        given = {"HEADRACE_MODEL": "headrace-demo"} | {f"HEADRACE_{key}": value for key, value in settings.items()}
        return inherited | given | {"PYTHONPATH": str(self.root)}

    def start(self, log: Path, *arguments: str, settings: Mapping[str, str]) -> Program:
        """`headrace` with these arguments, as a process group of its own."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(
                [str(self.python), "-m", "pipeline.cli", *arguments],
                cwd=self.root,
                env=self.environ(settings),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return Program(f"{self.name}: headrace {' '.join(arguments[:2])}", process, log)

    def call(self, *arguments: str) -> str:
        """What a command of this version prints.

        Raises:
            Broken: It fails.
        """
        command = [str(self.python), "-m", "pipeline.cli", *arguments]
        done = subprocess.run(
            command, cwd=self.root, env=self.environ({}), capture_output=True, text=True, check=False, timeout=60
        )
        if done.returncode:
            raise Broken(f"{self.name}: headrace {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout


@dataclass(frozen=True, slots=True)
class Program:
    """A running process of one version."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def last_words(self) -> str:
        """The last line of its log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "nothing"

    async def stop(self) -> None:
        """End it as Ctrl-C does, and wait for it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        await until(lambda: self.process.poll() is not None, f"{self.name} ends", timeout_s=STOP_TIMEOUT_S)

    def kill(self) -> None:
        """Kill it and all that it has started, at once."""
        for pid in [self.process.pid, *_descendants(self.process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def prepared(name: str, root: Path, folder: Path) -> Version:
    """A tree that can be run. It gets an environment of its own if it needs other packages than this one.

    Raises:
        Broken: Another tree is imported in its place.
    """
    python = Path(sys.executable)
    if _pins(root) != _pins(ROOT):
        environment = folder / f"venv-{name}"
        print(f"installing what {name} requires", flush=True)
        subprocess.run([python, "-m", "venv", environment], check=True)
        python = environment / "bin" / "python"
        install: list[str | Path] = [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--require-hashes",
        ]
        subprocess.run([*install, "-r", root / "requirements.txt"], check=True)
    version = Version(name, root, python)
    command = [str(python), "-c", "import pipeline; print(pipeline.__file__)"]
    found = subprocess.run(command, cwd=root, env=version.environ({}), capture_output=True, text=True, check=True)
    if root.resolve() not in Path(found.stdout.strip()).resolve().parents:
        raise Broken(f"{name} is imported from {found.stdout.strip()}, not from {root}")
    return version


def _pins(root: Path) -> set[str]:
    text = (root / "requirements.txt").read_text(encoding="utf-8")
    return set(re.findall(r"^[\w.\[\],-]+==\S+", text, re.MULTILINE))


async def until(condition: Callable[[], Any], what: str, *, timeout_s: float = START_TIMEOUT_S) -> None:
    """Wait for a condition, which may be a coroutine function.

    Raises:
        Broken: It has not come true in time.
    """
    give_up_at = time.monotonic() + timeout_s
    while True:
        found = condition()
        if await found if asyncio.iscoroutine(found) else found:
            return
        if time.monotonic() > give_up_at:
            raise Broken(f"not within {timeout_s:.0f} s: {what}")
        await asyncio.sleep(_LOOK_EVERY_S)


def _descendants(pid: int) -> list[int]:
    """The processes below one, as the system lists them now."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True)  # noqa: S607
    children: dict[int, list[int]] = defaultdict(list)
    for line in listed.stdout.splitlines():
        child, parent = map(int, line.split())
        children[parent].append(child)
    found, to_visit = [], [pid]
    while to_visit:
        below = children[to_visit.pop()]
        found += below
        to_visit += below
    return found
