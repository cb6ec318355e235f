"""Every process derives the same trace for a request, and another one for every other request."""

from __future__ import annotations

from pipeline.core.origin import trace_origin


def test_the_trace_of_a_request_is_the_same_wherever_it_is_derived():
    # Written down, so that a version of tomorrow finds the trace that this one has begun.
    assert f"{trace_origin('LLM-7', 1_795_364_496).trace_id:032x}" == "e883f31b8690ed1f66d48bd3805df14d"
    assert f"{trace_origin('LLM-7', 1_795_364_496).span_id:016x}" == "f20137bd4e68b84e"


def test_no_two_requests_share_a_trace():
    origins = {trace_origin(f"LLM-{number}", second) for number in range(50) for second in range(50)}
    assert len({origin.trace_id for origin in origins}) == len({origin.span_id for origin in origins}) == 2500
    assert all(0 < origin.trace_id < 2**128 and 0 < origin.span_id < 2**64 for origin in origins)
