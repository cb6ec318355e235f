"""What tests share and is no fixture: a nats-server one can kill and start again, and waiting for conditions."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from pipeline.up.server import find_conf, find_server

ROOT = Path(__file__).resolve().parents[1]
START_TIMEOUT_S = 20.0


class NatsServer:
    """A nats-server with the embedded broker's settings and a store of its own. It can be killed and started again."""

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
        """Start it, the second time on the same port and store, and wait until it accepts connections."""
        options = ["-c", find_conf(self._conf), "--port", self.port, "--store_dir", self._store]
        command = map(str, [find_server(), *options, "--ports_file_dir", self._store])
        with (self._store / "log").open("ab") as log:
            self._process = subprocess.Popen(list(command), stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        ports = self._store / f"nats-server_{self._process.pid}.ports"
        # It is complete once it is JSON.
        wait_until(lambda: ports.exists() and ports.read_bytes().endswith(b"}"), what="nats-server")
        self.port = int(msgspec.json.decode(ports.read_bytes())["nats"][0].rsplit(":", 1)[1])

    def kill(self) -> None:
        """As a power failure would."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(10)
            self._process = None


def wait_until(condition: Callable[[], bool], *, what: str, timeout_s: float = START_TIMEOUT_S) -> None:
    """Wait for condition, looking often; it is a failure where it does not come true in time."""
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at, f"{what}: not within {timeout_s} s"
        time.sleep(0.01)
