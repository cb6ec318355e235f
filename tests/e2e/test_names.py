"""An id that was cancelled before it was used is an id like any other."""

from __future__ import annotations

import contextlib
from pathlib import Path

import httpx

from tests.e2e.conftest import running

# An answer of 4 s, as eight slots share the speed: a lease, and what the monitor gives a worker beyond it, are over
# long before it ends.
SLOW = ("--engine", "simulated", "--simulated-answer-tokens", "40", "--simulated-tokens-per-s", "80", "--lease-s", "1")
ALONE = ("--no-ollama-standin", "--ollama-host", "127.0.0.1:9")


async def test_a_long_request_is_answered_whose_id_was_deleted_before_it_was_used(tmp_path: Path):
    with contextlib.ExitStack() as stack:
        pipeline = stack.enter_context(running(tmp_path, *SLOW, *ALONE))
        async with httpx.AsyncClient(base_url=pipeline.http, timeout=60) as web:
            assert (await web.delete("/queue/requests/job-7")).status_code == 404
            answer = await web.post(
                "/v1/chat/completions",
                json={"messages": [{"role": "user", "content": "Tell me a long story."}]},
                headers={"Idempotency-Key": "job-7"},
            )
            assert answer.status_code == 200, answer.text
            assert answer.json()["headrace"]["attempts"] == 1
            assert (await web.get("/queue/requests/job-7")).json()["state"] == "finished"
