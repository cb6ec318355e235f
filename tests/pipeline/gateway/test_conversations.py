"""The conversations that a gateway keeps: for a time, and within a size."""

from __future__ import annotations

from pipeline.gateway.conversations import Conversations


def test_a_conversation_is_found_until_its_time_is_over():
    kept = Conversations(kept_s=10)
    kept.keep("a", b"[1]", now=0)
    assert kept.find("a", now=9.9) == b"[1]"
    assert kept.find("a", now=10) is None
    assert kept.find("b", now=0) is None


def test_the_oldest_are_dropped_when_their_time_is_over_or_the_room_is_used():
    kept = Conversations(kept_s=10, kept_bytes=8)
    kept.keep("a", b"1234", now=0)
    kept.keep("b", b"1234", now=5)
    assert len(kept) == 2
    kept.keep("c", b"1", now=6)
    assert [name for name in "abc" if kept.find(name, now=6)] == ["b", "c"]
    kept.keep("d", b"1", now=15.5)
    assert len(kept) == 2
    kept.keep("e", b"123456789", now=15.6)
    assert len(kept) == 0


def test_the_same_id_again_replaces_its_conversation_and_counts_once():
    kept = Conversations(kept_s=10, kept_bytes=8)
    kept.keep("a", b"1234", now=0)
    kept.keep("b", b"1", now=1)
    kept.keep("a", b"1234567", now=2)
    assert (kept.find("a", now=2), kept.find("b", now=2)) == (b"1234567", b"1")
