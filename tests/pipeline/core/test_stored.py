"""Which files a sequence finds, which are written next, and which give way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.stored import BLOCK_TOKENS, StoredPrompts

MINE, OTHERS = ("", False, 0), ("other", False, 0)
HEAD = list(range(1000, 1000 + 4 * BLOCK_TOKENS))
MUCH = 1 << 30


def written(stored: StoredPrompts, nbytes: int = 10) -> list[int]:
    """Write all that is due. Returns the ends of the files, in the order in which they were written."""
    ends = []
    while (due := stored.next()) is not None:
        assert due.file.end == len(due.tokens)
        stored.wrote(due, nbytes)
        ends.append(due.file.end)
        assert len(ends) < 1000
    return ends


def ends(stored: StoredPrompts, tokens: list[int], scope=MINE) -> list[int]:
    return [file.end for file in stored.head(scope, tokens)]


def test_whole_blocks_are_stored_from_the_first_on():
    stored = StoredPrompts(MUCH)
    stored.kept(MINE, HEAD[:150])
    assert written(stored) == [64, 128]
    assert [file.start for file in stored.head(MINE, HEAD)] == [0, 64]
    assert stored.nbytes == 20


def test_a_block_is_found_by_all_tokens_up_to_its_end_and_by_whose_they_are():
    stored = StoredPrompts(MUCH)
    stored.kept(MINE, HEAD)
    written(stored)
    assert ends(stored, HEAD) == [64, 128, 192, 256]
    assert ends(stored, HEAD[:200]) == [64, 128, 192]
    assert ends(stored, [*HEAD[:70], 7, *HEAD[71:]]) == [64]
    assert ends(stored, [7, *HEAD[1:]]) == []
    assert ends(stored, HEAD, OTHERS) == []


def test_what_is_stored_already_is_not_written_again():
    stored = StoredPrompts(MUCH)
    stored.kept(MINE, HEAD[:128])
    written(stored)
    stored.kept(MINE, HEAD[:128])
    stored.kept(MINE, HEAD[:200])
    assert written(stored) == [192]


def test_the_latest_prompt_is_stored_first():
    stored = StoredPrompts(MUCH)
    stored.kept(MINE, HEAD[:64])
    stored.kept(OTHERS, HEAD[:64])
    assert stored.next().scope == OTHERS


def test_what_is_not_in_memory_any_more_is_skipped():
    stored = StoredPrompts(MUCH)
    stored.kept(MINE, HEAD[:64])
    stored.kept(OTHERS, HEAD[:64])
    assert stored.next().scope == OTHERS
    stored.skip()
    assert stored.next().scope == MINE
    stored.clear()
    assert stored.next() is None


def test_nothing_is_due_without_room():
    stored = StoredPrompts()
    stored.kept(MINE, HEAD)
    assert stored.next() is None


def test_the_files_that_were_used_least_recently_give_way_and_none_before_what_continues_it():
    stored = StoredPrompts(room=60)
    stored.kept(MINE, HEAD)
    written(stored)
    stored.kept(OTHERS, HEAD[:192])
    assert written(stored) == [64, 128, 192]
    assert ends(stored, HEAD) == [64, 128, 192]  # its last block has made room
    stored.use(stored.head(MINE, HEAD))
    stored.kept(MINE, [*HEAD[:64], *HEAD[:64]])
    written(stored)
    assert ends(stored, HEAD, OTHERS) == [64, 128]
    assert ends(stored, HEAD) == [64, 128, 192]


def test_a_prompt_that_exceeds_the_room_is_stored_as_far_as_it_fits():
    stored = StoredPrompts(room=25)
    stored.kept(OTHERS, HEAD)
    stored.kept(MINE, HEAD)
    assert written(stored) == [64, 128, 192]  # the third does not fit, and nothing older is tried
    assert ends(stored, HEAD) == [64, 128]
    assert ends(stored, HEAD, OTHERS) == []


def test_a_file_that_is_larger_than_the_room_is_written_once():
    stored = StoredPrompts(room=5)
    stored.kept(MINE, HEAD)
    assert written(stored) == [64]
    assert (len(stored), stored.nbytes) == (0, 0)


def test_files_that_cannot_be_read_are_given_up():
    stored = StoredPrompts(MUCH)
    stored.kept(MINE, HEAD)
    written(stored)
    stored.kept(OTHERS, HEAD)
    stored.forget_all()
    assert (stored.head(MINE, HEAD), len(stored), stored.nbytes, stored.next()) == ([], 0, 0, None)
    stored.kept(MINE, HEAD)
    assert stored.next() is None


def test_files_of_an_earlier_process_are_found_by_their_names():
    before = StoredPrompts(MUCH)
    before.kept(MINE, HEAD)
    written(before)
    after = StoredPrompts(room=25)
    for file in reversed(before.head(MINE, HEAD)):
        after.found(file.name, 10)
    assert len(after.shrink()) == 2
    assert ends(after, HEAD) == [64, 128]


def test_a_block_whose_predecessor_is_gone_is_not_found():
    stored = StoredPrompts(MUCH)
    stored.kept(MINE, HEAD)
    written(stored)
    stored.forget(stored.head(MINE, HEAD)[1].name)
    assert ends(stored, HEAD) == [64]
    stored.kept(MINE, HEAD)
    assert written(stored) == [128]
    assert ends(stored, HEAD) == [64, 128, 192, 256]


def test_the_longest_snapshot_that_begins_a_prompt_is_found():
    stored = StoredPrompts(MUCH, snapshots=True)
    for length in (70, 150, 63):
        stored.kept(MINE, HEAD[:length])
    assert written(stored) == [150, 70]  # the third is short
    assert [(file.start, file.end) for file in stored.head(MINE, HEAD[:151])] == [(0, 150)]
    assert ends(stored, HEAD[:149]) == [70]
    assert ends(stored, HEAD[:69]) == []
    stored.forget(stored.head(MINE, HEAD)[0].name)
    assert ends(stored, HEAD) == [70]


def test_a_longer_snapshot_of_another_prompt_does_not_hide_a_shorter_one():
    stored = StoredPrompts(MUCH, snapshots=True)
    for tokens in ([7] * 150, HEAD[:70]):
        stored.kept(MINE, tokens)
        written(stored)
    assert ends(stored, HEAD) == [70]


@pytest.mark.parametrize("snapshots", [False, True])
@given(data=st.data())
def test_what_is_found_is_a_head_of_the_tokens_and_the_sizes_add_up(snapshots, data):
    stored = StoredPrompts(room=100, snapshots=snapshots)
    known: dict[str, tuple[tuple[str, bool, int], list[int]]] = {}
    prompts = st.lists(st.sampled_from([HEAD[:64], HEAD[64:128], HEAD[:70], [5]]), min_size=1, max_size=4)
    for _ in range(data.draw(st.integers(1, 8))):
        scope = data.draw(st.sampled_from([MINE, OTHERS]))
        stored.kept(scope, [token for part in data.draw(prompts) for token in part])
        while (due := stored.next()) is not None:
            known[due.file.name] = (due.scope, list(due.tokens))
            stored.wrote(due, data.draw(st.integers(1, 40)))
            assert stored.nbytes <= 100
        tokens = [token for part in data.draw(prompts) for token in part]
        files = stored.head(scope, tokens)
        at = 0
        for file in files:
            assert known[file.name] == (scope, tokens[: file.end])
            assert file.start == at
            at = file.end
