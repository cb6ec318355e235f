"""One answer of llama.cpp that cannot be read."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from consumers.engines.llamacpp.generation import LlamaGeneration
from pipeline.engine import Misbehaved


async def test_a_call_that_cannot_begin_ends_with_an_error() -> None:
    """As one that comes while the server ends: its connections are closed."""
    http = httpx.AsyncClient(base_url="http://127.0.0.1:1")
    await http.aclose()
    ended = asyncio.Event()
    generation = LlamaGeneration("r1", http, "/v1/completions", {}, ended=ended.set)
    async with asyncio.timeout(30):
        with pytest.raises(Misbehaved, match="cannot be read"):
            await generation.next()
        await ended.wait()
