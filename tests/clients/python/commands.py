"""Clients that are commands: each is started in the scratch folder, which is its home too, and reads no terminal."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from cell import SLOW, cancelled, counts, until

HOME = Path.cwd()
# The simulated engine answers what no model of this size could read. Its answers begin so.
SIMULATED = "[simulated]"
PATIENCE_S = 90
# opencode works in $PWD, whatever its working directory is.
_PLACE = {"HOME": str(HOME), "PWD": str(HOME), "XDG_CONFIG_HOME": str(HOME / ".config")}


def _started(words: tuple[str, ...], environ: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=HOME,
        env={**os.environ, **_PLACE, **environ},
        start_new_session=True,
    )


def _end(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def output(*words: str, **environ: str) -> str:
    """All that the command prints."""
    process = _started(words, environ)
    try:
        return process.communicate(timeout=PATIENCE_S)[0]
    finally:
        _end(process, signal.SIGKILL)
        process.wait()


def is_cancelled_by_its_end(*words: str, **environ: str) -> None:
    """The command asks the slow pipeline, and is killed while the answer is written: its request is cancelled."""
    until(lambda: counts(SLOW)["running"] == 0, "the slow pipeline is idle")
    with cancelled():
        process = _started(words, environ)
        try:
            until(lambda: counts(SLOW)["running"] > 0 or process.poll() is not None, "a request runs", PATIENCE_S)
            assert process.poll() is None, process.communicate()[0]
        finally:
            _end(process, signal.SIGKILL)
            process.communicate()
