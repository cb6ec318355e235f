"""The sequences of a model in MLX, each computed by itself, with a cache of mlx-lm's own kind for one sequence.

It serves the models that mlx-lm computes wrongly in batches, or whose caches it cannot merge. Nothing is padded, masked
or copied between arrays: a sequence that is suspended keeps its cache and is left out of the steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from consumers.engines.local.child.backend import Suspended
from consumers.engines.local.child.batch import OfRows, Processor, Sampler, without_adapters
from consumers.engines.local.child.cache_options import PLAIN, CacheOptions
from consumers.engines.local.child.guided import Guide, GuidedModel
from pipeline.core.batch_plan import FetchKept, Keep, Restore, StoreKept


@dataclass(slots=True, eq=False)
class LoneSequence:
    """One sequence.

    Attributes:
        tokens: all that are known: of the prompt, then of the answer.
        read: how many of them are in its cache.
        cache: one for each layer; None before anything was read.
        decodes: whether a step serves it.
        suspended: whether it is left out.
        adapter: the number of its adapter; 0 for none.
    """

    key: int
    tokens: list[int]
    sampler: Sampler
    processors: list[Processor]
    read: int = 0
    cache: list[Any] | None = None
    decodes: bool = False
    suspended: bool = False
    adapter: int = 0


@dataclass(slots=True)
class LoneSequences:
    """A `Batch` on MLX without a batch.

    Args:
        model: the model.
        caches: the kind of its caches.
        of_rows, ahead: as in `MlxBatch`.
    """

    model: Any
    caches: CacheOptions = PLAIN
    of_rows: OfRows = without_adapters
    ahead: int = field(init=False, default=0)
    _guided: GuidedModel = field(init=False)
    _rows: dict[int, LoneSequence] = field(init=False, default_factory=dict)
    _wired_limit: int | None = field(init=False)

    def __post_init__(self) -> None:
        from mlx_lm.generate import maybe_set_recommended_wired_limit

        self._wired_limit = maybe_set_recommended_wired_limit()
        self.model = self._guided = GuidedModel(self.model)

    def add(
        self,
        key: int,
        tokens: list[int],
        sampler: Sampler,
        processors: list[Processor],
        guide: Guide | None = None,
        *,
        exact: bool = False,  # noqa: ARG002 - every sequence here is
        adapter: int = 0,
        most: int = 0,  # noqa: ARG002 - nothing is planned ahead
    ) -> None:
        """Take a sequence. Nothing of it has been read."""
        self._rows[key] = LoneSequence(key, list(tokens), sampler, processors, adapter=adapter)
        self._guided.guide(key, guide)

    # ---- as `Batch` --------------------------------------------------------------------------------------------------

    def read(self, pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """As `Batch.read`."""
        sampled = []
        for key, count in pieces:
            row = self._rows[key]
            ends = row.read + count == len(row.tokens)
            if part := row.tokens[row.read : row.read + count - ends]:
                self._read(row, part)
            if ends:
                row.decodes = True
                sampled.append((key, self._sample(row)))
        return sampled

    def join(self, keys: list[int]) -> None:
        """As `Batch.join`."""
        for key in keys:
            self._rows[key].decodes = True

    def step(self) -> list[tuple[int, int]]:
        """As `Batch.step`. Each token is returned at once."""
        rows = [row for row in self._rows.values() if row.decodes and not row.suspended]
        return [(row.key, self._sample(row)) for row in rows]

    def suspend(self, keys: list[int]) -> Suspended:
        """As `Batch.suspend`."""
        for key in keys:
            self._rows[key].suspended = True
        return Suspended({key: _nbytes(self._rows[key]) for key in keys}, [])

    def drop(self, key: int) -> None:
        """As `Batch.drop`."""
        row = self._rows[key]
        row.cache, row.read, row.decodes = None, 0, False

    def resume(self, keys: list[int]) -> None:
        """As `Batch.resume`."""
        for key in keys:
            self._rows[key].suspended = False

    def remove(self, key: int) -> None:
        """As `Batch.remove`."""
        self._rows.pop(key, None)
        self._guided.forget(key)

    def cached(self, key: int) -> list[int]:  # noqa: ARG002 - as in the interface
        """As `Batch.cached`. Nothing is kept for later sequences."""
        return []

    def keep(self, keep: Keep) -> int:  # noqa: ARG002 - as in the interface
        """As `Batch.keep`. Nothing is kept."""
        return 0

    def load(self, load: Restore) -> None:
        """As `Batch.load`. There is nothing to load."""

    def fetch(self, fetch: FetchKept) -> int:
        """As `Batch.fetch`. Nothing is stored."""
        raise NotImplementedError

    def store(self, store: StoreKept) -> int:
        """As `Batch.store`."""
        raise NotImplementedError

    def free(self, handles: list[int]) -> None:
        """As `Batch.free`. There is nothing to free."""

    def kv_bytes(self) -> int:
        """As `Batch.kv_bytes`."""
        return sum(map(_nbytes, self._rows.values()))

    def close(self) -> None:
        """Free the caches."""
        import mlx.core as mx

        self._rows.clear()
        if self._wired_limit is not None:
            mx.synchronize()
            mx.set_wired_limit(self._wired_limit)
            self._wired_limit = None

    # ---- computing ---------------------------------------------------------------------------------------------------

    def _read(self, row: LoneSequence, tokens: list[int]) -> None:
        import mlx.core as mx

        cache = self._cache(row)
        with self.of_rows([row.adapter]):
            self.model(mx.array([tokens]), cache=cache)
        self.caches.grown(cache)
        mx.eval([layer.state for layer in cache])
        row.read += len(tokens)

    def _sample(self, row: LoneSequence) -> int:
        """Read the last token of a sequence, and sample the next one."""
        import mlx.core as mx

        last = row.tokens[-1:]
        cache = self._cache(row)
        with self.of_rows([row.adapter]), self._guided.sampling([row.key], lambda: last):
            logits = self.model(mx.array([last]), cache=cache)[:, -1, :]
        self.caches.grown(cache)
        for processor in row.processors:
            logits = processor(mx.array(row.tokens), logits)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        token = int(row.sampler(logprobs).item())
        row.read += 1
        row.tokens.append(token)
        return token

    def _cache(self, row: LoneSequence) -> list[Any]:
        if row.cache is None:
            row.cache = self.caches.new(self.model)
        return row.cache


def _nbytes(row: LoneSequence) -> int:
    return sum(int(layer.nbytes) for layer in row.cache or ())
