"""A sorted set of stream sequences that counts the members below one in O(log n), and takes 8 to 9 bytes a member.

The set is a list of sorted arrays of bounded length, with a Fenwick tree over their lengths (P. Fenwick, "A new data
structure for cumulative frequency tables", 1994). Requests arrive in the order of their sequences, so nearly every
addition is an append.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator

# Moving half of an array of this length takes less time than the binary searches.
CHUNK = 512


class Sequences:
    """A sorted set of integers from 0 to 2**64 - 1. One writer: the index that it belongs to."""

    __slots__ = ("_chunks", "_len", "_tops", "_tree")

    def __init__(self) -> None:
        self._chunks: list[array[int]] = []
        # No member of a chunk is above its top, and every member of the next chunk is.
        self._tops: list[int] = []
        # The Fenwick tree of the chunks' lengths, from index 1; None where it has to be built anew.
        self._tree: list[int] | None = None
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[int]:
        for chunk in self._chunks:
            yield from chunk

    def __contains__(self, sequence: int) -> bool:
        return self._find(sequence) is not None

    def add(self, sequence: int) -> bool:
        """Add sequence. Returns whether it was missing."""
        if not self._tops or sequence > self._tops[-1]:
            self._append(sequence)
            return True
        number = bisect_left(self._tops, sequence)
        chunk = self._chunks[number]
        at = bisect_left(chunk, sequence)
        if at < len(chunk) and chunk[at] == sequence:
            return False
        chunk.insert(at, sequence)
        self._count(number, 1)
        if len(chunk) > 2 * CHUNK:
            self._split(number)
        return True

    def discard(self, sequence: int) -> bool:
        """Remove sequence. Returns whether it was there."""
        found = self._find(sequence)
        if found is None:
            return False
        number, at = found
        del self._chunks[number][at]
        self._count(number, -1)
        if not self._chunks[number]:
            self._drop(slice(number, number + 1))
        return True

    def discard_below(self, sequence: int) -> None:
        """Remove every member below sequence."""
        whole = bisect_left(self._tops, sequence)
        self._len -= sum(len(chunk) for chunk in self._chunks[:whole])
        if whole:
            self._drop(slice(0, whole))
        if self._chunks and (part := bisect_left(self._chunks[0], sequence)):
            del self._chunks[0][:part]
            self._count(0, -part)
            if not self._chunks[0]:
                self._drop(slice(0, 1))

    def rank(self, sequence: int) -> int:
        """How many members are below sequence, which need not be a member itself."""
        if not self._tops or sequence > self._tops[-1]:
            return self._len
        if sequence == self._tops[-1]:
            return self._len - (self._chunks[-1][-1] == sequence)
        number = bisect_left(self._tops, sequence)
        rank, tree, node = bisect_left(self._chunks[number], sequence), self._built(), number
        while node:
            rank += tree[node]
            node &= node - 1
        return rank

    def _find(self, sequence: int) -> tuple[int, int] | None:
        number = bisect_left(self._tops, sequence)
        if number == len(self._tops):
            return None
        chunk = self._chunks[number]
        at = bisect_left(chunk, sequence)
        return (number, at) if at < len(chunk) and chunk[at] == sequence else None

    def _append(self, sequence: int) -> None:
        if not self._chunks or len(self._chunks[-1]) >= CHUNK:
            self._chunks.append(array("Q"))
            self._tops.append(sequence)
            self._tree = None
        self._chunks[-1].append(sequence)
        self._tops[-1] = sequence
        self._count(len(self._chunks) - 1, 1)

    def _split(self, number: int) -> None:
        chunk = self._chunks[number]
        self._chunks[number : number + 1] = [chunk[:CHUNK], chunk[CHUNK:]]
        self._tops.insert(number, chunk[CHUNK - 1])
        self._tree = None

    def _drop(self, chunks: slice) -> None:
        del self._chunks[chunks]
        del self._tops[chunks]
        self._tree = None

    def _count(self, number: int, change: int) -> None:
        self._len += change
        if self._tree is not None:
            node = number + 1
            while node < len(self._tree):
                self._tree[node] += change
                node += node & -node

    def _built(self) -> list[int]:
        if self._tree is None:
            tree = self._tree = [0, *map(len, self._chunks)]
            for node in range(1, len(tree)):
                parent = node + (node & -node)
                if parent < len(tree):
                    tree[parent] += tree[node]
        return self._tree
