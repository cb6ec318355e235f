"""`headrace pull` and `headrace models`, as typed at a terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.consumers.models.ggufs import written
from tests.support import ROOT


@pytest.fixture
def headrace(tmp_path: Path):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pipeline.cli", *arguments, "--models-dir", str(tmp_path / "models")],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )

    return run


def test_a_model_is_pulled_listed_and_removed(headrace, tmp_path: Path):
    empty = headrace("models")
    assert empty.stdout == f"No models are stored in {tmp_path / 'models'}. `headrace pull smollm2` fetches one.\n"
    file = written(tmp_path / "qwen.gguf", "qwen2")
    pulled = headrace("pull", str(file))
    assert pulled.returncode == 0, pulled.stderr
    assert pulled.stdout == "qwen is stored. Use it with --model qwen.\n"
    assert "converting qwen" in pulled.stderr
    for command in (("models",), ("models", "list")):
        assert headrace(*command).stdout.split() == ["qwen", "1", "MB", str(file)]
    removed = headrace("models", "rm", "qwen")
    assert removed.stdout == "Removed qwen (1 MB).\n"
    assert headrace("models").stdout == empty.stdout


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("models", "rm", "none"), 'headrace: There is no stored model "none". `headrace models` lists them.\n'),
        (("pull", "smolm2"), 'headrace: There is no model "smolm2". Known and stored models: smollm2, demo. '),
    ],
)
def test_a_model_that_is_not_there_is_an_error(headrace, command, said: str):
    done = headrace(*command)
    assert done.returncode == 1
    assert done.stderr.startswith(said)


def test_the_doctor_says_what_the_setting_names(headrace):
    done = headrace("doctor", "--model", "smollm2", "--nats-url", "nats://127.0.0.1:9", "--offline")
    assert "fail  model        SmolLM2-135M-Instruct (Apache-2.0, 93 MB) is not stored yet\n" in done.stdout
    assert "-> `headrace pull smollm2` or the first start fetches it" in done.stdout
