"""What the doctor says of the second engine."""

from __future__ import annotations

import pytest

from pipeline.commands.doctor import _ollama
from pipeline.config import Config
from pipeline.up.screen import DEMO_MODEL


@pytest.mark.parametrize(
    ("settings", "level", "says"),
    [
        ({"ollama_host": "none"}, "ok", "`headrace up` starts llama.cpp (xllamacpp "),
        ({"ollama_host": "none", "model": DEMO_MODEL}, "ok", "a stand-in with the demo model"),
        ({"ollama_host": "none", "engine": "simulated"}, "ok", "a stand-in with the demo model"),
        ({"ollama_host": "none", "ollama_standin": False}, "warn", "no Ollama server is looked for"),
        (
            {"ollama_host": "127.0.0.1:9"},
            "warn",
            "no Ollama at http://127.0.0.1:9; until it answers, no request spills",
        ),
    ],
)
async def test_it_says_which_second_engine_up_starts(settings, level, says):
    finding = await _ollama(Config(**{"model": "smollm2"} | settings))
    assert finding.level == level
    assert says in finding.detail
    assert bool(finding.next_step) is (level == "warn")
