"""A hash table from 64-bit keys to 64-bit values in plain arrays: 24 to 48 bytes an entry, where a dict takes 120.

Keys are hashes, so their bits select the slot. The table consists of parts that grow separately, so growing takes a few
milliseconds at most, with any number of entries.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator

_PARTS = 256
_LEAST_SLOTS = 8
_KEY_MAX = (1 << 64) - 1


class _TablePart:
    """Open addressing with linear probing; a value of 0 marks a free slot. Deletion moves later entries back."""

    __slots__ = ("keys", "mask", "used", "values")

    def __init__(self, slots: int = _LEAST_SLOTS) -> None:
        self.keys = array("Q", bytes(8 * slots))
        self.values = array("Q", bytes(8 * slots))
        self.mask = slots - 1
        self.used = 0

    def slot(self, key: int) -> int:
        """Where key is, or the free slot where it would be."""
        keys, values, mask = self.keys, self.values, self.mask
        at = key & mask
        while values[at] and keys[at] != key:
            at = (at + 1) & mask
        return at

    def put(self, key: int, value: int) -> None:
        at = self.slot(key)
        if not self.values[at]:
            self.used += 1
        self.keys[at], self.values[at] = key, value

    def free(self, at: int) -> None:
        """Free a slot. An entry behind it moves up if its search begins at or before the hole (Knuth 6.4, R)."""
        keys, values, mask = self.keys, self.values, self.mask
        self.used -= 1
        hole = at
        while True:
            at = (at + 1) & mask
            if not values[at]:
                break
            if (at - (keys[at] & mask)) & mask >= (at - hole) & mask:
                keys[hole], values[hole] = keys[at], values[at]
                hole = at
        values[hole] = 0


class PlaceTable:
    """Maps keys (0 to 2**64 - 1) to values (1 to 2**64 - 1). One writer: the index that it belongs to.

    Args:
        alive: whether a value is still valid. Invalid entries are dropped when their part is full.
    """

    def __init__(self, alive: Callable[[int], bool]) -> None:
        self._alive = alive
        self._parts = [_TablePart() for _ in range(_PARTS)]

    def __len__(self) -> int:
        return sum(part.used for part in self._parts)

    def __iter__(self) -> Iterator[int]:
        """The values, in no order."""
        for part in self._parts:
            yield from filter(None, part.values)

    def find(self, key: int) -> int | None:
        """The value of key."""
        part = self._parts[key >> 56]
        return part.values[part.slot(key)] or None

    def put(self, key: int, value: int) -> None:
        """Set the value of key."""
        part = self._parts[key >> 56]
        if 3 * part.used >= 2 * (part.mask + 1):
            part = self._parts[key >> 56] = self._rebuilt(part)
        part.put(key, value)

    def remove(self, key: int) -> None:
        """Forget key, if it is there."""
        part = self._parts[key >> 56]
        at = part.slot(key)
        if part.values[at]:
            part.free(at)

    def _rebuilt(self, part: _TablePart) -> _TablePart:
        """Return a larger copy of a part, without the invalid entries."""
        entries = [(k, v) for k, v in zip(part.keys, part.values, strict=True) if v and self._alive(v)]
        slots = _LEAST_SLOTS
        while slots < 2 * (len(entries) + 1):
            slots *= 2
        grown = _TablePart(slots)
        for key, value in entries:
            grown.put(key, value)
        return grown


def table_key(name: str) -> int:
    """The key of a name: Python's hash, which has a new secret in each process, so that no sender finds collisions."""
    return hash(name) & _KEY_MAX
