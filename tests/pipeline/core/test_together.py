"""When batches are at fault."""

import pytest

from pipeline.core.together import BatchFaults


@pytest.mark.parametrize(
    ("failures", "at_fault"),
    [
        ([8], False),
        ([8, 8], True),
        ([8, 2], True),
        ([8, 1, 8], False),
        ([8, 1, 8, 8], True),
        ([1, 1, 1, 1], False),
    ],
)
def test_batches_are_at_fault_where_no_single_sequence_fails_between_them(failures, at_fault):
    faults = BatchFaults()
    assert [faults.failed(sequences) for sequences in failures][-1] == at_fault
