"""How much memory the caches of sequences take, by their length."""

from __future__ import annotations

from typing import Final, NamedTuple

KV_STEP_TOKENS: Final = 256
"""MLX grows a KV cache in steps of this many tokens."""


class KvSize(NamedTuple):
    """The size of one sequence's cache, in bytes.

    Attributes:
        per_token: of each token, without an end: full attention, also with compressed keys (MLA).
        fixed: whatever the length: the states of recurrent and convolutional layers.
        windows: of layers that keep only the latest tokens: how many, and the bytes of each.
    """

    per_token: int
    fixed: int = 0
    windows: tuple[tuple[int, int], ...] = ()

    def of(self, tokens: int) -> int:
        """The cache of a sequence of so many tokens, exactly as long."""
        return self.fixed + tokens * self.per_token + sum(min(tokens, most) * each for most, each in self.windows)

    def padded(self, tokens: int) -> int:
        """The same as MLX allocates it."""
        return self.of(-(-tokens // KV_STEP_TOKENS) * KV_STEP_TOKENS)

    def longest(self, nbytes: int, context_tokens: int) -> int:
        """The most tokens of a sequence whose cache fits, up to the model's context; in whole steps below that."""
        if self.padded(context_tokens) <= nbytes:
            return context_tokens
        steps, beyond = 0, -(-context_tokens // KV_STEP_TOKENS)
        while beyond - steps > 1:
            middle = (steps + beyond) // 2
            if self.of(middle * KV_STEP_TOKENS) <= nbytes:
                steps = middle
            else:
                beyond = middle
        return steps * KV_STEP_TOKENS
