"""Reading the message blocks of a nats-server's file store, as far as it takes to find the messages that are damaged.

A block is a sequence of records, little-endian: length (4 bytes, the highest bit set if there are headers), sequence
(8 bytes, the highest bit for an erased record, the next one for a tombstone), time (8), length of the subject (2), the
subject, headers and body, and a checksum (8), which is not verified. An index begins with a magic byte, a version, and
five varints: messages, bytes, first sequence, time, last sequence. Source: `server/filestore.go` of nats-server 2.15.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_HEAD = struct.Struct("<IQqH")
_CHECKSUM_BYTES = 8
_HEADERS_BIT = 1 << 31
_ERASED_BIT, _TOMBSTONE_BIT = 1 << 63, 1 << 62
_INDEX_MAGIC, _INDEX_HEAD_BYTES = 11, 7
_MOST_SHIFT = 63
# Such blocks are not written with the settings of `nats/`, and are not read here.
_COMPRESSED = b"cmp"


class Block(NamedTuple):
    """What is readable of one block.

    Attributes:
        number: from the name of its file.
        first: the lowest sequence of a message that can be read; 0 if there is none.
        last: the highest sequence of a message, or of a note that one was removed; 0 if there is none.
        damaged: whether a part of it is unreadable. The server drops everything from there on.
        held: the sequences of its messages. Some may have been removed: the index tells.
    """

    number: int
    first: int
    last: int
    damaged: bool
    held: frozenset[int] = frozenset()


class Gap(NamedTuple):
    """Sequences of a stream, first to last, that a damaged block may have held."""

    first: int
    last: int

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first} to {self.last}"


def read_block(number: int, data: bytes) -> Block:
    """Read a block up to its end or the first record that makes no sense."""
    if data.startswith(_COMPRESSED):
        return Block(number, 0, 0, damaged=False)
    at, first, last, before, held, damaged = 0, 0, 0, 0, set[int](), False
    while at < len(data) and not damaged:
        length, sequence = _record(data, at)
        if length == 0:
            damaged = True
        elif sequence & _TOMBSTONE_BIT:
            last = max(last, sequence & ~(_ERASED_BIT | _TOMBSTONE_BIT))
        elif sequence and not sequence & _ERASED_BIT:
            damaged = sequence <= before
            if not damaged:
                first, last, before = first or sequence, max(last, sequence), sequence
                held.add(sequence)
        at += length
    return Block(number, first, last, damaged, frozenset(held))


def _record(data: bytes, at: int) -> tuple[int, int]:
    """The length and the sequence of the record at an offset; (0, 0) if it makes no sense."""
    if len(data) - at < _HEAD.size:
        return 0, 0
    length, sequence, _, subject_length = _HEAD.unpack_from(data, at)
    length &= ~_HEADERS_BIT
    if length < _HEAD.size + subject_length + _CHECKSUM_BYTES or at + length > len(data):
        return 0, 0
    return length, sequence


class Extent(NamedTuple):
    """What a stream held when its index was last written."""

    messages: int
    first: int
    last: int


def read_index(data: bytes) -> Extent | None:
    """The head of a stream's `index.db`; None if it makes no sense."""
    if len(data) < _INDEX_HEAD_BYTES or data[0] != _INDEX_MAGIC:
        return None
    at, numbers = 2, []
    for _ in range(5):
        number, shift = 0, 0
        while True:
            if at >= len(data) or shift > _MOST_SHIFT:
                return None
            byte = data[at]
            number |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                break
        numbers.append(number)
    messages, _, first, _, last = numbers
    return Extent(messages, first, last) if messages <= last + 1 - first else None


def gaps(blocks: Sequence[Block], missing: Sequence[int], extent: Extent) -> list[Gap]:
    """The sequences of a stream that damaged, emptied and missing blocks may have held.

    Args:
        blocks: those of the stream that exist. The numbers of blocks have holes: the server removes empty ones.
        missing: the numbers of blocks that the server did not find.
        extent: what the stream held before, as far as it is known.
    """
    found: list[Gap] = []
    readable_to, doubtful = extent.first - 1, False
    for block in sorted([*blocks, *(Block(number, 0, 0, damaged=True) for number in missing)]):
        if block.first:
            if doubtful and block.first > readable_to + 1:
                found.append(Gap(readable_to + 1, block.first - 1))
            doubtful = False
        readable_to = max(readable_to, block.last)
        doubtful = doubtful or block.damaged
    if readable_to < extent.last and extent.messages:
        found.append(Gap(readable_to + 1, extent.last))
    return found


def ranges(sequences: Iterable[int]) -> list[Gap]:
    """Sequences as ranges, in order."""
    found: list[Gap] = []
    for sequence in sorted(sequences):
        if found and found[-1].last + 1 == sequence:
            found[-1] = Gap(found[-1].first, sequence)
        else:
            found.append(Gap(sequence, sequence))
    return found
