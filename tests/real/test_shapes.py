"""A table of the context length and the memory of models of many shapes: `make real ARGS="-k shapes"`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.consumers.engines.local.child.test_facts import CONTEXTS, LENGTH, measured_shapes

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]


def test_shapes(figure: Callable[[str], None]) -> None:
    figure(
        f"{'shape':<16} {'context':>10} {'stated':>10} {f'bytes of {LENGTH} tokens':>20}  real, alone and in a batch"
    )
    for row in measured_shapes():
        real = ", ".join(f"{nbytes:,.0f} ({nbytes / row.expected - 1:+.1%})" for nbytes in row.real)
        figure(f"{row.shape:<16} {row.context:>10} {CONTEXTS[row.shape]:>10} {row.expected:>20,}  {real}")
        assert row.context == CONTEXTS[row.shape]
        assert all(abs(nbytes / row.expected - 1) <= 0.05 for nbytes in row.real)
