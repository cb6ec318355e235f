"""Which sequences of a stream a damaged store has lost."""

from __future__ import annotations

import struct

import pytest

from pipeline.core.blocks import Block, Extent, Gap, gaps, ranges, read_block, read_index

TOMBSTONE, ERASED = 1 << 62, 1 << 63


def record(sequence, body=b"hello", subject=b"llm.request.high"):
    length = 22 + len(subject) + len(body) + 8
    return struct.pack("<IQqH", length, sequence, 7, len(subject)) + subject + body + bytes(8)


WHOLE = b"".join(map(record, (3, 4, 5)))


def test_a_whole_block_is_read_to_its_end():
    assert read_block(1, WHOLE) == Block(1, 3, 5, damaged=False, held=frozenset({3, 4, 5}))
    assert read_block(2, b"") == Block(2, 0, 0, damaged=False)


@pytest.mark.parametrize(
    ("data", "last"),
    [
        (bytes(len(WHOLE)), 0),
        (bytes(byte ^ 0x5A for byte in WHOLE), 0),
        (WHOLE[:-1], 4),
        (WHOLE + bytes(40), 5),
        (WHOLE + b"tail", 5),
        (WHOLE + record(5), 5),
        (record(3) + bytes(len(record(4))) + record(5), 3),
    ],
)
def test_a_damaged_block_is_read_up_to_the_damage(data, last):
    assert read_block(1, data) == Block(1, 3 if last else 0, last, damaged=True, held=frozenset(range(3, last + 1)))


def test_a_removed_message_is_none_that_can_be_read():
    assert read_block(1, record(3 | ERASED) + record(4)) == Block(1, 4, 4, damaged=False, held=frozenset({4}))
    assert read_block(1, record(3) + record(9 | TOMBSTONE, b"", b"")) == Block(
        1, 3, 9, damaged=False, held=frozenset({3})
    )


def test_a_compressed_block_is_not_judged():
    assert not read_block(1, b"cmp" + bytes(30)).damaged


def test_an_index_says_what_the_stream_held():
    # Of a real stream of seven messages, 2 to 8.
    assert read_index(bytes.fromhex("0b0407dd1402d097b08cb8abcdfd3008")) == Extent(7, 2, 8)
    for data in (b"", bytes(40), bytes.fromhex("510407dd1402d097b08cb8ab"), b"\x0b\x04" + b"\xff" * 40):
        assert read_index(data) is None


def test_what_a_damaged_block_held_lies_between_its_neighbours():
    blocks = [Block(1, 1, 9, damaged=False), Block(2, 10, 12, damaged=True), Block(4, 25, 30, damaged=False)]
    assert gaps(blocks, [], Extent(20, 1, 30)) == [Gap(13, 24)]


def test_a_missing_block_is_a_gap_and_a_hole_in_the_numbers_alone_is_none():
    blocks = [Block(1, 1, 9, damaged=False), Block(3, 20, 30, damaged=False)]
    assert gaps(blocks, [], Extent(20, 1, 30)) == []
    assert gaps(blocks, [2], Extent(20, 1, 30)) == [Gap(10, 19)]


@pytest.mark.parametrize("blocks", [[], [Block(1, 0, 0, damaged=True)], [Block(1, 0, 0, damaged=False)]])
def test_a_stream_of_which_nothing_can_be_read_lost_what_it_held(blocks):
    assert gaps(blocks, [], Extent(7, 2, 8)) == [Gap(2, 8)]
    assert gaps(blocks, [], Extent(0, 9, 8)) == []


def test_gaps_are_written_as_ranges():
    assert [str(gap) for gap in (Gap(3, 3), Gap(3, 9))] == ["3", "3 to 9"]


def test_sequences_are_put_together_to_ranges():
    assert ranges({9, 4, 3, 5}) == [Gap(3, 5), Gap(9, 9)]
    assert ranges([]) == []
