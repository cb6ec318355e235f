"""What clients are told of an Ollama server's models beside their names. No I/O."""

from __future__ import annotations

from collections.abc import Mapping

from consumers.engines.ollama.wire import OllamaModel
from pipeline.wire.messages import ModelFacts


def facts_of(model: OllamaModel, loaded: Mapping[str, int]) -> ModelFacts:
    """What is known of a model.

    Args:
        model: the model.
        loaded: the bytes on a GPU of each model in the server's memory, by name.
    """
    details = model.details
    return ModelFacts(
        capabilities=model.capabilities or ["embedding" if model.embeds else "completion"],
        context_tokens=model.context_tokens,
        family=model.family,
        format=(details and details.format) or "",
        parameter_size=(details and details.parameter_size) or "",
        quantization=(details and details.quantization_level) or "",
        size_bytes=model.size or 0,
        digest=model.digest or "",
        loaded=model.name in loaded,
        vram_bytes=loaded.get(model.name, 0),
    )
