"""The files of stored prompts of one model, in a folder of the user's cache that one process uses at a time.

A file appears under its name only when all of it is on disk, so none is ever read in part, whatever ends the process or
the machine. They hold what was said: the folder is open to the user alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any, Final

import platformdirs

log = logging.getLogger(__name__)

_SUFFIX: Final = ".safetensors"
_UNFINISHED: Final = f"unfinished{_SUFFIX}"
_IDENTITY: Final = "identity"
"""A file with the identity in its first line, and the model's folder in its second one."""

_LEAST_FREE_BYTES: Final = 2 << 30
"""No file is written if less than this is free: the broker's store, which may be on this disk, needs it more."""


class PromptFiles:
    """The files of one model.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def open(cls, model: Path, identity: str) -> PromptFiles | None:
        """The files for a model folder. Those of another identity are removed, and those of models that are gone.

        Args:
            model: the folder of the model.
            identity: of all that determines the contents of a cache.

        Returns:
            None if there is no such folder, or if another process uses it.
        """
        place = str(model.resolve())
        root = platformdirs.user_cache_path("headrace", appauthor=False) / "prompts"
        folder = root / hashlib.sha256(os.fsencode(place)).hexdigest()[:16]
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
            _take(folder / "lock")
            files = cls(folder)
            files._accept(identity, place)
            _remove_of_lost_models(root)
        except BlockingIOError:
            log.warning("Another process stores the prompts of this model in %s. This one stores none.", folder)
            return None
        except OSError as error:
            log.warning("Prompts cannot be stored in %s (%s).", folder, error)
            return None
        return files

    def names(self) -> list[tuple[str, int]]:
        """The names and sizes of all files, in bytes. The one that was used least recently is first."""
        about = [(file.stat(), file.stem) for file in self._folder.glob(f"*{_SUFFIX}") if file.name != _UNFINISHED]
        return [(name, at.st_size) for at, name in sorted(about, key=lambda one: one[0].st_mtime_ns)]

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        return self._path(name).exists()

    def write(self, name: str, cache: list[Any]) -> int:
        """Write a cache. Returns the size of its file.

        Raises:
            OSError: it cannot be written, or too little room would be left.
        """
        from mlx_lm.models.cache import save_prompt_cache

        free = shutil.disk_usage(self._folder).free
        if free < _LEAST_FREE_BYTES:
            raise OSError(f"only {free >> 20} MiB of the disk are free, of which the broker's store may need all")
        unfinished = self._folder / _UNFINISHED
        try:
            save_prompt_cache(str(unfinished), cache)
        except RuntimeError as error:  # of MLX, for any failure
            raise OSError(str(error)) from error
        with unfinished.open("rb") as written:
            os.fsync(written.fileno())
            size = os.fstat(written.fileno()).st_size
        unfinished.replace(self._path(name))
        return size

    def read(self, name: str) -> list[Any]:
        """The cache of a file, as a cache of each layer. Its arrays are read when they are used."""
        from mlx_lm.models.cache import load_prompt_cache

        path = self._path(name)
        with contextlib.suppress(OSError):
            os.utime(path)
        return list(load_prompt_cache(str(path)))

    def remove(self, names: list[str]) -> None:
        """Remove files. Unknown names are ignored."""
        for name in names:
            with contextlib.suppress(OSError):
                self._path(name).unlink()

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}{_SUFFIX}"

    def _accept(self, identity: str, model: str) -> None:
        """Remove what a model of another identity has left."""
        file, text = self._folder / _IDENTITY, f"{identity}\n{model}\n"
        if not file.exists() or _read(file) != text:
            for old in self._folder.glob(f"*{_SUFFIX}"):
                old.unlink()
            file.write_bytes(os.fsencode(text))
        (self._folder / _UNFINISHED).unlink(missing_ok=True)


def _read(identity: Path) -> str:
    """The text of a file, whatever bytes it has: a path need not be UTF-8, and a disk can damage it."""
    return os.fsdecode(identity.read_bytes())


def _remove_of_lost_models(root: Path) -> None:
    for file in root.glob(f"*/{_IDENTITY}"):
        with contextlib.suppress(OSError):
            _, _, model = _read(file).strip().partition("\n")
            if not Path(model).exists():
                shutil.rmtree(file.parent)


def _take(lock: Path) -> None:
    """Hold a lock until this process ends.

    Raises:
        BlockingIOError: another process holds it.
    """
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
