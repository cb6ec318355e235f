"""Which second engine `headrace up` uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import Config
from pipeline.up.screen import DEMO_MODEL
from pipeline.up.second import Second, second_engine

GGUF = Path("/models/smollm2/model.gguf")


def chosen(*, version: str | None = None, gguf: Path | None = GGUF, has_llama: bool = True, **settings) -> Second:
    config = Config(**{"model": "smollm2"} | settings)
    return second_engine(config, version=version, gguf=gguf, has_llama=has_llama)


def test_an_ollama_that_answers_is_used():
    assert chosen(version="0.30.1") == Second(None, "", "Ollama 0.30.1")
    assert chosen(version="0.30.1", ollama_host="gpu-box").said == "Ollama 0.30.1"


@pytest.mark.parametrize("host", ["", "none"])
def test_llama_cpp_runs_the_models_file_where_no_ollama_is_found(host):
    second = chosen(ollama_host=host)
    assert second.standin == ("--gguf", str(GGUF), "--name", "smollm2")
    assert second.said == "llama.cpp with smollm2; no Ollama server was found"


def test_a_file_of_ones_own_is_named_after_itself():
    assert chosen(gguf=Path("/tmp/Qwen2.5-Q8_0.gguf")).runs == "llama.cpp with Qwen2.5-Q8_0"


def test_no_stand_in_runs_beside_servers_of_openais_api():
    second = chosen(openai=["http://x"])
    assert second.standin is None
    assert "spill to the servers of OpenAI's API" in second.said


@pytest.mark.parametrize("settings", [{"model": DEMO_MODEL}, {"engine": "simulated"}])
def test_beside_a_toy_the_stand_in_runs_the_demo_model(settings):
    second = chosen(**settings)
    assert second.standin == ()
    assert "a stand-in with the demo model" in second.said


def test_a_server_that_the_user_named_is_never_replaced():
    second = chosen(ollama_host="192.168.1.20")
    assert second.standin is None
    assert "this Ollama server does not answer" in second.said


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"ollama_standin": False}, "no request spills until one answers"),
        ({"gguf": None}, "llama.cpp has no model"),
        ({"has_llama": False}, "llama.cpp is not installed"),
    ],
)
def test_without_any_second_engine_it_says_why(given, says):
    second = chosen(**given)
    assert second.standin is None
    assert says in second.said
