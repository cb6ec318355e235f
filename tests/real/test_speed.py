"""The default model computes at this machine's speed, and both engines share its cores."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

pytestmark = pytest.mark.real


@pytest.mark.skipif(sys.platform != "linux", reason="MLX uses the GPU, or has a fast BLAS")
def test_mlx_has_a_fast_blas_and_float32_weights(real, figure):
    screen = (real.folder / "up.log").read_text()
    line = next(line for line in screen.splitlines() if "MLX's CPU build at" in line)
    figure(line.strip())
    assert "its own BLAS" not in line
    assert "float32 weights" in line


def test_answers_at_once_are_faster_than_one_after_another(real, figure):
    def ask(index: int) -> int:
        body = {"messages": [{"role": "user", "content": f"Tell me story number {index}."}], "max_tokens": 32}
        answer = httpx.post(f"{real.http}/v1/chat/completions", json=body, timeout=100, trust_env=False)
        return int(answer.raise_for_status().json()["usage"]["completion_tokens"])

    began_at = time.monotonic()
    alone = ask(0) / (time.monotonic() - began_at)
    began_at = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        together = sum(pool.map(ask, range(8))) / (time.monotonic() - began_at)
    figure(f"{alone:.1f} tokens/s alone, {together:.1f} for eight at once")
    assert together > alone
