"""The KV caches of earlier prompts, by the handles that `pipeline.core.prefixes` gives them.

A segment is the keys and values of some tokens, a pair of arrays for each layer. A snapshot is a cache of each layer.
What is kept is never written to: mlx-lm copies the caches that it merges into a batch. What is stored in files besides
has the form of mlx-lm's own saved prompt caches.
"""

from __future__ import annotations

import copy
from typing import Any

from consumers.engines.local.child.prompt_files import PromptFiles
from pipeline.core.batch_plan import FetchKept, Reuse, StoreKept
from pipeline.core.prefixes import KeptPart, Split


class KeptCaches:
    """The arrays. One writer: the batch.

    Args:
        reuse: how they are kept.
        files: where they are stored as well, if they are.
    """

    def __init__(self, reuse: Reuse, files: PromptFiles | None = None) -> None:
        self._reuse = reuse
        self._files = files
        self._kept: dict[int, list[Any]] = {}

    def keep(self, part: KeptPart, cache: list[Any]) -> int:
        """Keep a part of the cache of one sequence. Returns its size in bytes."""
        for split in part.splits:
            self._split(split)
        if self._reuse == "segments":
            return self._put(part.handle, _cut(cache, part.start, part.end))
        return self._put(part.handle, [_own(layer) for layer in cache])

    def fetch(self, fetch: FetchKept) -> int:
        """Keep a part that is in files. Returns its size in bytes."""
        part, files = fetch.part, self._open_files()
        for split in part.splits:
            self._split(split)
        caches = [files.read(file.name) for file in fetch.files]
        if self._reuse == "snapshots":
            return self._put(part.handle, caches[0])
        first = fetch.files[0].start
        blocks = _joined([_pairs(cache) for cache in caches])
        return self._put(part.handle, _cut(blocks, part.start - first, part.end - first))

    def store(self, store: StoreKept) -> int:
        """Write a file of what is kept. Returns its size in bytes.

        Raises:
            OSError: it cannot be written.
        """
        if self._reuse == "snapshots":
            ((handle, _, _),) = store.parts
            cache = self._kept[handle]
        else:
            cache = _joined([_cut_pairs(self._kept[handle], start, end) for handle, start, end in store.parts])
        return self._open_files().write(store.due.file.name, cache)

    def load(self, parts: list[tuple[int, int]]) -> list[Any]:
        """A cache for a sequence that begins with these parts: handles, and how many tokens of each."""
        if self._reuse == "snapshots":
            ((handle, _),) = parts
            return [copy.copy(layer) for layer in self._kept[handle]]
        return _joined([_cut_pairs(self._kept[handle], 0, tokens) for handle, tokens in parts])

    def free(self, handles: list[int]) -> None:
        """Free what was kept. Unknown handles are ignored."""
        for handle in handles:
            self._kept.pop(handle, None)

    def nbytes(self) -> int:
        """The size of all that is kept."""
        return sum(array.nbytes for layers in self._kept.values() for array in _arrays(layers))

    def _open_files(self) -> PromptFiles:
        assert self._files is not None, "what is stored has files"  # noqa: S101
        return self._files

    def _put(self, handle: int, layers: list[Any]) -> int:
        import mlx.core as mx

        arrays = _arrays(layers)
        mx.eval(arrays)
        self._kept[handle] = layers
        return sum(array.nbytes for array in arrays)

    def _split(self, split: Split) -> None:
        import mlx.core as mx

        whole = self._kept[split.handle]
        head, rest = _cut_pairs(whole, 0, split.at), _cut_pairs(whole, split.at, whole[0][0].shape[2])
        self._kept[split.head], self._kept[split.handle] = _copies(head), _copies(rest)
        mx.eval(_arrays(self._kept[split.head]), _arrays(self._kept[split.handle]))


def reuse_of(cache: list[Any]) -> Reuse:
    """How caches like this one can be kept: in segments if they only hold keys and values of all tokens."""
    from mlx_lm.models.cache import KVCache

    return "segments" if all(type(layer) is KVCache for layer in cache) else "snapshots"


def _cut(cache: list[Any], start: int, end: int) -> list[Any]:
    return _copies(_cut_pairs(_pairs(cache), start, end))


def _pairs(cache: list[Any]) -> list[Any]:
    return [(layer.keys, layer.values) for layer in cache]


def _cut_pairs(pairs: list[Any], start: int, end: int) -> list[Any]:
    return [(keys[..., start:end, :], values[..., start:end, :]) for keys, values in pairs]


def _copies(pairs: list[Any]) -> list[Any]:
    """Arrays of their own: a slice would keep the array that it is a part of."""
    import mlx.core as mx

    return [(mx.contiguous(keys), mx.contiguous(values)) for keys, values in pairs]


def _joined(segments: list[list[Any]]) -> list[Any]:
    import mlx.core as mx
    from mlx_lm.models.cache import KVCache

    layers = []
    for pairs in zip(*segments, strict=True):
        layer = KVCache()
        layer.keys, layer.values = (mx.concatenate(list(arrays), axis=2) for arrays in zip(*pairs, strict=True))
        layer.offset = layer.keys.shape[2]
        layers.append(layer)
    return layers


def _own(layer: Any) -> Any:
    """A copy of a layer's cache, whose arrays are parts of no others."""
    import mlx.core as mx
    from mlx.utils import tree_map

    own = copy.copy(layer)
    own.state = tree_map(lambda value: mx.contiguous(value) if isinstance(value, mx.array) else value, layer.state)
    return own


def _arrays(layers: list[Any]) -> list[Any]:
    """All arrays of segments or snapshots."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    states = [layer if isinstance(layer, tuple) else layer.state for layer in layers]
    return [value for _, value in tree_flatten(states) if isinstance(value, mx.array)]
