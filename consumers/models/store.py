"""The models in the user's cache folder: one folder each, put in place in one step.

    <models>/<folder>/model.gguf    the GGUF file, if the model was fetched as one
    <models>/<folder>/mlx/          the model in MLX's format
    <models>/<folder>/source.json   its name, where it came from, and the version of the conversion
    <models>/.part/<folder>/        a model that is not whole yet
    <models>/.gone/<folder>         a model that is being removed
    <models>/.lock/<folder>         locked by the process that writes any of the three

A process killed at any time leaves at most a part, which the next one continues or replaces.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec
import platformdirs
from msgspec import Struct

from consumers.models.watched import total_size
from pipeline.process.lifecycle import StartError
from pipeline.wire.validation import UNREADABLE

CONVERSION: Final = 1
"""Increased when the conversion from GGUF changes. Models that an older version converted are converted again."""

GGUF: Final = "model.gguf"
MLX: Final = "mlx"
_SOURCE: Final = "source.json"
_LOOK_EVERY_S: Final = 0.1
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)?")


class ModelError(StartError):
    """A model cannot be got, converted or removed. The message has the reason and what to do."""


class Origin(Struct, omit_defaults=True):
    """The content of `source.json`.

    Attributes:
        name: the name of the model in answers and in the setting `model`.
        origin: where it came from: a requirement, a repository, an address or a file.
        conversion: the version of the conversion that made the MLX folder; 0 if it was fetched as such.
        bytes, mtime_ns: of the GGUF file, if it is not in the store.
        serve: workers serve it, although no setting names it: a client has asked for it.
    """

    name: str
    origin: str
    conversion: int = 0
    bytes: int = 0
    mtime_ns: int = 0
    serve: bool = False


class StoredModel(Struct, frozen=True):
    """A model in the store, as `headrace models` lists it."""

    name: str
    origin: str
    bytes: int
    folder: Path


class Store:
    """The folder of stored models. Each of its folders is written only under its lock.

    Args:
        root: the folder; empty for the one in the user's cache folder.
    """

    def __init__(self, root: str = "") -> None:
        cache = platformdirs.user_cache_path("headrace", appauthor=False)
        self.root = Path(root).expanduser().absolute() if root else cache / "models"

    def folder(self, name: str) -> Path:
        """The folder of a model, whether or not it exists.

        Raises:
            ModelError: name is not a possible name of a stored model.
        """
        if _NAME.fullmatch(name) is None:
            raise ModelError(f'"{name}" is not the name of a stored model. `headrace models` lists them.')
        return self.root / name.replace("/", "--")

    def whole(self, name: str) -> Origin | None:
        """What is stored under a name, or None if nothing is, or not with this version's conversion."""
        source = self.source(name)
        is_current = source is not None and source.conversion in (0, CONVERSION)
        return source if is_current and (self.folder(name) / MLX / "config.json").is_file() else None

    def source(self, name: str) -> Origin | None:
        """What is stored under a name, or None; an older version may have converted it."""
        return _read(self.folder(name) / _SOURCE)

    def has(self, name: str) -> bool:
        """Whether a text is the name of a stored model."""
        return _NAME.fullmatch(name) is not None and self.source(name) is not None

    def gguf(self, name: str) -> Path | None:
        """The GGUF file of a stored model, or None if it has none."""
        file = self.folder(name) / GGUF
        return file if file.is_file() else None

    def models(self) -> list[StoredModel]:
        """Everything in the store that is whole, by name."""
        found = [
            StoredModel(source.name, source.origin, total_size(file.parent), file.parent)
            for file in self.root.glob(f"*/{_SOURCE}")
            if (source := _read(file)) is not None
        ]
        return sorted(found, key=lambda model: model.name)

    @contextlib.contextmanager
    def locked(self, name: str, waiting: Callable[[], None]) -> Iterator[Path]:
        """Lock a model for the time of the block, and yield the folder of its part.

        Args:
            name: the name of the model.
            waiting: called again and again while another process holds the lock. It can raise to give up.

        Raises:
            ModelError: the store cannot be written.
        """
        folder = self.folder(name)
        part, lock = self.root / ".part" / folder.name, self.root / ".lock" / folder.name
        try:
            part.mkdir(parents=True, exist_ok=True)
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = lock.open("ab")
        except OSError as error:
            raise ModelError(
                f"Cannot write to {self.root}: {error.strerror}. --models-dir names another folder."
            ) from None
        with file:
            while not _try_lock(file.fileno()):
                waiting()
                time.sleep(_LOOK_EVERY_S)
            part.mkdir(exist_ok=True)  # the process that held the lock may have put its own in place
            yield part
            with contextlib.suppress(OSError):
                part.rmdir()  # succeeds if nothing was written to it

    def put(self, name: str, part: Path, source: Origin) -> None:
        """Put a part in place in one step. Called under the lock of name."""
        before = self.source(name)
        source.serve |= before is not None and before.serve
        (part / _SOURCE).write_bytes(msgspec.json.encode(source))
        for file in part.rglob("*"):
            if file.is_file():
                _flush(file)
        folder = self.folder(name)
        self._discard(folder)
        part.rename(folder)

    def serve(self, name: str) -> None:
        """Note that workers serve a stored model, although no setting names it. A read-only store does not keep it."""
        source = self.source(name)
        if source is None or source.serve:
            return
        source.serve = True
        file = self.folder(name) / _SOURCE
        new = file.with_name(f"{_SOURCE}.new")
        with contextlib.suppress(OSError):
            new.write_bytes(msgspec.json.encode(source))
            _flush(new)
            new.replace(file)

    def served(self) -> list[str]:
        """The stored models that `serve` has noted, by name."""
        sources = [_read(file) for file in self.root.glob(f"*/{_SOURCE}")]
        return sorted(source.name for source in sources if source is not None and source.serve)

    def take_back(self, name: str, part: Path) -> None:
        """Move the GGUF file of a stored model into its part, so that it is converted again."""
        if (file := self.gguf(name)) is not None:
            file.replace(part / GGUF)

    def remove(self, name: str) -> int:
        """Remove a model and what is left of an interrupted fetch of it. Returns the number of bytes.

        Raises:
            ModelError: there is no such model, or it cannot be removed.
        """
        folder = self.folder(name)
        part = self.root / ".part" / folder.name
        if not folder.is_dir() and not part.is_dir():
            raise ModelError(f'There is no stored model "{name}". `headrace models` lists them.')

        def busy() -> None:
            raise ModelError(f"Another process is fetching {name}. Stop it first.")

        with self.locked(name, busy):
            freed = total_size(folder) + total_size(part)
            self._discard(folder)
            shutil.rmtree(part, ignore_errors=True)
        return freed

    def _discard(self, folder: Path) -> None:
        """Remove a folder. It is renamed first, so that it is never there in part."""
        gone = self.root / ".gone" / folder.name
        gone.parent.mkdir(exist_ok=True)
        shutil.rmtree(gone, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def check_room(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk of a folder has no room for.

    Raises:
        ModelError: fewer than so many bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ModelError(
            f"The model takes about {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free at {folder}. "
            "Make room, or name another folder with --models-dir."
        )


def _read(file: Path) -> Origin | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Origin)
    except (OSError, *UNREADABLE):
        return None


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _flush(file: Path) -> None:
    """Write a file through to the disk, so that a power failure after the rename leaves no empty file."""
    with file.open("rb") as content:
        os.fsync(content.fileno())
