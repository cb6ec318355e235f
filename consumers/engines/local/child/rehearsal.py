"""On an NVIDIA GPU, runs each kind of operation once before the first request, so that its kernels are compiled.

MLX for CUDA compiles a kernel when an operation first needs it, which takes tens of seconds for quantized weights.
There is one kernel for each number of rows that are read together, in powers of two from 16 to 256, and one for eight
or more sequences that decode together (`mlx/backend/cuda/quantized/qmm` of MLX 0.32). Without this rehearsal, requests
would wait for them. MLX keeps compiled kernels in a folder, so only the first start takes long. MLX for Metal ships
its kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

_ROWS: Final = (2, 16, 32, 64, 128, 256)
_TOGETHER: Final = (2, 7)
"""The rows of two prompts that are read together. With them, eight sequences decode."""

_STEPS: Final = 2

Way = tuple[Callable[[Any], Any], list[Callable[[Any, Any], Any]]]
"""The sampler of a sequence, and what is applied to its scores before that."""


def rehearse(batch: Any, vocabulary: int, context_tokens: int, ways: Sequence[Callable[[], Way]]) -> None:
    """Read prompts of all lengths that matter, decode them together, suspend one and resume it. The batch stays empty.

    Args:
        batch: a `Batch` on MLX, without sequences.
        vocabulary: the number of the model's tokens.
        context_tokens: the longest sequence that the model takes.
        ways: how answers are sampled; the sequences have them in turn.
    """
    most = context_tokens - _STEPS - 2
    rows = [min(count, most) for count in (*_ROWS, *_TOGETHER)]
    for key, count in enumerate(rows):
        # The last token of a prompt is read with those of the other sequences.
        sampler, processors = ways[key % len(ways)]()
        batch.add(key, [(key + at) % vocabulary for at in range(count + 1)], sampler, processors)
    pieces = [(key, count + 1) for key, count in enumerate(rows)]
    alone, together = pieces[: len(_ROWS)], pieces[len(_ROWS) :]
    for piece in alone:
        batch.read([piece])
    batch.read(together)
    for _ in range(_STEPS):
        batch.step()
    batch.suspend([0])
    batch.resume([0])
    batch.step()
    for key, _ in pieces:
        batch.remove(key)
