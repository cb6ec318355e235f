"""Vectors by feature hashing: texts with the same words and the same pieces of words are near each other.

No model is run, and nothing is known of what words mean. Each word, and each run of three letters in it, adds 1 or
takes 1 away at a place that its hash says; the vector is then brought to length 1. Source: Weinberger et al., "Feature
Hashing for Large Scale Multitask Learning", ICML 2009.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from hashlib import blake2b

EMBEDDER = "feature-hashing"
DIMENSIONS = 256
_RUN = 3
_WORDS = re.compile(r"\w+")


def embedding(text: str, dimensions: int = DIMENSIONS) -> list[float]:
    """The vector of a text, of length 1; of length 0 for a text without words, or whose words cancel out."""
    vector = [0.0] * dimensions
    for feature in _features(text):
        hashed = int.from_bytes(blake2b(feature.encode(), digest_size=8).digest(), "big")
        vector[(hashed >> 1) % dimensions] += 1.0 if hashed & 1 else -1.0
    length = math.sqrt(sum(value * value for value in vector))
    return [value / length for value in vector] if length else vector


def count(text: str) -> int:
    """How many tokens a text has here: its words."""
    return len(_WORDS.findall(text))


def _features(text: str) -> Iterator[str]:
    for word in _WORDS.findall(text.casefold()):
        yield word
        marked = f"<{word}>"
        yield from (marked[start : start + _RUN] for start in range(len(marked) - _RUN + 1))
