"""Processes whose wall clock is off, as libfaketime makes it; their monotonic clock stays as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


def clock_off_by(offset_s: float) -> dict[str, str]:
    """What a process's environment needs for a system clock that is off by so many seconds.

    Skips the test where the library does not work: it is built for Linux on one kind of processor.
    """
    environ = {
        "LD_PRELOAD": str(_library()),
        "FAKETIME": f"{offset_s:+.0f}s",
        # Two names in different versions of the library.
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    command = [sys.executable, "-c", "import time; print(time.time())"]
    said = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environ)
    true = subprocess.run(command, capture_output=True, text=True, check=True)
    if said.returncode or abs(float(said.stdout) - float(true.stdout) - offset_s) > 20:
        pytest.skip(f"libfaketime does not work here: {said.stderr}")
    return environ


def _library() -> Path:
    found = find_spec("libfaketime")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "vendor/libfaketime/src/libfaketime.so.1"
