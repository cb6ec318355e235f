"""Models for a worker of Ollama: its server pulls them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from typing import Any

from consumers.engines.ollama.engine import OllamaEngine
from consumers.engines.server.errors import ServerError
from pipeline.core.models import same_model
from pipeline.wire.errors import ErrorCode, HeadraceError, quoted
from pipeline.wire.fetches import FetchStep

_SUCCESS = "success"


class OllamaFetcher:
    """Lets an Ollama server pull models, as `Fetcher`.

    Args:
        engine: the server.
    """

    def __init__(self, engine: OllamaEngine) -> None:
        self._engine = engine

    def fetchable(self, name: str) -> str:
        """As `Fetcher.fetchable`: every name. Headrace's own stand-in fetches nothing."""
        if self._engine.status().standin:
            message = (
                f"Model {quoted(name)} cannot be fetched: there is no Ollama server, only a stand-in for it. Start "
                "Ollama and pull again."
            )
            raise HeadraceError(ErrorCode.MODEL_NOT_FOUND, message, param="model")
        return name

    async def fetch(self, model: str, note: Callable[[FetchStep], None]) -> str:
        """As `Fetcher.fetch`."""
        succeeded = False
        try:
            async with aclosing(self._engine.client.pull(model)) as lines:
                async for line in lines:
                    if line.get("status") == _SUCCESS:
                        succeeded = True
                    else:
                        note(_step(line))
        except ServerError as error:
            raise HeadraceError(
                ErrorCode.ENGINE_FAILED, f"Ollama cannot pull {quoted(model)}: {error.message}"
            ) from None
        if not succeeded:
            raise HeadraceError(ErrorCode.ENGINE_FAILED, f"Ollama's pull of {quoted(model)} broke off. Pull again.")
        await self._engine.refresh()
        status = self._engine.status()
        return next((known for known in (*status.models, *status.embedding_models) if same_model(known, model)), "")


def _step(line: dict[str, Any]) -> FetchStep:
    digest, total, completed = line.get("digest"), line.get("total"), line.get("completed")
    return FetchStep(
        str(line.get("status", "")),
        digest if isinstance(digest, str) else "",
        total if isinstance(total, int) else 0,
        completed if isinstance(completed, int) else 0,
    )
