"""llama.cpp as an engine, in this process: its server from the package `xllamacpp`, on one GGUF file."""

from consumers.engines.llamacpp.engine import LlamaEngine
from consumers.engines.llamacpp.native import LlamaError, LlamaFacts

__all__ = ["LlamaEngine", "LlamaError", "LlamaFacts"]
