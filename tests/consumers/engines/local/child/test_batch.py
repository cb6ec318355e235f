"""Sequences that leave the batch and come back go on exactly, whatever kind of cache the model has."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="MLX is not installed")

PROGRAM = Path(__file__).with_name("disturbed.py")
SHAPES = ["sliding", "convolutional", "hybrid", "recurrent"]


def disturbed(shape: str, suspensions: int, *, seed: int = 5, option: str = "") -> dict:
    root = Path(__file__).resolve().parents[5]
    command = [sys.executable, str(PROGRAM), shape, str(seed), str(suspensions), *([option] if option else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_text_that_was_suspended_equals_an_undisturbed_one(shape):
    result = disturbed(shape, 25)
    assert result["suspensions"] >= 25
    assert result["drops"]
    assert min(result["distinct"]) >= 20
    assert set(result["differ"]) == {0}


@pytest.mark.parametrize("shape", ["sliding", "recurrent"])
def test_a_text_that_was_suspended_goes_on_in_its_form(shape):
    result = disturbed(shape, 25, option="--guided")
    assert result["drops"]
    assert set(result["differ"]) == {0}
    assert result["formed"] == [True] * 3


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", SHAPES)
def test_five_hundred_suspensions_change_nothing(shape, seed):
    assert set(disturbed(shape, 100, seed=seed)["differ"]) == {0}


@pytest.mark.parametrize("shape", SHAPES)
def test_resuming_one_token_off_does_not_pass_unnoticed(shape):
    assert max(disturbed(shape, 25, option="--one-off")["differ"]) > 10


def test_the_size_of_a_cache_is_measured():
    sliding, recurrent = disturbed("sliding", 1), disturbed("recurrent", 1)
    # Six layers, one head of 16, keys and values in float32. Five of them keep 16 tokens.
    assert sliding["measured"] == [16 * 2 * 4, 0, [[16, 5 * 16 * 2 * 4]]]
    per_token, fixed, windows = recurrent["measured"]
    assert (per_token, windows) == (0, [])
    assert fixed > 0
    assert (sliding["reuse"], recurrent["reuse"]) == ("snapshots", "snapshots")
