"""What an Ollama server says of its models beside their names: how long a conversation they read, and which are loaded.

Each model is asked about once (`/api/show`): its files do not change as long as its digest does not.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from consumers.engines.ollama.client import OllamaClient, OllamaError
from consumers.engines.ollama.wire import OllamaModel, context_of
from pipeline.wire.messages import ModelFacts

# How many models are asked about in one look. The others follow in the next.
_PER_LOOK = 8


@dataclass(slots=True)
class About:
    """The facts of one server's models. One writer: the engine's watcher.

    Args:
        client: of the server.
    """

    client: OllamaClient
    _contexts: dict[tuple[str, str], int] = field(init=False, default_factory=dict)
    _loaded: dict[str, int] = field(init=False, default_factory=dict)

    async def look(self, models: list[OllamaModel]) -> None:
        """Ask about the models that are not known yet, and which ones are loaded. Never raises."""
        try:
            self._loaded = {model.name: model.size_vram for model in await self.client.loaded()}
            for model in [each for each in models if each.identity not in self._contexts][:_PER_LOOK]:
                self._contexts[model.identity] = context_of(await self.client.show(model.name))
        except OllamaError:
            return

    def facts(self, model: OllamaModel) -> ModelFacts:
        """What is known of a model."""
        details = model.details
        return ModelFacts(
            capabilities=model.capabilities or ["embedding" if model.embeds else "completion"],
            context_tokens=self._contexts.get(model.identity, 0),
            family=model.family,
            format=(details and details.format) or "",
            parameter_size=(details and details.parameter_size) or "",
            quantization=(details and details.quantization_level) or "",
            size_bytes=model.size or 0,
            digest=model.digest or "",
            loaded=model.name in self._loaded,
            vram_bytes=self._loaded.get(model.name, 0),
        )
