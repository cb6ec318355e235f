"""The prefixes of earlier sequences whose KV caches are kept, as a radix tree of tokens for each scope.

The tree is an index: each part has a handle, and the engine holds the arrays by it. There are two kinds:

- **Segments.** A cache that can be cut at any token is kept in pieces. Each node of the tree holds the piece of its own
  tokens, so a head that many sequences share is kept once. A sequence that leaves a node in its middle splits it.
- **Snapshots.** A cache that cannot be cut, such as a sliding window or a recurrent state, is kept whole, at the end of
  a node. It serves sequences that begin with all of its tokens.

The part that was used least recently goes first. A use of a node is one of all nodes above it: of segments after it, so
that none goes before what continues it, and of snapshots before it, because the longest serves best.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.core.kv import KvSize


class PrefixHit(NamedTuple):
    """What is kept of the head of a sequence.

    Attributes:
        tokens: how many of its tokens are kept; 0 if none.
        parts: handles, and how many tokens of each, from the first token on. Of a snapshot, all its tokens.
    """

    tokens: int
    parts: list[tuple[int, int]]


class Split(NamedTuple):
    """Cut a segment in two: its first `at` tokens are kept under the handle `head`, the rest under its own."""

    handle: int
    at: int
    head: int


class KeptPart(NamedTuple):
    """What is to be kept of a sequence.

    Attributes:
        handle: the new handle.
        start, end: the tokens of the segment; a snapshot begins at 0.
        splits: to be done first.
    """

    handle: int
    start: int
    end: int
    splits: list[Split]


@dataclass(slots=True, eq=False)
class _Node:
    """The tokens of one edge; a root has none, and a scope. `handle` is 0 where nothing is kept."""

    tokens: Sequence[int]
    parent: _Node | None
    scope: Hashable = None
    children: dict[int, _Node] = field(default_factory=dict)
    handle: int = 0
    nbytes: int = 0


class Prefixes:
    """The index of kept prefixes. One writer: the batch's planner.

    Args:
        snapshots: whether caches are kept whole.
        size: the expected size of a cache. `measured` corrects it.

    Attributes:
        nbytes: the size of all that is kept.
    """

    def __init__(self, *, snapshots: bool, size: KvSize) -> None:
        self.nbytes = 0
        self._snapshots = snapshots
        self._size = size
        self._roots: dict[Hashable, _Node] = {}
        self._latest = 0
        # All nodes that have a handle, by it: the one that was used least recently in front.
        self._used: OrderedDict[int, _Node] = OrderedDict()

    def __len__(self) -> int:
        return len(self._used)

    def peek(self, scope: Hashable, tokens: Sequence[int], *, align: int = 1) -> PrefixHit:
        """As `find`. It is no use."""
        return self._find(scope, tokens, align)[0]

    def find(self, scope: Hashable, tokens: Sequence[int], *, align: int = 1) -> PrefixHit:
        """The longest kept head of tokens, in a multiple of align tokens."""
        hit, last = self._find(scope, tokens, align)
        if hit.tokens:
            self._use(last)
        return hit

    def keep(self, scope: Hashable, tokens: Sequence[int], *, least: int = 1, room: int) -> KeptPart | None:
        """Note that the cache of tokens is kept. Returns what of it is missing.

        Args:
            scope: whose sequences share it.
            tokens: those whose state is in the cache.
            least: a segment of fewer tokens is not kept.
            room: the most bytes that all kept prefixes may have. What does not fit alone is not kept; for the rest,
                call `shrink`.

        Returns:
            None if nothing is missing, or if it is not kept.
        """
        node, at, inside = self._walk(scope, tokens)
        missing = len(tokens) - at
        nbytes = self._size.of(len(tokens)) - (0 if self._snapshots else self._size.of(at))
        is_there = node.handle != 0 and not missing and not inside
        if is_there or not tokens or nbytes > room or (not self._snapshots and missing < max(least, 1)):
            return None
        splits = []
        if inside:
            node, split = self._split(node, inside)
            splits += split
        if missing:
            node = self._hang(node, _Node(list(tokens[at:]), node))
        self._give_handle(node, nbytes)
        self._use(node)
        return KeptPart(node.handle, 0 if self._snapshots else at, len(tokens), splits)

    def measured(self, handle: int, nbytes: int) -> None:
        """The size of a part, as it was found. Unknown handles are ignored."""
        node = self._used.get(handle)
        if node is not None:
            self.nbytes += nbytes - node.nbytes
            node.nbytes = nbytes

    def shrink(self, room: int) -> list[int]:
        """Forget what was used least recently until the rest fits into room bytes. Returns the handles to free."""
        freed = []
        while self._used and self.nbytes > room:
            handle, node = self._used.popitem(last=False)
            self.nbytes -= node.nbytes
            node.handle = node.nbytes = 0
            freed.append(handle)
            self._prune(node)
        return freed

    def clear(self) -> None:
        """Forget everything. The engine has lost the arrays."""
        self._roots.clear()
        self._used.clear()
        self.nbytes = 0

    # ---- the tree ----------------------------------------------------------------------------------------------------

    def _find(self, scope: Hashable, tokens: Sequence[int], align: int) -> tuple[PrefixHit, _Node]:
        node = last = self._root(scope)
        at = 0
        parts: list[tuple[int, int]] = []
        while at < len(tokens) and (child := node.children.get(tokens[at])) is not None:
            count = common_tokens(child.tokens, tokens, at)
            whole = count == len(child.tokens)
            at += count
            if not self._snapshots:
                parts.append((child.handle, count))
                last = child
            elif whole and child.handle and at % align == 0:
                parts, last = [(child.handle, at)], child
            if not whole:
                break
            node = child
        return _aligned(parts, align), last

    def _walk(self, scope: Hashable, tokens: Sequence[int]) -> tuple[_Node, int, int]:
        """Follow tokens down the tree.

        Returns the last node that they reach, how many tokens that took, and how many of the node's own they share; 0
        if they share all.
        """
        node, at = self._root(scope), 0
        while at < len(tokens) and (child := node.children.get(tokens[at])) is not None:
            count = common_tokens(child.tokens, tokens, at)
            at += count
            node = child
            if count < len(child.tokens):
                return node, at, count
        return node, at, 0

    def _split(self, node: _Node, at: int) -> tuple[_Node, list[Split]]:
        """Put a node above another one, with its first `at` tokens."""
        parent = node.parent
        assert parent is not None, "a root has no tokens"  # noqa: S101
        head = self._hang(parent, _Node(node.tokens[:at], parent))
        splits = []
        if node.handle and not self._snapshots:
            nbytes = node.nbytes * at // len(node.tokens)
            self.measured(node.handle, node.nbytes - nbytes)
            self._give_handle(head, nbytes)
            splits.append(Split(node.handle, at, head.handle))
        node.tokens, node.parent = node.tokens[at:], head
        head.children[node.tokens[0]] = node
        return head, splits

    def _root(self, scope: Hashable) -> _Node:
        return self._roots.get(scope) or _Node((), None, scope)

    def _hang(self, parent: _Node, node: _Node) -> _Node:
        if parent.parent is None:
            self._roots[parent.scope] = parent
        parent.children[node.tokens[0]] = node
        return node

    def _give_handle(self, node: _Node, nbytes: int) -> None:
        self._latest += 1
        node.handle, node.nbytes = self._latest, nbytes
        self.nbytes += nbytes
        self._used[node.handle] = node

    def _use(self, node: _Node | None) -> None:
        """Note a use of a node, and of those above."""
        path = []
        while node is not None:
            if node.handle:
                path.append(node.handle)
            node = node.parent
        for handle in reversed(path) if self._snapshots else path:
            self._used.move_to_end(handle)

    def _prune(self, node: _Node) -> None:
        """Remove nodes that neither keep anything nor lead to what is kept, and join those that lead to one node."""
        while not node.handle and not node.children and node.parent is not None:
            del node.parent.children[node.tokens[0]]
            node = node.parent
        if not node.handle and node.parent is not None and len(node.children) == 1:
            (child,) = node.children.values()
            child.tokens, child.parent = [*node.tokens, *child.tokens], node.parent
            node.parent.children[child.tokens[0]] = child
        if node.parent is None and not node.children:
            self._roots.pop(node.scope, None)


def common_tokens(first: Sequence[int], second: Sequence[int], at: int = 0) -> int:
    """How many tokens from the start of `first` equal those of `second` from `at` on."""
    low, high = 0, min(len(first), len(second) - at)
    # Slices are compared much faster than their tokens one by one.
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[at + low : at + middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _aligned(parts: list[tuple[int, int]], align: int) -> PrefixHit:
    total = sum(count for _, count in parts)
    beyond = total % align
    while beyond and parts:
        handle, count = parts.pop()
        cut = min(beyond, count)
        beyond -= cut
        if count > cut:
            parts.append((handle, count - cut))
    return PrefixHit(sum(count for _, count in parts), parts)
