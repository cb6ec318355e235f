"""The sequences of a model in MLX: prompts that are read, answers that are written, and caches of suspended sequences.

mlx-lm's `BatchGenerator` decides by itself which prompt it reads, and reads one only after a step. Its two halves are
driven directly here, so that `pipeline.core.batch` decides: `PromptProcessingBatch` reads pieces of prompts, and
`GenerationBatch` decodes. Both keep the caches of several sequences in one padded array. A sequence leaves such an
array with a cache of its own, and can join another one with it. Nothing of a cache is cut off: the token that was
sampled last is kept beside it, so rotating and recurrent caches go on exactly as well.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Final

from consumers.engines.local.child.backend import Suspended
from consumers.engines.local.child.draft import Draft, verified
from consumers.engines.local.child.guided import Guide, GuidedModel
from consumers.engines.local.child.kept import KeptCaches
from consumers.engines.local.child.prompt_files import PromptFiles
from pipeline.core.batch_plan import FetchKept, Keep, Restore, Reuse, StoreKept

log = logging.getLogger(__name__)

_ENDLESS: Final = 1 << 62
"""The token limit for mlx-lm. Only the transcript ends an answer."""

_CLEAR_EVERY_STEPS: Final = 512
"""How often unused buffers are freed while sequences decode, as in `BatchGenerator`."""

_SLOW_STEP_S: Final = 0.02
"""On a CPU, steps longer than this do not overlap: a prompt that arrives waits for one step and not for two, and the
time in which the next step is built is small beside them."""

_SHARED: Final = ("uids", "prompt_cache", "tokens", "samplers", "logits_processors", "max_tokens", "stop_sequences")
"""What the two halves of mlx-lm's generator both hold for each sequence."""

Sampler = Callable[[Any], Any]
Processor = Callable[[Any, Any], Any]
OfRows = Callable[[Sequence[int]], AbstractContextManager[None]]


def without_adapters(_: Sequence[int]) -> AbstractContextManager[None]:
    """The context of a model that has no adapters."""
    return nullcontext()


@dataclass(slots=True, eq=False)
class MlxSequence:
    """One sequence.

    Attributes:
        tokens: all that are known: of the prompt, then of the answer.
        read: how many of them are in its cache.
        cache: one for each layer while the sequence is in no array and something of it was read.
        decodes: whether its last token was sampled here, and the cache holds all others.
        said: whether the token that was sampled last has been returned.
        exact: whether it is in no array with others: a product rounds differently for one row and for several.
        adapter: the number of its adapter; 0 for none.
        most: the most tokens that it may have.
        drafted: whether a draft model may propose its tokens.
    """

    key: int
    tokens: list[int]
    sampler: Sampler
    processors: list[Processor]
    read: int = 0
    cache: list[Any] | None = None
    decodes: bool = False
    said: bool = True
    exact: bool = False
    adapter: int = 0
    most: int = 0
    drafted: bool = False


