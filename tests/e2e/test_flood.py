"""One client that floods the lists is told to wait, and nobody else waits for it."""

from __future__ import annotations

import statistics
from pathlib import Path

from bench.flood import CHAT, STATS, Slice, keys, measure
from tests.e2e.conftest import running


async def test_a_flood_of_one_client_is_refused_and_the_others_are_served_as_before(tmp_path: Path):
    secrets, entries = keys()
    options = ("--engine", "simulated", "--simulated-answer-tokens", "4", "--no-ollama-standin")
    environ = {"HEADRACE_HTTP_KEYS": entries}
    with running(tmp_path, *options, "--ollama-host", "127.0.0.1:9", environ=environ) as pipeline:
        found = await measure(pipeline.http, secrets, seconds=3, rate=300, slices=2)
    assert set(found.flood) == {"200", "429"}
    assert found.flood["429"] > found.flood["200"]
    assert found.without_retry_after == 0
    assert found.refused == 0
    for call in (STATS, CHAT):
        peace, flooded = (found.times_ms[call, kind] for kind in (Slice.PEACE, Slice.FLOOD))
        assert len(flooded) > len(peace) / 3
        assert statistics.median(flooded) < 5 * statistics.median(peace)
