"""A server that speaks OpenAI's API as an engine: `mlx_lm.server`, vLLM, llama.cpp's server, LM Studio and others."""

from consumers.engines.openai.engine import OpenAIEngine

__all__ = ["OpenAIEngine"]
