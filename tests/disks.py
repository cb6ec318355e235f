"""A small disk that a test fills."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Disk:
    """A small filesystem that a balloon fills."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._balloon = folder / "balloon"

    def fill(self, *, but: int = 0) -> None:
        """Take all room, or all but so many bytes."""
        if but:
            with self._balloon.open("wb") as balloon:
                os.posix_fallocate(balloon.fileno(), 0, shutil.disk_usage(self.folder).free - but)
            return
        file = os.open(self._balloon, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        try:
            for size in (1 << 16, 1 << 12):
                try:
                    while True:
                        os.write(file, bytes(size))
                except OSError:
                    pass
        finally:
            os.close(file)

    def empty(self) -> None:
        self._balloon.unlink()


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Disk]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no tmpfs can be mounted here: {getattr(error, 'stderr', error)}")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)
