"""Randomness for sampling: 64 bits from a request's seed and a token's position.

The bits do not depend on the engine, the time or the batch. An engine that resumes an answer therefore samples the same
tokens as the engine that began it.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1


def key_bits(seed: int, position: int) -> int:
    """A well-mixed 64-bit key for one token (the finaliser of SplitMix64, Steele et al., OOPSLA 2014)."""
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
