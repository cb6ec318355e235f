"""An exact request is computed equally to the last bit, whatever runs beside it and whatever interrupts it."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from consumers.engines.local.blas import selected, threads_environment

pytest.importorskip("mlx_lm", reason="MLX is not installed")

PROGRAM = Path(__file__).with_name("exactly.py")
ROOT = Path(__file__).resolve().parents[5]


def differing(blas: str, *, exact: bool) -> dict[str, int]:
    """How many tokens of each disturbed run were sampled from other probabilities than alone."""
    command = [sys.executable, str(PROGRAM), blas, json.dumps(exact)]
    environ = {"PYTHONPATH": str(ROOT)} | threads_environment(1)  # two threads would wait for each other beside others
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["alone"]) >= 24
    return {
        name: sum(one != other for one, other in zip(digests, found["alone"], strict=False))
        for name, digests in found["disturbed"].items()
    }


def test_an_exact_request_does_not_depend_on_what_runs_beside_it_or_interrupts_it():
    library = asyncio.run(selected("auto", 0))
    blas = library.library if library else ""
    assert set(differing(blas, exact=True).values()) == {0}
    if library:  # a fast library rounds differently for one row and for several: the comparison notices it
        assert differing(blas, exact=False)["in a batch"]
