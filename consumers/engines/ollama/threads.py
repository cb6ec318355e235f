"""How many threads an Ollama server uses for a model on its CPU: the option `num_thread` of each request. No I/O.

Ollama loads a model again when the option changes. The choice is made once for each model, and every request has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from consumers.engines.ollama.wire import LoadedModel


class Threads:
    """The choice for each model. One writer: the client.

    Args:
        count: the setting `ollama_threads`; 0 leaves the choice to the server.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._chosen: dict[str, int] = {}
        self._gpu = False

    @property
    def wanted(self) -> bool:
        """Whether there is anything to choose."""
        return bool(self._count)

    def knows(self, model: str) -> bool:
        """Whether there is nothing left to choose for a model."""
        return not self._count or model in self._chosen

    def choose(self, model: str, loaded: Sequence[LoadedModel]) -> None:
        """Choose for a model before its first request.

        A model that is not loaded yet is expected on the CPU, unless the server has had a model on a GPU.

        Args:
            model: its name in requests.
            loaded: the models in the server's memory.
        """
        self._gpu = self._gpu or any(there.size_vram for there in loaded)
        here = [there for there in loaded if there.name in (model, f"{model}:latest")]
        on_gpu = any(there.size_vram for there in here) if here else self._gpu
        self._chosen.setdefault(model, 0 if on_gpu else self._count)

    def review(self, loaded: Sequence[LoadedModel]) -> None:
        """Choose again for models that are no longer loaded, if the server has a GPU after all.

        A change for a model that is loaded would load it again, and a GPU ignores the option.
        """
        self._gpu = self._gpu or any(there.size_vram for there in loaded)
        names = {there.name for there in loaded} | {there.name.removesuffix(":latest") for there in loaded}
        if self._gpu:
            self._chosen = {model: count for model, count in self._chosen.items() if model in names}

    def added(self, body: dict[str, Any]) -> dict[str, Any]:
        """The body of a request, with the option."""
        count = self._chosen.get(body["model"])
        return body | {"options": {**body.get("options", {}), "num_thread": count}} if count else body
