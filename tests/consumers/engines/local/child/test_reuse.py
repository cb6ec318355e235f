"""A sequence that goes on from a kept cache gives the same text, whatever kind of cache the model has."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="MLX is not installed")

PROGRAM = Path(__file__).with_name("reused.py")
SHAPES = ["full", "sliding", "convolutional", "hybrid", "recurrent"]


def reused(shape: str, requests: int, *options: str, seed: int = 1) -> dict:
    root = Path(__file__).resolve().parents[5]
    command = [sys.executable, str(PROGRAM), shape, str(seed), str(requests), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("shape", ["full", "sliding", "recurrent"])
def test_conversations_with_forks_have_the_same_texts_with_and_without_what_was_kept(shape):
    result = reused(shape, 20)
    assert result["answers"] >= 20
    assert result["distinct"] == result["answers"]
    assert result["differ"] == 0
    assert result["reused"] >= 3
    assert result["reused alone"] == 0
    assert result["suspensions"]
    assert result["most"] <= result["budget"]


@pytest.mark.parametrize("shape", ["full", "sliding"])
def test_they_have_the_same_texts_when_each_process_has_only_what_earlier_ones_have_stored(shape, tmp_path):
    result = reused(shape, 20, "--stored", str(tmp_path))
    assert result["differ"] == 0
    assert result["reused"] >= 3
    assert result["most"] <= result["budget"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("shape", SHAPES)
def test_two_hundred_conversations_have_the_same_texts_with_what_is_stored(shape, tmp_path):
    assert reused(shape, 200, "--stored", str(tmp_path), seed=3)["differ"] == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("shape", SHAPES)
def test_two_hundred_conversations_have_the_same_texts(shape):
    assert reused(shape, 200, seed=2)["differ"] == 0


def test_a_wrong_cache_does_not_pass_unnoticed():
    assert reused("full", 20, "--wrong")["differ"] >= 3
