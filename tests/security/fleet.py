"""Roles on a server with accounts, each with the credentials of its user."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support import ROOT, NatsServer, wait_until


@contextmanager
def role(server: NatsServer, user: str, name: str, folder: Path) -> Iterator[None]:
    """A role that runs for the duration of the block, in a process of its own."""
    environ = os.environ | {
        "HEADRACE_NATS_URL": f"nats://{user}:{user}@127.0.0.1:{server.port}",
        "HEADRACE_STATE_DIR": str(folder),
        "HEADRACE_ENGINE": "simulated",
        "HEADRACE_HTTP_PORT": "0",
        "PYTHONPATH": str(ROOT),
    }
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        command = [sys.executable, "-m", "pipeline.cli", "run", name]
        process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        wait_until(lambda: "lifecycle: ready" in log.read_text() or process.poll() is not None, what=name)
        assert process.poll() is None, log.read_text()
        yield
    finally:
        process.terminate()
        process.wait(60)
