"""Ollama as an engine: its client, the translation of its protocol, and the engine that a worker uses."""

from consumers.engines.ollama.client import OllamaClient
from consumers.engines.ollama.engine import OllamaEngine
from consumers.engines.ollama.fetcher import OllamaFetcher

__all__ = ["OllamaClient", "OllamaEngine", "OllamaFetcher"]
