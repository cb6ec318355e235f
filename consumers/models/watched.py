"""Runs a command, watches its progress, and ends it when the caller is interrupted."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

_LOOK_EVERY_S: Final = 0.1
_SAID_CHARS: Final = 300
_END_BYTES: Final = 4096


class Headway(NamedTuple):
    """How far the getting of a model is: what is done, and how many bytes of how many; 0 of 0 if that is unknown."""

    what: str
    done: int = 0
    total: int = 0


Note = Callable[[Headway], None]
"""Called several times a second. What it raises ends the getting at once."""


class CommandFailed(Exception):
    """A command ended with an error. The message is the last line that it printed, `output` the end of all of it."""

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output


def watch(command: Sequence[str], look: Callable[[str], None], *, environ: Mapping[str, str] = os.environ) -> None:
    """Run a command until it ends. It is killed if look raises.

    Args:
        command: the program and its arguments.
        look: called several times a second with the last line of the command's standard output.
        environ: its environment.

    Raises:
        CommandFailed: the command cannot be started, or ended with an exit code other than 0.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environ)
        except OSError as error:
            raise CommandFailed(f"{command[0]}: {error.strerror}") from None
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_LOOK_EVERY_S)
                look(_last_line(out.fileno()))
                if process.returncode is not None:
                    break
        finally:
            process.kill()
            process.wait()
        if process.returncode != 0:
            said = _end(err.fileno())
            raise CommandFailed(_last_line(err.fileno()) or f"exit code {process.returncode}", said)


def largest_file(folder: Path) -> int:
    """The size in bytes of the largest file below a folder: of a download, wherever the tool keeps it meanwhile."""
    return max(_sizes(folder), default=0)


def total_size(folder: Path) -> int:
    """The size in bytes of all files below a folder, which others may be writing or removing."""
    return sum(_sizes(folder))


def _sizes(folder: Path) -> Iterator[int]:
    # Unlike `Path.rglob`, `os.walk` passes over a folder that is removed meanwhile.
    for parent, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):
                yield (Path(parent) / file).stat().st_size


def _last_line(descriptor: int) -> str:
    lines = _end(descriptor).splitlines()
    return lines[-1].strip()[-_SAID_CHARS:] if lines else ""


def _end(descriptor: int) -> str:
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, _END_BYTES, max(0, size - _END_BYTES)).decode(errors="replace").strip()
