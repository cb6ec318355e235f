"""Which KV caches sequences get: as the model makes them, quantized, or of a bounded length.

mlx-lm has the last two for one sequence only: its batches cannot merge a quantized cache, and a bounded one in a batch
keeps no first tokens. A model with such caches computes one sequence at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Self

from consumers.engines.local.child.backend import LoadError
from pipeline.config import ModelOptions

_FIRST_TOKENS: Final = 4
"""How many first tokens a bounded cache keeps, as in mlx-lm. Without them, models write nonsense."""


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """The kind of the caches.

    Attributes:
        bits: of a value; 0 for the model's own type.
        group: how many values share a scale.
        start: the length of a sequence from which its cache is quantized, in tokens.
        most: the most tokens that a cache keeps; 0 for all.
    """

    bits: int = 0
    group: int = 64
    start: int = 0
    most: int = 0

    @classmethod
    def of(cls, options: ModelOptions) -> Self:
        """The kind that the settings select.

        Raises:
            LoadError: mlx-lm has no cache of this kind.
        """
        if options.kv_bits and options.max_kv_size:
            raise LoadError("mlx-lm has no quantized KV cache of a bounded length. Set kv_bits or max_kv_size.")
        return cls(options.kv_bits, options.kv_group_size, options.quantized_kv_start, options.max_kv_size)

    @property
    def alone(self) -> str:
        """Why sequences with such caches are computed one at a time, in words; empty if they are not."""
        if self.bits:
            return f"kv_bits is {self.bits}, and mlx-lm does not batch quantized KV caches"
        return f"max_kv_size is {self.most}, and mlx-lm does not batch such KV caches" if self.most else ""

    def new(self, model: Any) -> list[Any]:
        """An empty cache for one sequence.

        mlx-lm bounds only the caches of models that make none of their own. Many make plain ones, bounded here.
        """
        from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

        cache = list(make_prompt_cache(model))
        return [RotatingKVCache(self.most, keep=_FIRST_TOKENS) for _ in cache] if self.most else cache

    def grown(self, cache: list[Any]) -> None:
        """A pass has added tokens to a cache: quantize it in place once it is long enough. As `generate_step` does."""
        if self.bits:
            self.quantize(cache, self.start)

    def quantize(self, cache: list[Any], start: int = 0) -> None:
        """Quantize a cache in place if it has start tokens."""
        from mlx_lm.generate import maybe_quantize_kv_cache

        maybe_quantize_kv_cache(cache, start, self.group, self.bits)

    def check(self, model: Any) -> None:
        """Try the caches.

        Raises:
            LoadError: the model cannot have them.
        """
        import mlx.core as mx
        from mlx_lm.models.cache import KVCache, make_prompt_cache

        if self.most and any(type(layer) is not KVCache for layer in make_prompt_cache(model)):
            raise LoadError("max_kv_size does not apply to this model, whose layers have other caches. Remove it.")
        if not self.bits:
            return
        cache = self.new(model)
        try:
            for _ in range(2):
                logits = model(mx.array([[0, 1]]), cache=cache)
                self.quantize(cache)
                mx.eval(logits)
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            message = f"The KV cache of this model cannot be quantized to {self.bits} bits in groups of {self.group} "
            raise LoadError(f"{message}({what}). Remove kv_bits, or change kv_group_size.") from error
        if not any(hasattr(layer, "bits") for layer in cache):
            raise LoadError("mlx-lm quantizes no KV cache of this model. Remove kv_bits.")


PLAIN: Final = CacheOptions()
"""The caches that the model makes."""
