"""The size of caches by the length of their sequences."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.kv import KV_STEP_TOKENS, KvSize


def test_each_part_grows_in_its_own_way():
    size = KvSize(10, 7, ((100, 2), (1000, 3)))
    assert size.of(0) == 7
    assert size.of(50) == 7 + 50 * (10 + 2 + 3)
    assert size.of(5000) == 7 + 50_000 + 200 + 3000
    assert size.padded(257) == size.of(512)


@pytest.mark.parametrize(
    ("size", "nbytes", "tokens"),
    [
        (KvSize(4), 4 * 300, 256),
        (KvSize(4), 4 * 4096, 4096),
        (KvSize(4), 4 * 255, 0),
        (KvSize(4, 100), 100 + 4 * 256, 256),
        (KvSize(0), 1, 4096),
        (KvSize(0, 50), 49, 0),
        (KvSize(0, 50), 50, 4096),
        (KvSize(0, 0, ((128, 8),)), 128 * 8, 4096),
    ],
)
def test_the_longest_sequence_that_fits(size, nbytes, tokens):
    assert size.longest(nbytes, 4096) == tokens


sizes = st.builds(
    KvSize,
    st.integers(0, 64),
    st.integers(0, 10_000),
    st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 64)), max_size=2).map(tuple),
)


@given(sizes, st.integers(0, 500_000), st.integers(1, 10_000))
def test_it_fits_and_one_step_more_does_not(size, nbytes, context_tokens):
    longest = size.longest(nbytes, context_tokens)
    assert 0 <= longest <= context_tokens
    assert longest == 0 or size.padded(longest) <= nbytes
    if longest < context_tokens:
        assert size.of(longest + KV_STEP_TOKENS) > nbytes
