"""Test tools that are not fixtures: a nats-server that tests kill and restart, and waiting for conditions."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from pipeline.up.server import find_conf, find_server

ROOT = Path(__file__).resolve().parents[1]
# Long enough for a machine under load: it ends a test that hangs and measures nothing.
START_TIMEOUT_S = 60.0
MEMORY = Path("/dev/shm")
# Far above the room at which a pipeline reports that its store is low.
MEMORY_NEEDED = 4 << 30


@contextmanager
def quick_folder() -> Iterator[Path]:
    """A temporary folder, in memory if there is room, where a store syncs at once. For tests not of the disk."""
    roomy = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > MEMORY_NEEDED
    with tempfile.TemporaryDirectory(prefix="headrace-", dir=MEMORY if roomy else None) as folder:
        yield Path(folder)


class NatsServer:
    """A nats-server with the embedded broker's settings and its own store. Tests can kill it and start it again."""

    def __init__(self, store: Path, *, conf: str = "embedded.conf") -> None:
        self._store = store
        self._conf = conf
        self._process: subprocess.Popen[bytes] | None = None
        self.port = -1

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start the server and wait until it accepts connections. A second start uses the same port and store."""
        conf = find_conf(self._conf)
        options = ["-c", conf, "--port", self.port]
        if re.search(r"^ *store_dir:", conf.read_text(), re.MULTILINE) is None:
            options += ["--store_dir", self._store]
        command = map(str, [find_server(), *options, "--ports_file_dir", self._store])
        with (self._store / "log").open("ab") as log:
            self._process = subprocess.Popen(list(command), stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        ports = self._store / f"nats-server_{self._process.pid}.ports"
        # The server writes the file in steps; its last byte is the closing brace.
        wait_until(lambda: ports.exists() and ports.read_bytes().endswith(b"}"), what="nats-server")
        self.port = int(msgspec.json.decode(ports.read_bytes())["nats"][0].rsplit(":", 1)[1])

    def kill(self) -> None:
        """Kill the server, as a power failure does."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(START_TIMEOUT_S)
            self._process = None


def wait_until(condition: Callable[[], bool], *, what: str, timeout_s: float = START_TIMEOUT_S) -> None:
    """Wait until condition is true; the test fails if that takes longer than timeout_s."""
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at, f"{what}: not within {timeout_s} s"
        time.sleep(0.01)
