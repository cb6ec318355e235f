"""Where randomness comes from: 64 bits out of a request's seed and a token's position, and nothing else.

Nothing depends on who samples, when, or in which batch, so whoever goes on with an answer draws what the first engine
would have drawn.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1


def key_bits(seed: int, position: int) -> int:
    """A well mixed 64-bit key for one token (the finaliser of SplitMix64, Steele et al., OOPSLA 2014)."""
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
