"""The text of `/metrics`."""

from __future__ import annotations

from pipeline.gateway.metrics import Metrics
from pipeline.wire.messages import PerPriorityCount, Slots, WorkerStatus

COUNTED = {
    "prompt_tokens": 100,
    "reused_tokens": 80,
    "kept_bytes": 4096,
    "stored_bytes": 8192,
    "drafted_tokens": 30,
    "accepted_tokens": 21,
}


def test_the_prompt_cache_and_the_draft_model_of_each_worker_is_counted():
    workers = [
        WorkerStatus(name, "mlx", "ready", ["m"], Slots(0, 1), PerPriorityCount(), 0.0, 0.0, 0.0, 0, 0, 0.0, **counted)
        for name, counted in (("a", COUNTED), ("b", {}))
    ]
    lines = Metrics().text(None, None, workers, open_responses=0, foreign=0).splitlines()
    assert "# TYPE headrace_prompt_tokens_cached_total counter" in lines
    assert 'headrace_prompt_tokens_total{worker="a"} 100' in lines
    assert 'headrace_prompt_tokens_cached_total{worker="a"} 80' in lines
    assert 'headrace_prompt_cache_bytes{worker="a"} 4096' in lines
    assert 'headrace_prompt_cache_disk_bytes{worker="a"} 8192' in lines
    assert 'headrace_draft_tokens_total{worker="a"} 30' in lines
    assert 'headrace_draft_tokens_accepted_total{worker="a"} 21' in lines
    assert 'headrace_prompt_tokens_total{worker="b"} 0' in lines