@dataclass(slots=True)
class MlxBatch:
    """A `Batch` on MLX.

    Args:
        model: the model.
        on_cpu: whether it runs on the CPU.
        reuse: how caches are kept for later sequences.
        of_rows: a context in which the rows of a pass have these adapters.
        draft: proposes tokens of a sequence that is decoded alone.
        files: where caches are stored as well, if they are.

    Attributes:
        ahead: how many tokens beyond one the latest step has added to the cache of a sequence that is decoded alone.
    """

    model: Any
    on_cpu: bool
    reuse: Reuse = ""
    of_rows: OfRows = without_adapters
    draft: Draft | None = None
    files: PromptFiles | None = None
    ahead: int = field(init=False, default=0)
    _kept: KeptCaches = field(init=False)
    _guided: GuidedModel = field(init=False)
    _rows: dict[int, MlxSequence] = field(init=False, default_factory=dict)
    _cohorts: list[Any] = field(init=False, default_factory=list)
    _decoding: Any = field(init=False)
    _alone: list[Any] = field(init=False, default_factory=list)
    _steps: int = field(init=False, default=0)
    _step_s: float = field(init=False, default=0.0)
    _wired_limit: int | None = field(init=False)

    def __post_init__(self) -> None:
        from mlx_lm.generate import maybe_set_recommended_wired_limit

        self._wired_limit = maybe_set_recommended_wired_limit()
        self.model = self._guided = GuidedModel(self.model)
        self._decoding = _none_decodes(self.model)
        self._kept = KeptCaches(self.reuse, self.files)

    def add(
        self,
        key: int,
        tokens: list[int],
        sampler: Sampler,
        processors: list[Processor],
        guide: Guide | None = None,
        *,
        exact: bool = False,
        adapter: int = 0,
        most: int = 0,
    ) -> None:
        """Take a sequence. Nothing of it has been read. The rest is as in `MlxSequence`. Read an exact one alone."""
        row = self._rows[key] = MlxSequence(key, list(tokens), sampler, processors, exact=exact, adapter=adapter)
        row.most, row.drafted = most, not (exact or processors or guide)
        self._guided.guide(key, guide)

    # ---- as `Batch` --------------------------------------------------------------------------------------------------

    def read(self, pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """As `Batch.read`."""
        with on_stream():
            rows, ends = [self._rows[key] for key, _ in pieces], dict(pieces)
            done = [row for row in rows if row.read + ends[row.key] == len(row.tokens)]
            # The last token of a prompt is read by the pass that samples.
            parts = {
                row.key: row.tokens[row.read : row.read + ends[row.key]][: -1 if row in done else None] for row in rows
            }
            together = [row for row in rows if parts[row.key]]
            if together:
                cohort = self._cohort(together)
                with self._adapted(cohort):
                    cohort.prompt([parts[key] for key in cohort.uids])
                for row in together:
                    row.read += len(parts[row.key])
            return self._begin(done)

    def step(self) -> list[tuple[int, int]]:
        """As `Batch.step`. On a CPU, steps that take long are waited for, and their tokens are returned at once."""
        started, self.ahead = time.monotonic(), 0
        proposed: list[int] | None = None
        if self.draft is not None and (row := self._lone()) is not None:
            with on_stream():
                proposed = self._proposed(self.draft, row)
                if proposed:
                    return self._verify(self.draft, row, proposed, started)
        with on_stream():
            sampled = []
            for response in [response for array in self._decoded() for response in self._next(array)]:
                row = self._rows[response.uid]
                if not row.said:
                    sampled.append((row.key, self._say(row, response.token)))
                row.said = False
                row.read += 1
            if self.on_cpu and self._step_s > _SLOW_STEP_S:
                sampled += [pair for array in self._decoded() for pair in self._say_due(array)]
        self._steps += 1
        if self._steps % _CLEAR_EVERY_STEPS == 0:
            _clear_unused()
        self._step_s = time.monotonic() - started
        if self.draft is not None and proposed is not None:
            self.draft.policy.stepped(1, self._step_s)
        return sampled

    def suspend(self, keys: list[int]) -> Suspended:
        """As `Batch.suspend`."""
        with on_stream():
            rows = [self._rows[key] for key in keys]
            due: dict[int, int] = {}
            for array in self._decoded():
                due |= zip(array.uids, _tokens(array, rows), strict=True)
            sampled = [(row.key, self._say(row, due[row.key])) for row in rows if not row.said]
            self._take_out(rows)
        return Suspended({row.key: nbytes_of(row.cache or []) for row in rows}, sampled)

    def drop(self, key: int) -> None:
        """As `Batch.drop`."""
        row = self._rows[key]
        row.cache, row.read, row.decodes = None, 0, False

    def resume(self, keys: list[int]) -> None:
        """As `Batch.resume`. A sequence in the middle of its prompt joins others when it is read."""
        back = [key for key in keys if self._rows[key].decodes]
        if back:
            self.join(back)

    def join(self, keys: list[int]) -> None:
        """As `Batch.join`. The last token of a prompt is like one that was sampled: it is due, and not in the cache."""
        rows = [self._rows[key] for key in keys]
        with on_stream():
            self._take_out(rows)
            for row in rows:
                if row.exact:
                    self._alone.append(_going_on(self.model, [row]))
            if together := [row for row in rows if not row.exact]:
                self._extend(_going_on(self.model, together))
        for row in rows:
            row.cache, row.decodes = None, True

    def remove(self, key: int) -> None:
        """As `Batch.remove`."""
        row = self._rows.pop(key, None)
        self._guided.forget(key)
        if row is not None:
            with on_stream():
                self._leave([row])

    def cached(self, key: int) -> list[int]:
        """As `Batch.cached`."""
        row = self._rows.get(key)
        return row.tokens[: row.read] if row is not None else []

    def keep(self, keep: Keep) -> int:
        """As `Batch.keep`."""
        with on_stream():
            return self._kept.keep(keep.part, self._own_cache(self._rows[keep.key]))

    def load(self, load: Restore) -> None:
        """As `Batch.load`."""
        row = self._rows[load.key]
        with on_stream():
            row.cache = self._kept.load(load.parts)
        row.read = load.tokens

    def fetch(self, fetch: FetchKept) -> int:
        """As `Batch.fetch`."""
        with on_stream():
            return self._kept.fetch(fetch)

    def store(self, store: StoreKept) -> int:
        """As `Batch.store`."""
        with on_stream():
            return self._kept.store(store)

    def free(self, handles: list[int]) -> None:
        """As `Batch.free`."""
        self._kept.free(handles)

    def kv_bytes(self) -> int:
        """As `Batch.kv_bytes`."""
        arrays = [*self._cohorts, *self._decoded()]
        kept = sum(nbytes_of(row.cache) for row in self._rows.values() if row.cache)
        return kept + sum(nbytes_of(array.prompt_cache) for array in arrays)

    def close(self) -> None:
        """Free the caches."""
        import mlx.core as mx

        if self.draft is not None:
            self.draft.forget()
        self._rows.clear()
        self._cohorts.clear()
        self._alone.clear()
        self._decoding = _none_decodes(self.model)
        self._kept = KeptCaches(self.reuse, self.files)
        if self._wired_limit is not None:
            mx.synchronize()
            mx.set_wired_limit(self._wired_limit)
            self._wired_limit = None

    # ---- reading -----------------------------------------------------------------------------------------------------

    def _cohort(self, rows: list[MlxSequence]) -> Any:
        """The array that holds exactly these sequences, whose prompts are read together."""
        keys = {row.key for row in rows}
        for cohort in self._cohorts:
            if set(cohort.uids) == keys:
                return cohort
        self._take_out(rows)
        cohort = reading(self.model, rows)
        for row in rows:
            row.cache = None
        self._cohorts.append(cohort)
        return cohort

    def _begin(self, rows: list[MlxSequence]) -> list[tuple[int, int]]:
        """Sample the first token of sequences of which one token is left to read."""
        if not rows:
            return []
        cohort = self._cohort(rows)
        self._cohorts.remove(cohort)
        by_key = {row.key: row for row in rows}
        sampling = self._guided.sampling(cohort.uids, lambda: [by_key[key].tokens[-1] for key in cohort.uids])
        with self._adapted(cohort), sampling:
            begun = cohort.generate([by_key[key].tokens[-1:] for key in cohort.uids])
        for row in rows:
            row.read += 1
            row.decodes, row.said = True, False
        sampled = self._say_due(begun)
        if any(row.exact for row in rows):
            self._alone.append(begun)
        else:
            self._extend(begun)
        return sampled

    # ---- decoding ----------------------------------------------------------------------------------------------------

    def _decoded(self) -> list[Any]:
        """The arrays of all sequences that decode."""
        return [self._decoding, *self._alone]

    def _next(self, array: Any) -> Any:
        """The tokens that are due in an array. Those after them are being sampled from now on."""
        sampling = self._guided.sampling(array.uids, lambda: array._next_tokens)  # noqa: SLF001
        with self._adapted(array), sampling:
            return array.next()

    def _adapted(self, array: Any) -> AbstractContextManager[None]:
        """A context for a pass over an array, each of whose sequences has its adapter."""
        return self.of_rows([self._rows[key].adapter for key in array.uids])

    def _extend(self, begun: Any) -> None:
        if len(self._decoding):
            self._decoding.extend(begun)
        else:
            self._decoding = begun

    def _say_due(self, decoding: Any) -> list[tuple[int, int]]:
        """The tokens that the latest step sampled, if they have not been returned."""
        rows = [self._rows[key] for key in decoding.uids]
        due = _tokens(decoding, rows)
        return [(row.key, self._say(row, token)) for row, token in zip(rows, due, strict=True) if not row.said]

    def _say(self, row: MlxSequence, token: int) -> int:
        row.tokens.append(token)
        row.said = True
        return token

    # ---- with a draft

    def _lone(self) -> MlxSequence | None:
        """The only sequence that decodes, if a draft model may propose its tokens."""
        if self._alone or len(self._decoding) != 1:
            return None
        row = self._rows[self._decoding.uids[0]]
        return row if row.drafted else None

    def _proposed(self, draft: Draft, row: MlxSequence) -> list[int] | None:
        """The tokens that a draft model proposes; empty for a plain step, None for one beside which it reads."""
        count = min(draft.policy.count(), row.most - len(row.tokens) - 2)
        if count <= 0:
            return []
        known = row.tokens if row.said else [*row.tokens, *_tokens(self._decoding, [row])]
        return draft.propose(known, count) if draft.reads_along(known) else None

    def _verify(self, draft: Draft, row: MlxSequence, proposed: list[int], started: float) -> list[tuple[int, int]]:
        """Let the model check what a draft model proposes. Returns the tokens that are right, and the next one."""
        sampled = self._say_due(self._decoding)
        with self._adapted(self._decoding):
            tokens = verified(self.model, self._decoding, row.tokens[-1], proposed, row.sampler)
        row.tokens += tokens
        row.read += len(tokens)
        self.ahead = len(tokens) - 1
        draft.policy.stepped(len(tokens), time.monotonic() - started, drafted=len(proposed))
        return [*sampled, *((row.key, token) for token in tokens)]

    # ---- between arrays ----------------------------------------------------------------------------------------------

    def _take_out(self, rows: list[MlxSequence]) -> None:
        """Give sequences caches of their own, and take them out of the arrays."""
        import mlx.core as mx

        for array in [*self._cohorts, *self._decoded()]:
            for at, key in enumerate(array.uids):
                row = self._rows[key]
                if row in rows:
                    row.cache = array.extract_cache(at)
        mx.eval([layer.state for row in rows for layer in row.cache or []])
        self._leave(rows)

    def _own_cache(self, row: MlxSequence) -> list[Any]:
        """A copy of the cache of a sequence, which stays where it is."""
        for array in [*self._cohorts, *self._decoded()]:
            if row.key in array.uids:
                return list(array.extract_cache(array.uids.index(row.key)))
        return row.cache or []

    def _leave(self, rows: list[MlxSequence]) -> None:
        gone = {row.key for row in rows}
        for array in [*self._cohorts, *self._decoded()]:
            keep = [at for at, key in enumerate(array.uids) if key not in gone]
            if len(keep) < len(array.uids):
                array.filter(keep)
        self._cohorts = [cohort for cohort in self._cohorts if cohort.uids]
        self._alone = [array for array in self._alone if array.uids]


def reading(model: Any, rows: list[MlxSequence]) -> Any:
    """A `PromptProcessingBatch` of these sequences, which go on from their caches."""
    from mlx_lm.generate import PromptProcessingBatch
    from mlx_lm.models.cache import make_prompt_cache

    return PromptProcessingBatch(
        model,
        [row.key for row in rows],
        [make_prompt_cache(model) if row.cache is None else row.cache for row in rows],
        # Only processors look at the tokens.
        tokens=[row.tokens[: row.read] if row.processors else [] for row in rows],
        prefill_step_size=_ENDLESS,
        samplers=[row.sampler for row in rows],
        logits_processors=[row.processors for row in rows],
        max_tokens=[_ENDLESS] * len(rows),
    )


def _none_decodes(model: Any) -> Any:
    from mlx_lm.generate import GenerationBatch
    from mlx_lm.sample_utils import greedy_sampler

    return GenerationBatch.empty(model, greedy_sampler)


def _going_on(model: Any, rows: list[MlxSequence]) -> Any:
    """A `GenerationBatch` of sequences that have been sampled before. Its constructor would take a step of its own."""
    import mlx.core as mx
    from mlx_lm.models.cache import TokenBuffer

    begun, decoding = reading(model, rows), _none_decodes(model)
    state = {
        **{name: getattr(begun, name) for name in _SHARED},
        "_next_tokens": mx.array([row.tokens[-1] for row in rows], dtype=mx.uint32),
        "_next_logprobs": [mx.zeros(1) for _ in rows],
        "_token_context": [TokenBuffer(tokens) for tokens in begun.tokens],
        "_num_tokens": [0] * len(rows),
        "_matchers": [sequences.matcher() for sequences in begun.stop_sequences],
    }
    for name, value in state.items():
        setattr(decoding, name, value)
    return decoding


def _tokens(decoding: Any, rows: list[MlxSequence]) -> list[int]:
    """The tokens that were sampled last; waits for them unless all of rows have returned theirs."""
    if all(row.said for row in rows) or not len(decoding):
        return [0] * len(decoding)
    return [int(token) for token in decoding._next_tokens.tolist()]  # noqa: SLF001


def nbytes_of(cache: list[Any]) -> int:
    """The size of a cache."""
    return sum(int(layer.nbytes) for layer in cache)


def _clear_unused() -> None:
    import mlx.core as mx

    mx.clear_cache()


def on_stream() -> Any:
    """Compute where mlx-lm's batches do."""
    import mlx.core as mx
    from mlx_lm.generate import generation_stream

    return mx.stream(generation_stream)
