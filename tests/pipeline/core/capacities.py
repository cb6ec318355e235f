"""Capacities, depths and shares, for tests of the load and of predicted waits."""

from __future__ import annotations

from hypothesis import strategies as st

from pipeline.core.waits import Capacity
from pipeline.wire.subjects import Priority

FULL = Capacity(slots_used=8, slots_total=8, pending_tokens=800.0, tokens_per_s=100.0, tokens_per_request=100.0)

capacities = st.builds(
    Capacity,
    slots_used=st.integers(0, 2000),
    slots_total=st.integers(0, 1000),
    pending_tokens=st.floats(0, 1e300),
    pending_prompt_tokens=st.floats(0, 1e300),
    tokens_per_s=st.floats(0, 1e300),
    prompt_tokens_per_s=st.floats(0, 1e300),
    tokens_per_request=st.floats(0, 1e300),
    prompt_tokens_per_request=st.floats(0, 1e300),
    running=st.fixed_dictionaries({p: st.integers(0, 50) for p in Priority}),
    suspends=st.booleans(),
    kv_share=st.floats(0, 1e6),
)
depths = st.fixed_dictionaries({p: st.integers(0, 10_000_000) for p in Priority})
shares_ = st.tuples(*[st.floats(0.01, 1)] * 3).map(
    lambda s: {p: part / sum(s) for p, part in zip(Priority, s, strict=True)}
)
