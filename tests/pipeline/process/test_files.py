"""A process opens as many files as the system lets it, and the gateway holds no more connections than that."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from tests.support import ROOT

_SCRIPT = """
import logging, resource, sys
logging.basicConfig(format="%(message)s")
soft, hard = map(int, sys.argv[1:3])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
from pipeline.process.files import room_for
print(room_for(int(sys.argv[3])), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
HARD = resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def room(soft: int, hard: int, connections: int) -> tuple[list[int], str]:
    run = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *map(str, (soft, hard, connections))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(word) for word in run.stdout.split()], run.stderr


@pytest.mark.skipif(0 < HARD < 4096, reason="this machine allows fewer files")
def test_a_low_limit_is_raised_to_the_hard_one():
    assert room(256, 4096, 2000) == ([2000, 4096], "")


def test_a_low_hard_limit_bounds_the_connections_and_is_said():
    found, said = room(256, 256, 2000)
    assert found == [192, 256]
    assert "192 connections instead of 2000" in said
