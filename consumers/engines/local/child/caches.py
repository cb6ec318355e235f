"""What kind of KV cache a model has, and how large it is: found by a trial, because configurations do not state it."""

from __future__ import annotations

import logging
from typing import Any, Final

from consumers.engines.local.child.batch import MlxSequence, nbytes_of, on_stream, reading
from consumers.engines.local.child.kept import KeptCaches, reuse_of
from pipeline.core.batch_plan import Reuse
from pipeline.core.prefixes import KeptPart

log = logging.getLogger(__name__)

_TRIED_TOKENS: Final = 8


def measure_cache(model: Any) -> tuple[Reuse, int, int]:
    """Try the caches of the model with a few tokens.

    Returns how caches can be kept, and the size of one: bytes for each token, and bytes that do not depend on the
    length. If caches cannot be kept, a sequence cannot leave a batch with its cache and come back either. The caches
    that mlx-lm can merge are `KVCache`, `RotatingKVCache`, `ArraysCache` and `CacheList`.
    """
    row, sizes = MlxSequence(0, [0] * (2 * _TRIED_TOKENS), _first_token, []), []
    try:
        with on_stream():
            for _ in range(2):
                array = reading(model, [row])
                array.prompt([row.tokens[:_TRIED_TOKENS]])
                row.cache = array.extract_cache(0)
                sizes.append(nbytes_of(row.cache))
            reuse = _tried(row.cache or [])
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        log.warning("The KV caches of this model cannot leave a batch. Its requests are not suspended.", exc_info=True)
        return "", 0, 0
    per_token = (sizes[1] - sizes[0]) // _TRIED_TOKENS
    return reuse, per_token, sizes[0] - per_token * _TRIED_TOKENS


def _tried(cache: list[Any]) -> Reuse:
    """Keep a cache and load it again. Returns how it is kept."""
    kept = KeptCaches(reuse_of(cache))
    kept.keep(KeptPart(1, 0, _TRIED_TOKENS, []), cache)
    kept.load([(1, _TRIED_TOKENS)])
    return reuse_of(cache)


def _first_token(logprobs: Any) -> Any:
    return logprobs.argmax(axis=-1)
