"""One client that floods the lists is refused and the other clients are served; `bench.flood` measures the cost."""

from __future__ import annotations

from pathlib import Path

from bench.flood import CHAT, STATS, Slice, keys, measure
from tests.e2e.conftest import running


async def test_a_flood_of_one_client_is_refused_and_the_other_clients_are_served(tmp_path: Path):
    secrets, entries = keys()
    # A limit that a slow machine exceeds too.
    options = ("--engine", "simulated", "--simulated-answer-tokens", "4", "--http-lists-per-s", "1")
    options += ("--no-ollama-standin", "--ollama-host", "127.0.0.1:9")
    with running(tmp_path, *options, environ={"HEADRACE_HTTP_KEYS": entries}) as pipeline:
        found = await measure(pipeline.http, secrets, seconds=2, rate=100, slices=2)
    assert set(found.flood) == {"200", "429"}
    assert found.without_retry_after == 0
    assert found.refused == 0
    assert all(found.times_ms[call, Slice.FLOOD] for call in (STATS, CHAT))
