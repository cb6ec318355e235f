"""The log-probabilities of the tokens that a sequence samples, for requests that ask for them.

A sequence that asks for none has a plain sampler, and costs nothing here. Source of the shapes: OpenAI's API reference
(`logprobs` of chat completions).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Final

from pipeline.wire.answers import Alternative, TokenScore

_LEAST: Final = -9999.0
"""The log-probability of what is impossible, as OpenAI writes it: JSON has no infinity."""

Sampler = Callable[[Any], Any]


class TokenTexts:
    """The text and the bytes of single tokens.

    Args:
        tokenizer: mlx_lm's.
    """

    def __init__(self, tokenizer: Any) -> None:
        from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer

        self._tokenizer = tokenizer
        self._by_bytes = tokenizer.detokenizer.__class__ is BPEStreamingDetokenizer
        self.of = lru_cache(maxsize=4096)(self._read)

    def _read(self, token: int) -> tuple[str, list[int] | None]:
        """The text of a token, and its bytes: a token can be a part of a character, whose text is then U+FFFD."""
        text = self._tokenizer.decode([token])
        if "\ufffd" not in text:
            return text, list(text.encode())
        return text, self._bytes(token) if self._by_bytes else None

    def _bytes(self, token: int) -> list[int] | None:
        from mlx_lm.tokenizer_utils import _byte_decoder

        decoder = _byte_decoder()
        known = [decoder.get(letter) for letter in self._tokenizer.convert_ids_to_tokens(token)]
        return None if None in known else [int(value) for value in known if value is not None]


class ScoringSampler:
    """A sampler that also keeps the log-probability of each token, and of the likeliest ones in its place.

    Args:
        inner: samples.
        alternatives: how many of the likeliest tokens are kept.
        texts: of the model's tokens.
    """

    def __init__(self, inner: Sampler, alternatives: int, texts: TokenTexts) -> None:
        self._inner = inner
        self._alternatives = alternatives
        self._texts = texts
        self._kept: deque[tuple[Any, Any, Any]] = deque()

    def __call__(self, logprobs: Any) -> Any:
        """The sampled token. Nothing is computed here: the arrays are part of the step that MLX computes."""
        import mlx.core as mx

        token, row = self._inner(logprobs), logprobs[0]
        count = min(self._alternatives, row.shape[-1])
        likeliest = mx.argpartition(-row, kth=max(0, count - 1))[:count]
        self._kept.append((row[token[0]], likeliest, row[likeliest]))
        return token

    def take(self, token: int) -> TokenScore:
        """The scores of the token that was sampled first of those that have not been taken."""
        own, likeliest, values = self._kept.popleft()
        pairs = sorted(zip(values.tolist(), likeliest.tolist(), strict=True), reverse=True)
        text, octets = self._texts.of(token)
        return TokenScore(text, _finite(float(own.item())), octets, self._alternatives_of(pairs))

    def _alternatives_of(self, pairs: Sequence[tuple[float, int]]) -> list[Alternative]:
        texts = [self._texts.of(token) for _, token in pairs]
        return [
            Alternative(text, _finite(value), octets) for (value, _), (text, octets) in zip(pairs, texts, strict=True)
        ]


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LEAST
