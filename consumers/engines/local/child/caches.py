"""How the KV caches of a model can be kept: found by a trial, because configurations do not state it."""

from __future__ import annotations

import logging
from typing import Any, Final

from consumers.engines.local.child.batch import MlxSequence, on_stream, reading
from consumers.engines.local.child.kept import KeptCaches, reuse_of
from pipeline.core.batch_plan import Reuse
from pipeline.core.prefixes import KeptPart

log = logging.getLogger(__name__)

_TRIED_TOKENS: Final = 8


def tried_reuse(model: Any) -> Reuse:
    """How the caches of the model can be kept for later sequences. Empty if a trial with a few tokens fails.

    A cache has to leave a batch, to be kept, and to join a batch again. The caches that mlx-lm can merge are `KVCache`,
    `RotatingKVCache`, `ArraysCache` and `CacheList`.
    """
    row = MlxSequence(0, [0] * (2 * _TRIED_TOKENS), _first_token, [])
    try:
        with on_stream():
            row.cache = _read(model, row)
            reuse = reuse_of(row.cache)
            kept = KeptCaches(reuse)
            kept.keep(KeptPart(1, 0, _TRIED_TOKENS, []), row.cache)
            row.cache = kept.load([(1, _TRIED_TOKENS)])
            _read(model, row)
    except Exception:
        log.warning("The KV caches of this model cannot be kept. All prompts are computed in full.", exc_info=True)
        return ""
    return reuse


def _read(model: Any, row: MlxSequence) -> list[Any]:
    """Read some tokens, after those in the cache of the sequence. Returns the cache."""
    array = reading(model, [row])
    array.prompt([row.tokens[:_TRIED_TOKENS]])
    return list(array.extract_cache(0))


def _first_token(logprobs: Any) -> Any:
    return logprobs.argmax(axis=-1)
