"""The files that announce a running instance to other programs: `run.json` in its state folder, and the ready file.

Both contain one JSON object, `{"nats": url, "http": url or null, "pid": n}`, and are replaced in one step.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import platformdirs

from pipeline.config import Config
from pipeline.wire.validation import UNREADABLE

RUN_FILE = "run.json"
LOCK_FILE = "lock"


class Instance(msgspec.Struct):
    """The addresses of a running headrace. `http` is None if it has no HTTP gateway."""

    nats: str
    http: str | None
    pid: int


def state_dir(config: Config) -> Path:
    """Return the folder of the broker's store, the logs and `run.json`."""
    if config.state_dir:
        return Path(config.state_dir).expanduser().absolute()
    return platformdirs.user_state_path("headrace", appauthor=False)


def find(config: Config) -> Instance | None:
    """Return the instance that runs on the configured state folder, or None."""
    folder = state_dir(config)
    instance = read(folder / RUN_FILE)
    # After a power failure, another process can have the id.
    lives = instance is not None and process_lives(instance.pid) and _is_held(folder / LOCK_FILE)
    return instance if lives else None


def _is_held(lock: Path) -> bool:
    """Return whether a process holds a state folder's lock, also if this user may not look."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def read(file: Path) -> Instance | None:
    """Return the content of a run file or a ready file, or None if there is none."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Instance)
    except (OSError, *UNREADABLE):
        return None


def process_lives(pid: int) -> bool:
    """Return whether a process has this id. No process has the id 0."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def announced(instance: Instance, *files: Path) -> Iterator[None]:
    """Write the instance to the files, and remove them at the end of the block."""
    try:
        for file in files:
            private_file(file, msgspec.json.encode(instance) + b"\n")
        yield
    finally:
        for file in files:
            file.unlink(missing_ok=True)


def check_writable(file: Path) -> None:
    """Make the folder of a file that is written later, and see that it can be.

    Raises:
        OSError: it cannot.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    with tempfile.TemporaryFile(dir=file.parent):
        pass


def private_file(file: Path, content: bytes) -> None:
    """Write a file that only this user can read, in one step: the broker's URL can hold a password.

    It is a new file at first, so that no other user of a shared folder can have opened it before.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    whole = Path(name)
    try:
        with os.fdopen(number, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(number)
        whole.replace(file)
    except BaseException:
        whole.unlink(missing_ok=True)
        raise
