"""Which second engine `headrace up` uses: an Ollama server, llama.cpp, the demo model, or none. No I/O."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from pipeline.config import NO_OLLAMA, Config
from pipeline.up.model import DEMO_MODEL

STORED_FILE = "model.gguf"
_NONE_FOUND = "no Ollama server was found"


class Second(NamedTuple):
    """The choice.

    Attributes:
        standin: options for the process that stands in for Ollama; None if none is started.
        runs: the model of that process, for people.
        said: the choice, for people.
    """

    standin: tuple[str, ...] | None
    runs: str
    said: str


def second_engine(config: Config, *, version: str | None, gguf: Path | None, has_llama: bool) -> Second:
    """Choose the second engine.

    A server that the user named is never replaced: if it does not answer, it may come back with models that no other
    engine has. The demo model does not answer beside a real one.

    Args:
        config: the settings.
        version: of the Ollama server at `ollama_host`; None if it does not answer.
        gguf: the model's file; None if there is none.
        has_llama: whether llama.cpp is installed.
    """
    if version is not None:
        return _none(f"Ollama {version}")
    if config.ollama_host not in ("", NO_OLLAMA):
        return _none("this Ollama server does not answer; no request spills until it does")
    if config.openai:
        return _none(f"{_NONE_FOUND}; requests spill to the servers of OpenAI's API")
    if not config.ollama_standin:
        return _none(f"{_NONE_FOUND}; no request spills until one answers")
    if config.engine == "simulated" or config.model == DEMO_MODEL:
        return Second((), "the demo model", f"a stand-in with the demo model; {_NONE_FOUND}")
    if gguf is None:
        return _none(f"{_NONE_FOUND}, and llama.cpp has no model; no request spills")
    if not has_llama:
        return _none(f"{_NONE_FOUND}, and llama.cpp is not installed; no request spills")
    name = gguf.parent.name if gguf.name == STORED_FILE else gguf.stem
    runs = f"llama.cpp with {name}"
    return Second(("--gguf", str(gguf), "--name", name), runs, f"{runs}; {_NONE_FOUND}")


def _none(said: str) -> Second:
    return Second(None, "", said)
