"""The size of a model's caches, measured, and of the memory for them.

A few tokens are read. The arrays say what each token takes. The cache's own arguments say after how many tokens it
stops growing: reading as many would take too long.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from consumers.engines.local.child.cache_options import PLAIN, CacheOptions
from pipeline.core.kv import KV_STEP_TOKENS, KvSize
from pipeline.machine import memory_available

_FREE_SHARE: Final = 0.5
"""The part of the free memory that the caches of the sequences that run may fill. Batches are copied as they grow."""

_TRIED_TOKENS: Final = 2


def measured_size(model: Any, options: CacheOptions = PLAIN) -> KvSize:
    """The size of the cache of one sequence. One that is quantized later is full before that, as a window of tokens."""
    import mlx.core as mx

    cache = options.new(model)
    model(mx.array([[0] * _TRIED_TOKENS]), cache=cache)
    mx.eval([layer.state for layer in cache])
    full = _size_of(cache)
    if not options.bits:
        return full
    options.quantize(cache)
    small = _size_of(cache)
    early = (options.start, full.per_token - small.per_token)
    return small._replace(windows=(*small.windows, *([early] if options.start else [])))


def _size_of(cache: list[Any]) -> KvSize:
    per_token, fixed, windows = 0, 0, dict[int, int]()
    for layer in _layers(cache):
        each = _bytes_per_token(layer)
        if each is None:
            fixed += int(layer.nbytes)
        elif (window := _window(layer)) is None:
            per_token += each
        else:
            windows[window] = windows.get(window, 0) + each
    return KvSize(per_token, fixed, tuple(sorted(windows.items())))


def free_bytes(*, on_cpu: bool) -> int:
    """Memory for KV caches: what the system or the GPU has left, without a reserve; 0 if not known."""
    import mlx.core as mx

    if on_cpu:
        return int((memory_available() or 0) * _FREE_SHARE)
    return int(free_of_gpu(mx.device_info(), mx.get_active_memory(), mx.get_cache_memory()) * _FREE_SHARE)


def free_of_gpu(known: Mapping[str, Any], active: int, unused: int) -> int:
    """What a GPU has left, in bytes; 0 if not known.

    Args:
        known: what MLX says of the GPU. Metal names the memory that one process should use at most. CUDA names the
            memory that no process has.
        active: the memory that MLX uses.
        unused: the memory that MLX keeps to use it again.
    """
    if "free_memory" in known:
        return int(known["free_memory"]) + unused
    most = int(known.get("max_recommended_working_set_size") or known.get("memory_size") or 0)
    return max(0, most - active)


def _layers(cache: Any) -> Iterator[Any]:
    """The caches of all layers. Some layers have several."""
    for layer in cache:
        inner = getattr(layer, "caches", None)
        if inner is None:
            yield layer
        else:
            yield from _layers(inner)


def _bytes_per_token(layer: Any) -> int | None:
    """What each token takes; None where the size does not depend on the length."""
    from mlx.utils import tree_flatten

    # Each is an array, or several of a quantized one.
    arrays = [array for _, array in tree_flatten([getattr(layer, name, None) for name in ("keys", "values")])]
    known = [array for array in arrays if array is not None]
    return sum(int(array.nbytes) // int(array.shape[2]) for array in known) if known else None


def _window(layer: Any) -> int | None:
    """How many tokens a cache keeps at most; None for all."""
    if (chunk := getattr(layer, "chunk_size", None)) is not None:
        return int(chunk) + KV_STEP_TOKENS  # the front is cut off after the next step has been allocated
    most = getattr(layer, "max_size", None)
    return None if most is None else int(most)
