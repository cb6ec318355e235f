"""Ollama as an engine: its client, the translation of its protocol, and the engine that a worker drives."""

from consumers.ollama_engine.client import OllamaClient
from consumers.ollama_engine.engine import OllamaEngine

__all__ = ["OllamaClient", "OllamaEngine"]
