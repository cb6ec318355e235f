"""The text of `/metrics`."""

from __future__ import annotations

from pipeline.gateway.metrics import Metrics
from pipeline.wire.messages import PerPriorityCount, Slots, WorkerStatus


def test_the_prompt_cache_of_each_worker_is_counted():
    workers = [
        WorkerStatus(name, "mlx", "ready", ["m"], Slots(0, 1), PerPriorityCount(), 0.0, 0.0, 0.0, 0, 0, 0.0, **counted)
        for name, counted in (("a", {"prompt_tokens": 100, "reused_tokens": 80, "kept_bytes": 4096}), ("b", {}))
    ]
    lines = Metrics().text(None, None, workers, open_responses=0, foreign=0).splitlines()
    assert "# TYPE headrace_prompt_tokens_cached_total counter" in lines
    assert 'headrace_prompt_tokens_total{worker="a"} 100' in lines
    assert 'headrace_prompt_tokens_cached_total{worker="a"} 80' in lines
    assert 'headrace_prompt_cache_bytes{worker="a"} 4096' in lines
    assert 'headrace_prompt_tokens_total{worker="b"} 0' in lines
