"""The facts about one sequence of a batch from which the planner decides."""

import pytest

from pipeline.core.batch_plan import (
    EXACT_PIECE_TOKENS,
    RANK,
    BatchLimits,
    Member,
    ReusablePrompt,
    Stage,
    batch_kv_bytes,
)
from pipeline.core.kv import KvSize
from pipeline.wire.subjects import Priority

HIGH, MEDIUM, LOW = Priority


def member(priority=LOW, **facts):
    return Member(**{"key": 1, "priority": priority, "order": 1, "left": 100, "longest": 200} | facts)


def test_all_caches_of_a_batch_are_as_long_as_the_longest():
    assert batch_kv_bytes([], KvSize(10)) == 0
    assert batch_kv_bytes([1, 257, 3], KvSize(10)) == 3 * 512 * 10
    assert batch_kv_bytes(iter([1, 2]), KvSize(10, 7)) == 2 * (256 * 10 + 7)


def test_the_measured_size_is_that_of_one_sequence():
    bounds = {"slots": 1, "piece_tokens": 1, "target_s": 1, "hold_s": 1, "suspensions": 1, "suspended_s": 1}
    limits = BatchLimits(**bounds, kept_bytes=1, kv_bytes_per_token=3, kv_bytes_fixed=5, kv_windows=((8, 2),))
    assert limits.kv == KvSize(3, 5, ((8, 2),))


def test_the_most_urgent_priority_has_the_lowest_rank():
    assert [member(priority).rank for priority in (HIGH, MEDIUM, LOW)] == [0, 1, 2] == sorted(RANK.values())


@pytest.mark.parametrize(
    ("stage", "runs"),
    [(Stage.WAITING, False), (Stage.READING, True), (Stage.DECODING, True), (Stage.SUSPENDED, False)],
)
def test_a_sequence_runs_from_its_prompt_on_unless_it_is_suspended(stage, runs):
    assert member(stage=stage).runs is runs


@pytest.mark.parametrize(
    ("priority", "left", "exact", "joins"),
    [(LOW, 1, 0, True), (MEDIUM, 1, 0, True), (HIGH, 1, 0, False), (LOW, 2, 0, False), (LOW, 1, 50, False)],
)
def test_a_last_token_is_read_by_a_step_unless_it_is_urgent_or_exact(priority, left, exact, joins):
    assert member(priority, left=left, exact_prompt=exact).joins is joins


@pytest.mark.parametrize(
    ("depth", "prompt", "piece"),
    [
        (0, 100, EXACT_PIECE_TOKENS),
        (5, 100, EXACT_PIECE_TOKENS - 5),
        (96, 100, 3),
        (99, 100, 1),
        (0, 1, 1),
        # Of the answer, after the prompt.
        (100, 100, 1),
        (250, 100, 1),
    ],
)
def test_an_exact_piece_ends_at_a_whole_number_of_pieces_and_before_the_last_token(depth, prompt, piece):
    assert member(depth=depth, exact_prompt=prompt).exact_piece == piece


@pytest.mark.parametrize(
    ("depth", "tokens", "expected"), [(0, 10, 10), (0, 20, 20), (0, 21, 20), (20, 50, 20), (40, 50, 50), (15, 40, 5)]
)
def test_a_piece_ends_at_the_next_mark(depth, tokens, expected):
    assert member(depth=depth, prompt=ReusablePrompt(marks=(20, 40))).within_mark(tokens) == expected


def test_the_time_that_a_sequence_has_stood_still_grows_only_while_it_is_suspended():
    assert member(stood_s=3.0, since=10.0, stage=Stage.SUSPENDED).stood(14.0) == 7.0
    assert member(stood_s=3.0, since=10.0, stage=Stage.DECODING).stood(14.0) == 3.0
