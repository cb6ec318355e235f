"""Whether a model computes sequences of different lengths together as it computes each alone.

Some models of mlx-lm have masks that are wrong for padded sequences, or caches that cannot be merged. Both ways read
the same tokens, so that one different choice does not lead them apart, and the scores of all tokens are compared. What
rounding does is measured on the same model: a prompt that is read in other pieces is rounded differently too.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import platformdirs

from consumers.engines.local.child.alone import LoneSequences
from consumers.engines.local.child.batch import MlxBatch

log = logging.getLogger(__name__)

_SHORT: Final = 4
_LONG: Final = 11
_PIECES: Final = (1, 3)
"""Another way of reading the short prompt. Its last token is read by itself in any case."""

_ROUNDING: Final = 5.0
"""Scores may differ by this many times what the rounding of one prompt read in two ways amounts to."""

_QUICK_S: Final = 0.2
"""That a model passed a test which took longer is remembered."""

_REVISION: Final = "1"
"""Of this test. Another one finds other faults."""

_LEAST: Final = 0.05
"""Scores may differ by this part of their spread in any case. A mask that is wrong moves them by a third of it."""

Scores = list[Any]


def tested(model: Any, vocabulary: int, identity: str, *, on_cpu: bool) -> str:
    """As `fault_of_batches`, without a test if the model passed one at an earlier start.

    Args:
        model, vocabulary, on_cpu: as there.
        identity: of the model's files, and of what computes them.
    """
    file = platformdirs.user_cache_path("headrace", appauthor=False) / "batches" / identity
    if file.exists():
        return ""
    began = time.monotonic()
    fault = fault_of_batches(model, vocabulary, on_cpu=on_cpu)
    if not fault and time.monotonic() - began > _QUICK_S:
        with contextlib.suppress(OSError):  # it is tested again next time
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    if fault:
        log.warning("Requests to this model run one at a time: %s.", fault)
    return fault


def identity_of(folder: Path, *besides: str) -> str:
    """A name for the files of a model, with what computes them: the versions of MLX and mlx-lm, and `besides`."""
    parts = [_REVISION, metadata.version("mlx"), metadata.version("mlx-lm"), *besides]
    for file in sorted(folder.glob("*")):
        about = file.stat()
        parts.append(f"{file.name} {about.st_size} {about.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def fault_of_batches(model: Any, vocabulary: int, *, on_cpu: bool) -> str:
    """Why the model cannot compute sequences together, in words; empty if it can."""
    short, long = _prompt(_SHORT, vocabulary, 7), _prompt(_LONG, vocabulary, 11)
    try:
        alone = [_alone(model, tokens, [len(tokens)]) for tokens in (short, long)]
        together = _together(model, short, long, on_cpu=on_cpu)
        distance = max(_distance(one, other) for one, other in zip(alone, together, strict=True))
        if distance <= _LEAST:
            return ""
        noise = _distance(alone[0], _alone(model, short, _PIECES))
    except Exception as error:
        log.debug("The sequences of this model cannot be computed together.", exc_info=True)
        return f"{type(error).__name__}: {error}"
    log.debug("Together, scores differ by %.2g of their spread; by rounding alone %.2g.", distance, noise)
    if distance <= _ROUNDING * noise:
        return ""
    return f"sequences computed together have other scores than alone ({distance:.0%} of their spread)"


def _prompt(length: int, vocabulary: int, stride: int) -> list[int]:
    """Different tokens, from all over the vocabulary."""
    return [(1 + stride * stride * at * max(1, vocabulary // 101)) % vocabulary for at in range(length)]


def _alone(model: Any, tokens: list[int], pieces: Sequence[int]) -> Scores:
    """The scores after a prompt, and after each of the next tokens."""
    lone, scores = LoneSequences(model), list[Any]()
    lone.add(0, tokens, _noting(scores, tokens), [])
    for count in pieces:
        lone.read([(0, count)])
    lone.step()
    lone.close()
    return scores


def _together(model: Any, short: list[int], long: list[int], *, on_cpu: bool) -> tuple[Scores, Scores]:
    """The same of two prompts that are read and continued together. In between, the short one leaves and comes back."""
    batch, scores = MlxBatch(model, on_cpu=on_cpu), (list[Any](), list[Any]())
    for key, tokens in enumerate((short, long)):
        batch.add(key, tokens, _noting(scores[key], tokens), [])
    batch.read([(0, len(short)), (1, len(long))])
    batch.suspend([0])
    batch.resume([0])
    batch.step()
    batch.step()
    batch.close()
    return scores


def _noting(scores: Scores, tokens: list[int]) -> Callable[[Any], Any]:
    """A sampler that notes the scores, and chooses the tokens of the prompt once more."""
    import mlx.core as mx

    def sample(logprobs: Any) -> Any:
        scores.append(logprobs.astype(mx.float32))
        return mx.array([tokens[len(scores) % len(tokens)]], dtype=mx.uint32)

    return sample


def _distance(one: Scores, other: Scores) -> float:
    """How far two series of scores are apart, in parts of their spread: the median of the positions that both have."""
    import mlx.core as mx

    parts = list[float]()
    for first, second in zip(one, other, strict=False):
        apart: Any = mx.linalg.norm(first - second) / mx.linalg.norm(first - first.mean())
        parts.append(float(apart.item()))
    return sorted(parts)[len(parts) // 2]
